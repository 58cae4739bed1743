"""Causal attention without a mask, and dropout on a processor with the attention around it.

While a CUDA stream is capturing, transformers builds a [rows, 1, width, width] mask, since it cannot look whether rows
are packed: flash attention is then not eligible, and dropout draws other masks than in the eager steps before. Rows
here are whole, padded on the right only, so causality is all there is to mask (1.47 times as fast as with the mask,
forward and backward of 1,024 tokens, measured at 0403dda on one thread of an AMD EPYC).

On a processor torch draws dropout as a float for each element, on one thread, and its attention has no kernel with
dropout. Here 16 random bits decide on an element, and attention goes by blocks of queries, over the keys that they may
see. All bits come from torch's generator: seed and shapes give the masks, however many threads there are. Gain of a
whole step of GPT-2 124M's shape (`launch/bench.py steps --without cpu-attention`): 1.03 to 1.10 times. Less than a
tenth: what keeps it is that the demo's published losses come from its masks.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL_NAME, BLOCKWISE_NAME = "causal_sdpa", "blockwise_dropout"  # among transformers' own attentions
NUM_LEVELS = 2**16  # a probability is rounded to a multiple of one over it: 0.1 to 0.100006
BLOCK_SIZE = 64  # queries of one block of the attention: what it makes stays in the cache


def install(causal: PreTrainedModel) -> None:
    """Let a model that computes torch's scaled dot product attention do so without a mask where rows are whole. Packed
    rows (position ids that begin again) need transformers' own `sdpa`, which masks other texts."""
    if causal.config._attn_implementation == "sdpa":
        AttentionInterface.register(CAUSAL_NAME, sdpa_attention_forward)
        AttentionMaskInterface.register(CAUSAL_NAME, mask_unless_whole)
        causal.set_attn_implementation(CAUSAL_NAME)


@contextlib.contextmanager
def rows_of_one_text() -> Iterator[None]:
    """Within it transformers takes rows for whole, without a look at their positions, for which a device is waited."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def mask_unless_whole(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None where attention is causal and nothing else, which the kernel knows by itself; transformers' mask otherwise:
    for padding, a cache, a sliding window shorter than the row, or a mask function of the model's own (`use_vmap`)."""
    kv_length, local_size = kwargs.get("kv_length"), kwargs.get("local_size")
    is_square = kwargs.get("q_length", kv_length) == kv_length
    fits_window = local_size is None or (kv_length is not None and kv_length < local_size)
    if attention_mask is None and is_square and fits_window and not kwargs.get("use_vmap"):
        return None
    return masking_utils.sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the masks of `sample_keep_mask`."""

    def forward(self, input: Tensor) -> Tensor:
        return (input * sample_keep_mask(input.shape, self.p)).mul_(dropout_scale(self.p)) if self.training else input


def install_on_cpu(module: nn.Module, causal: PreTrainedModel) -> None:
    """Put these dropouts in the place of torch's in `module`, and this attention in `causal` where it is GPT-2."""
    install_dropout(module, Dropout)
    config: Any = causal.config
    if config.model_type == "gpt2" and config.attn_pdrop > 0 and config._attn_implementation in ("sdpa", CAUSAL_NAME):
        AttentionInterface.register(BLOCKWISE_NAME, blockwise_attention_forward)
        AttentionMaskInterface.register(BLOCKWISE_NAME, mask_unless_whole)
        causal.set_attn_implementation(BLOCKWISE_NAME)


def install_dropout(module: nn.Module, kind: type[nn.Dropout]) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout and child.p > 0:
                setattr(parent, name, kind(child.p).train(child.training))


def num_dropped_levels(probability: float) -> int:
    """Of the NUM_LEVELS equally likely values of 16 bits, how many drop an element."""
    return min(round(probability * NUM_LEVELS), NUM_LEVELS - 1)


def sample_keep_mask(shape: torch.Size, probability: float) -> Tensor:
    """1 for elements that stay, 0 for those that are dropped, with the `probability` rounded to 1 / NUM_LEVELS; in
    bytes, which torch multiplies by twice as fast as by truths."""
    num_elements = shape.numel()
    random_bits = torch.empty(-(-num_elements // 4), dtype=torch.int64).random_(-(2**63), None)
    random_int16 = random_bits.view(torch.int16)[:num_elements].view(shape)
    keep_mask = torch.empty(shape, dtype=torch.uint8)
    torch.ge(random_int16, num_dropped_levels(probability) - NUM_LEVELS // 2, out=keep_mask)
    return keep_mask


def dropout_scale(probability: float) -> float:
    """By what the elements that stay are multiplied, so that the mean stays."""
    return NUM_LEVELS / (NUM_LEVELS - num_dropped_levels(probability))


def blockwise_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers calls an attention: [rows, heads, width, d] -> [rows, width, heads, d]."""
    if not kwargs.get("dropout") or attention_mask is not None or query.shape != key.shape:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    output: Tensor = BlockwiseAttention.apply(query, key, value, kwargs["scaling"], kwargs["dropout"])
    return output.transpose(1, 2), None


class BlockwiseAttention(torch.autograd.Function):
    """Causal attention with dropout of its probabilities, by blocks of queries; scores and softmax in float32. The sum
    over probabilities times their gradients is taken from the output, as in FlashAttention (Dao et al., arXiv
    2205.14135, appendix B.4), so only probabilities and masks are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout_p: float) -> Tensor:
        """query, key, value [rows, heads, width, size] -> the same shape."""
        batch_size, num_heads, seq_len, head_dim = value.shape
        q, k, v = (tensor.reshape(-1, seq_len, head_dim) for tensor in (query, key, value))
        # Laid out as the next layer reads it, which then needs no copy of its own.
        output = value.new_empty(batch_size, seq_len, num_heads, head_dim).transpose(1, 2)
        saved: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            queries, keys = q.float() * scaling, k.float()
            causal_mask = torch.full((BLOCK_SIZE, BLOCK_SIZE), -torch.inf).triu_(1)
            for start in range(0, seq_len, BLOCK_SIZE):
                end = min(start + BLOCK_SIZE, seq_len)
                scores = torch.bmm(queries[:, start:end], keys[:, :end].transpose(1, 2))
                scores[:, :, start:] += causal_mask[: end - start, : end - start]
                probs = torch.softmax(scores, dim=2).to(v.dtype)
                keep_mask = sample_keep_mask(probs.shape, dropout_p)
                block_output = torch.bmm(probs * keep_mask, v[:, :end]).mul_(dropout_scale(dropout_p))
                output[:, :, start:end] = block_output.view(batch_size, num_heads, end - start, head_dim)
                saved += [probs, keep_mask]
        ctx.save_for_backward(q, k, v, output, *saved)
        ctx.scales = scaling, dropout_scale(dropout_p)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, output, *saved = ctx.saved_tensors
        scaling, keep_scale = ctx.scales
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.autocast("cpu", enabled=False):
            delta = (grad_output.float() * output).sum(3).view(len(q), -1, 1)
            grad_output = (grad_output * keep_scale).reshape(q.shape)
            for start, probs, keep_mask in zip(range(0, q.shape[1], BLOCK_SIZE), saved[::2], saved[1::2], strict=True):
                end = start + probs.shape[1]
                grad_v[:, :end] += torch.bmm((probs * keep_mask).transpose(1, 2), grad_output[:, start:end])
                grad_scores = torch.bmm(grad_output[:, start:end], v[:, :end].transpose(1, 2)).mul_(keep_mask).float()
                grad_scores = grad_scores.sub_(delta[:, start:end]).mul_(probs).to(v.dtype)
                grad_q[:, start:end] = torch.bmm(grad_scores, k[:, :end]).mul_(scaling)
                grad_k[:, :end] += torch.bmm(grad_scores.transpose(1, 2), q[:, start:end])
            grad_k.mul_(scaling)
        return grad_q.view(output.shape), grad_k.view(output.shape), grad_v.view(output.shape), None, None
