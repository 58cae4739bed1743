"""Dropout on a processor, and the attention around it.

torch draws a float for each element there, on one thread: in a small model a quarter of a step. And its attention has
no kernel with dropout: it computes the half that is masked, too, and keeps probabilities, masks and products of every
pair of tokens. Here 16 random bits decide on an element, and attention goes by blocks of queries, over the keys that
they may see. All bits come from torch's generator: seed and shapes give the masks, however many threads there are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LEVELS = 2**16  # a probability is rounded to a multiple of one over it: 0.1 to 0.100006
BLOCK = 64  # queries of one block of the attention: what it makes stays in the cache
NAME = "blockwise_dropout"  # of the attention among transformers' own


def install(module: nn.Module, causal: PreTrainedModel) -> None:
    """Put these in the place of torch's, in `module` and in the attention of `causal` where it is GPT-2's."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout and child.p > 0:
                setattr(parent, name, Dropout(child.p).train(child.training))
    config: Any = causal.config
    if config.model_type == "gpt2" and config.attn_pdrop > 0 and config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention_of_transformers)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        causal.set_attn_implementation(NAME)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the masks of `keep`."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; the identity in evaluation."""
        if not self.training:
            return input
        return (input * keep(input.shape, self.p)).mul_(scale(self.p))


def keep(shape: torch.Size, probability: float) -> Tensor:
    """1 for elements that stay, 0 for those that are dropped: with the `probability`, rounded to 1 / LEVELS.

    In bytes and not truths: torch makes and multiplies by those with vector instructions, twice as fast.
    """
    number = shape.numel()
    bits = torch.empty(-(-number // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = bits.view(torch.int16)[:number].view(shape)
    dropped = round(probability * LEVELS)
    stay = torch.zeros(shape, dtype=torch.uint8)
    return torch.ge(lanes, dropped - LEVELS // 2, out=stay) if dropped < LEVELS else stay


def scale(probability: float) -> float:
    """By what the elements that stay are multiplied, so that the mean stays."""
    dropped = round(probability * LEVELS)
    return LEVELS / (LEVELS - dropped) if dropped < LEVELS else 0.0


def attention_of_transformers(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float, dropout: float = 0.0, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The form in which transformers calls an attention: [rows, heads, width, d] -> [rows, width, heads, d]."""
    if not dropout or attention_mask is not None or query.shape != key.shape:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
        )
    return attention(query, key, value, scaling, dropout).transpose(1, 2), None


def attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, probability: float) -> Tensor:
    """Causal attention with dropout of its probabilities, all [rows, heads, width, d].

    Scores and softmax in float32 whatever the inputs are; the products with probabilities in the inputs' type.
    """
    made: Tensor = _Attention.apply(query, key, value, scaling, probability)
    return made


class _Attention(torch.autograd.Function):
    """By blocks of queries; the sum over probabilities times their gradients is taken from the output, as in
    FlashAttention (Dao et al., arXiv 2205.14135, appendix B.4), so only probabilities and masks are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, probability: float) -> Tensor:
        rows, heads, width, size = value.shape
        q, k, v = (given.reshape(-1, width, size) for given in (query, key, value))
        # Laid out as the next layer reads it, which then needs no copy of its own.
        out = value.new_empty(rows, width, heads, size).transpose(1, 2)
        kept: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            queries, keys = q.float() * scaling, k.float()
            unseen = torch.full((BLOCK, BLOCK), -torch.inf).triu_(1)
            for start, end in _blocks(width):
                scores = torch.bmm(queries[:, start:end], keys[:, :end].transpose(1, 2))
                scores[:, :, start:] += unseen[: end - start, : end - start]
                chances = torch.softmax(scores, dim=2).to(v.dtype)
                stay = keep(chances.shape, probability)
                made = torch.bmm(chances * stay, v[:, :end]).mul_(scale(probability))
                out[:, :, start:end] = made.view(rows, heads, end - start, size)
                kept += [chances, stay]
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.numbers = scaling, scale(probability)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, *kept = ctx.saved_tensors
        scaling, larger = ctx.numbers
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        with torch.autocast("cpu", enabled=False):
            sums = (by.float() * out).sum(3).view(len(q), -1, 1)
            by = (by * larger).reshape(q.shape)
            for number, (start, end) in enumerate(_blocks(q.shape[1])):
                chances, stay = kept[2 * number : 2 * number + 2]
                to_v[:, :end] += torch.bmm((chances * stay).transpose(1, 2), by[:, start:end])
                slope = torch.bmm(by[:, start:end], v[:, :end].transpose(1, 2)).mul_(stay).float()
                slope = slope.sub_(sums[:, start:end]).mul_(chances).to(v.dtype)
                to_q[:, start:end] = torch.bmm(slope, k[:, :end]).mul_(scaling)
                to_k[:, :end] += torch.bmm(slope.transpose(1, 2), q[:, start:end])
            to_k.mul_(scaling)
        return to_q.view(out.shape), to_k.view(out.shape), to_v.view(out.shape), None, None


def _blocks(width: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]
