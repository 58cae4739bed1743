"""Summed negative log-likelihood, without a full logits tensor where it would be large.

Sums and counts are kept apart everywhere and divided once, by the number of target tokens of the *global* batch:
so the loss does not depend on how rows are spread over micro-batches and ranks.

With all logits at once a whole step takes 1.25 times as long (6 layers, 512 wide, 256 tokens, one thread of an AMD
EPYC; `launch/bench.py steps --without chunked-loss`), and 2,048 positions of GPT-2 are 393 MiB, twice with a gradient.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.data.sampler import IGNORE_INDEX
from trainer.model.attention import rows_of_one_text
from trainer.model.model_files import reason

PACKED_ATTENTIONS = ("sdpa", "eager")  # that mask examples of one row from one another, by transformers' own masks
MAX_LOGITS_BYTES = 2**27  # bytes of float32 logits at one time; above it they are made and dropped in chunks
FROZEN_CHUNK_DIVISOR = 2  # chunks are so many times smaller where no gradient of the output layer is added up
SAMPLE_WIDTH = 9  # tokens of each of the two rows by which a form is held against the model's own
VOCAB_MULTIPLE = 64  # logits lie in rows of a multiple of it: matrix units and vector registers want them aligned
CPU_CHUNK_LOGITS = 2**20  # logits that a processor works on at one time: they stay in its cache

_is_gpu_simulated = False


def uses_gpu_form(device: torch.device) -> bool:
    """Whether tensors on `device` are computed as on a GPU."""
    return device.type != "cpu" or _is_gpu_simulated


@contextlib.contextmanager
def simulate_gpu(is_simulated: bool) -> Iterator[None]:
    """Within it CPU tensors take the GPU form of every kernel."""
    global _is_gpu_simulated
    _is_gpu_simulated = is_simulated
    try:
        yield
    finally:
        _is_gpu_simulated = False


def has_linear_head(causal: PreTrainedModel) -> bool:
    """Whether logits are what the output layer makes, times a number; Gemma 2 caps them."""
    is_capped = getattr(causal.config.get_text_config(), "final_logit_softcapping", None)
    return not is_capped and causal.base_model is not causal and causal.get_output_embeddings() is not None


def logit_scale(config: Any) -> float:
    """By what logits are multiplied: Cohere's by `logit_scale`, Granite's by 1 / `logits_scaling`."""
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)


def make_sample(causal: PreTrainedModel) -> Tensor:
    """Two rows of token ids [2, SAMPLE_WIDTH] to try a form of the model on."""
    device, vocab_size = next(causal.parameters()).device, causal.config.get_text_config().vocab_size
    return (torch.arange(2 * SAMPLE_WIDTH, device=device) * 7919 % vocab_size).view(2, -1)


class CausalLMLoss(nn.Module):
    """A causal LM as a function from rows to their summed negative log-likelihood, in float32. In training
    `label_smoothing` e takes (1 - e) of it and e times the mean over the vocabulary, as torch does."""

    def __init__(self, causal: PreTrainedModel, autocast_dtype: torch.dtype | None, label_smoothing: float = 0.0):
        super().__init__()
        self.causal = causal
        self.autocast_dtype = autocast_dtype
        self.label_smoothing = label_smoothing
        self.uses_head = has_linear_head(causal)  #: else the model makes all its logits at once
        self.is_head_sharded = False  #: whether ZeRO-3 is to be taken for granted, where its marks are not there

    def verify(self) -> str:
        """Hold the loss against that of the model's own logits, on a few tokens; before ZeRO shards anything. Where
        they differ the model's own are used from here on, and the line returned says why and what they cost."""
        problem = "its output is more than a layer of the hidden states"
        if self.uses_head:
            ids, was_training = make_sample(self.causal), self.causal.training
            self.causal.eval()
            try:
                self.uses_head = False
                with torch.no_grad():
                    own = float(self(ids, ids)[0])
                self.uses_head = True
                by_head = float(self(ids, ids)[0].detach())
                bound = 1e-5 if (self.autocast_dtype or self.causal.dtype) == torch.float32 else 2**-8
                if abs(by_head - own) <= bound * abs(own):
                    return ""
                problem = f"its output layer gives a loss of {by_head:.6g}, the model itself {own:.6g}"
            except Exception as error:
                problem = reason(error)
            finally:
                self.causal.train(was_training)
        self.uses_head = False
        size = 4 * self.causal.config.get_text_config().vocab_size / 2**20
        return f"all logits of a micro-batch are made at once, {size:.2g} MiB a token: {problem}"

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids and labels [rows, width] (labels not shifted, -100 where not counted) -> (sum [], sums of rows [rows]).

        In nats; the sum has a gradient, the rows' have none. `position_ids` [rows, width], from 0 in each of the
        examples that share a row: transformers then masks them from one another, unless it is given an attention mask
        or a cache. Rows are padded on the right only, where a causal model cannot look.
        """
        attention = self.causal.config._attn_implementation
        if position_ids is not None and attention not in PACKED_ATTENTIONS:
            raise ValueError(f"packed rows need an attention that masks examples from one another, not {attention}")
        inputs = {} if position_ids is None else {"position_ids": position_ids}
        targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # the last has no next token
        # Inside forward, because DeepSpeed's engine switches off an autocast that stands around it.
        dtype, smoothing = self.autocast_dtype, self.label_smoothing if self.training else 0.0
        autocast = torch.autocast(input_ids.device.type, dtype) if dtype else contextlib.nullcontext()
        with autocast, rows_of_one_text() if position_ids is None else contextlib.nullcontext():
            if self.uses_head:
                nll_sum, nll = self._chunked_loss(input_ids, targets, inputs, smoothing)
            else:
                logits = self.causal(input_ids=input_ids, use_cache=False, **inputs).logits.flatten(0, 1)
                nll = _nll(logits, targets, smoothing)
                nll_sum = nll.sum()
        return nll_sum, nll.detach().view(len(labels), -1).sum(1)

    def _chunked_loss(
        self, input_ids: Tensor, targets: Tensor, inputs: dict[str, Tensor], smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """Ids [rows, width], targets [positions] -> (sum [], nll [positions]); 0 where not counted."""
        config = self.causal.config.get_text_config()
        max_rows, scale = MAX_LOGITS_BYTES // (4 * config.vocab_size), logit_scale(config)
        needs_grad, embedding = torch.is_grad_enabled(), self.causal.get_input_embeddings()
        layer: Any = self.causal.get_output_embeddings()
        is_sharded = self.is_head_sharded or hasattr(layer.weight, "ds_id")
        uses_kernel = type(layer) is nn.Linear and not is_sharded and layer.weight.dtype != torch.float16
        is_tied = type(embedding) is nn.Embedding and embedding.weight is layer.weight and layer.weight.requires_grad
        tied_weight_grads: list[Tensor] | None = [] if uses_kernel and needs_grad and is_tied else None
        rows: dict[str, Any] = {"input_ids": input_ids}
        if tied_weight_grads is not None:
            arguments = layer.weight, input_ids, tied_weight_grads, embedding.padding_idx
            rows = {"inputs_embeds": TiedEmbedding.apply(*arguments)}
        hidden = self.causal.base_model(**rows, **inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = hidden * scale if scale != 1 else hidden
        if uses_kernel:
            max_rows //= 1 if layer.weight.requires_grad else FROZEN_CHUNK_DIVISOR
            num_chunks = math.ceil(len(targets) / max_rows)
            chunk_size = math.ceil(len(targets) / num_chunks)  # all alike: a small last one costs as much
            return LinearCrossEntropy.apply(
                hidden, layer.weight, layer.bias, targets, chunk_size, needs_grad, tied_weight_grads, smoothing
            )

        def chunk_nll(hidden: Tensor, targets: Tensor) -> Tensor:
            return _nll(layer(hidden), targets, smoothing)

        compute: Any = chunk_nll
        if needs_grad and len(targets) > max_rows:  # the logits are made a second time in the backward
            compute = partial(checkpoint, chunk_nll, use_reentrant=False)
        nll = torch.cat(
            [compute(*chunk) for chunk in zip(hidden.split(max_rows), targets.split(max_rows), strict=True)]
        )
        return nll.sum(), nll


def find_packing_problem(causal: PreTrainedModel) -> str:
    """How the examples of a packed row change one another's loss, "" where they do not; before ZeRO shards anything:
    two rows are held against both in one row, with their positions and, for comparison, without."""
    own_attention, was_training = causal.config._attn_implementation, causal.training
    loss_module, ids = CausalLMLoss(causal, None), make_sample(causal)
    positions = torch.arange(SAMPLE_WIDTH, device=ids.device)
    row = ids.view(1, -1), ids.masked_fill(positions == 0, IGNORE_INDEX).view(1, -1)
    inputs = ((ids, ids), row, (*row, positions.repeat(2)[None]))
    causal.eval()
    try:
        with torch.no_grad():
            if own_attention not in PACKED_ATTENTIONS:
                causal.set_attn_implementation("sdpa")
            apart, joined, packed = (float(loss_module(*each)[0]) for each in inputs)
    except Exception as error:
        return reason(error)
    finally:
        causal.train(was_training)
        causal.set_attn_implementation(own_attention)
    difference = abs(packed - apart)
    bound = 1e-5 if causal.dtype == torch.float32 else 2**-8  # and far less than without positions
    is_same = difference <= 1e-5 * apart or difference <= min(bound * apart, abs(joined - apart) / 4)
    return "" if is_same else f"examples of one row see one another (loss {packed:.6g}, apart {apart:.6g})"


class LinearCrossEntropy(torch.autograd.Function):
    """The summed loss over the output layer's logits, chunk by chunk, each with its gradients while it is there.

    The gradient of the sum to the logits is softmax - labels, whatever comes after: so no logits are kept or made a
    second time, but one float32 gradient of the layer's weight, where that is trained. Under fp16 the small softmax
    values would vanish unscaled: not used there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        needs_grad: bool,
        tied_weight_grads: list[Tensor] | None,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """Hidden [positions, d], weight [vocabulary, d], bias [vocabulary], targets [positions] -> (sum [], nll
        [positions]). `tied_weight_grads`: where the weight's gradient is left for `TiedEmbedding`; None: returned."""
        device_type, vocab_size = hidden.device.type, len(weight)
        padding = -vocab_size % VOCAB_MULTIPLE
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        wants_hidden, wants_weight, wants_bias = (needs_grad and wants for wants in ctx.needs_input_grad[:3])
        with torch.autocast(device_type, enabled=False):
            hidden_cast = hidden.to(dtype)
            # With rows of zeros below: a GPU's 16-bit products want an even width.
            weight_cast = weight if weight.dtype == dtype else functional.pad(weight.to(dtype), (0, 0, 0, padding))
            target_mask = (targets != IGNORE_INDEX).to(dtype)[:, None]
            nll = hidden.new_empty(len(targets), dtype=torch.float32)
            grad_hidden = torch.empty_like(hidden_cast) if wants_hidden else None
            grad_weight: Tensor | None = None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
            buffer = hidden_cast.new_empty(min(chunk_size, len(targets)), vocab_size + padding)
            for start in range(0, len(targets), chunk_size):
                chunk = slice(start, start + chunk_size)
                logits = buffer[: len(targets[chunk])]
                torch.mm(hidden_cast[chunk], weight_cast.T, out=logits[:, : len(weight_cast)])
                words = logits[:, :vocab_size]
                if bias is not None:
                    words.add_(bias)
                logits[:, vocab_size:] = -torch.inf  # of no word: their probabilities and gradients are 0
                nll[chunk] = _nll_inplace(logits, targets[chunk], vocab_size, needs_grad, smoothing)
                if not needs_grad:
                    continue
                if grad_hidden is not None:
                    torch.mm(logits[:, : len(weight_cast)], weight_cast, out=grad_hidden[chunk])
                    grad_hidden[chunk].mul_(target_mask[chunk])
                counted_hidden = hidden_cast[chunk] * target_mask[chunk]
                if wants_weight and grad_weight is None:
                    grad_weight = torch.mm(words.T, counted_hidden).float()
                elif grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(words.T, counted_hidden)
                elif grad_weight is not None:
                    grad_weight += torch.mm(words.T, counted_hidden)
                if grad_bias is not None:
                    grad_bias += (words * target_mask[chunk]).sum(0, dtype=torch.float32)
        ctx.mark_non_differentiable(nll)
        ctx.dtype, ctx.grads = hidden.dtype, (grad_hidden, grad_weight, grad_bias)
        ctx.tied_weight_grads = tied_weight_grads
        return nll.sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.grads
        ctx.grads = None
        if grad_weight is not None:
            grad_weight.mul_(grad_output)
            if ctx.tied_weight_grads is not None:
                ctx.tied_weight_grads.append(grad_weight)
                grad_weight = None
        grad_hidden = grad_hidden.to(ctx.dtype) * grad_output if grad_hidden is not None else None
        grad_bias = grad_bias * grad_output if grad_bias is not None else None
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


class TiedEmbedding(torch.autograd.Function):
    """Rows of a tied embedding, whose gradients are added into that of the output layer, where most of it comes from.
    Apart, they would be a second gradient of the weight's size, nearly all of it zeros, and a sum of the two."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, tied_weight_grads: list[Tensor], padding_idx: int | None
    ) -> Tensor:
        """Weight [vocabulary, d], ids [rows, width] -> [rows, width, d]; `padding_idx` as in `nn.Embedding`."""
        ctx.save_for_backward(ids)
        ctx.tied_weight_grads, ctx.padding_idx = tied_weight_grads, padding_idx
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """The weight's whole gradient: `LinearCrossEntropy`, whose input this is, has run before."""
        grad_weight = ctx.tied_weight_grads.pop()
        ids, grad_rows = ctx.saved_tensors[0].flatten(), grad_output.flatten(0, 1).to(grad_weight.dtype)
        if ctx.padding_idx is not None:
            grad_rows = grad_rows.masked_fill((ids == ctx.padding_idx)[:, None], 0)
        # In the order of the ids, always: index_add_ keeps it on a processor only, index_put_ on a GPU only.
        if not uses_gpu_form(grad_weight.device):
            return grad_weight.index_add_(0, ids, grad_rows), None, None, None
        return grad_weight.index_put_((ids,), grad_rows, accumulate=True), None, None, None


def _nll_inplace(logits: Tensor, targets: Tensor, vocab_size: int, needs_grad: bool, smoothing: float) -> Tensor:
    """Logits [n, vocabulary and padding], targets [n] -> nll [n] in float32, 0 where not counted.

    In the place of the logits stands then, where it is needed, the gradient of each row's nll as if it were counted:
    softmax - labels, where the target's p - 1 = expm1(log p) keeps its digits in bfloat16. Smoothed labels are e / V,
    and 1 - e more at the target.
    """
    # So many rows at a time that a processor keeps them in its cache from one operation to the next.
    num_rows = len(logits) if uses_gpu_form(logits.device) else max(1, CPU_CHUNK_LOGITS // logits.shape[1])
    nll = []
    for chunk, chunk_targets in zip(logits.split(num_rows), targets.split(num_rows), strict=True):
        if chunk.dtype == torch.float32:
            log_probs = torch.log_softmax(chunk, dim=1, out=chunk)
        else:
            log_probs = torch.log_softmax(chunk, dim=1, dtype=torch.float32)
        target_index = chunk_targets.clamp(min=0)[:, None]
        target_log_probs, is_target = log_probs.gather(1, target_index), chunk_targets != IGNORE_INDEX
        row_nll, gap = -target_log_probs[:, 0], torch.expm1(target_log_probs)
        if smoothing:
            row_nll = (1 - smoothing) * row_nll - smoothing * log_probs[:, :vocab_size].mean(1)
            gap += smoothing * (1 - 1 / vocab_size)
        nll.append(row_nll * is_target)
        if needs_grad:
            torch.exp(log_probs, out=chunk)
            if smoothing:
                chunk[:, :vocab_size] -= smoothing / vocab_size
            chunk.scatter_(1, target_index, gap.to(chunk.dtype))
    return torch.cat(nll)


def _nll(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )
