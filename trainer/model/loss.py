"""Summed negative log-likelihood, without a full logits tensor where it would be large.

Sums and counts are kept apart everywhere and divided once, by the number of counted tokens of the *global* batch:
so the loss does not depend on how rows are spread over micro-batches and ranks.

Gain (`launch/bench.py kernels`, one thread of an AMD EPYC): 1.05 times (1.02 to 1.20) over torch's loss of all logits;
at most 128 MiB of them at a time, where 2,048 positions of GPT-2 are 393 MiB, and as much again for their gradient.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trainer.model import torch_internals
from trainer.model.output_head import OutputHead, find_output_head

IGNORE_INDEX = -100  # label of a position that is not counted, as in Hugging Face's models
PACKED_ATTENTIONS = ("sdpa", "eager")  # that mask examples of one row from one another, by transformers' own masks
MAX_LOGITS_BYTES = 2**27  # bytes of float32 logits at one time; above it they are made and dropped in pieces
FROZEN_CHUNK_DIVISOR = (
    2  # times smaller are the pieces before an output layer that does not train, on a GPU, where it costs little
)
ROW_MULTIPLE = 128  # of a piece's rows on a GPU, whose matrix units work on tiles of so many
VERIFIED_TOKENS = 9  # of each of the two rows by which the head is held against the model's own logits
MAX_HEAD_DIFFERENCE = {torch.float32: 1e-5}  # relative, of a summed loss; other types: one rounding of bfloat16
VOCAB_MULTIPLE = 64  # logits lie in rows of a multiple of it: matrix units and vector registers want them aligned
CPU_CHUNK_LOGITS = 2**20  # logits that a processor works on at one time: they stay in its cache

_is_gpu_simulated = False


def uses_gpu_form(device: torch.device) -> bool:
    """Whether tensors on `device` are computed as on a GPU."""
    return device.type != "cpu" or _is_gpu_simulated


@contextlib.contextmanager
def simulate_gpu(is_simulated: bool = True) -> Iterator[None]:
    """Within it CPU tensors take the GPU form of every kernel (`is_simulated` False: nothing changes)."""
    global _is_gpu_simulated
    previous = _is_gpu_simulated
    _is_gpu_simulated = is_simulated or previous
    try:
        yield
    finally:
        _is_gpu_simulated = previous


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32."""
    if left.dtype != torch.float32 and sums_in_fp32(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def accumulate_matmul(out: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """out += left @ right, in the type of `out` (an `overwrite` product takes its place)."""
    if left.dtype == out.dtype:
        if overwrite:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)
    elif out.dtype == torch.float32 and sums_in_fp32(left.device, left.dtype):
        # torch 2.11's sum fails for tensors without data, of which nothing is wanted but what it allocates.
        if overwrite or (isinstance(out, torch_internals.FakeTensor) and torch.__version__ < (2, 13)):
            torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    elif overwrite:
        out.copy_(left @ right)
    else:
        out.add_(left @ right)


def sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device does so with this 16-bit type; tensors without data stand for those of a simulated GPU."""
    if isinstance(torch.empty(0), torch_internals.FakeTensor):
        return uses_gpu_form(device)
    return _device_sums_in_fp32(device, dtype)


@functools.cache
def _device_sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """By a product that is tried: torch has it for some devices only, and a wrong one is worse than none."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.ones(64, 64, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
        mm = torch.mm(left, right, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError):
        return False
    exact = left.double() @ right.double()
    error = torch.maximum((out - 1 - exact).abs().max(), (mm - exact).abs().max())
    return bool(error < 1e-3)  # rounded to bfloat16 it would be 0.1


class CausalLMLoss(nn.Module):
    """A causal LM as a function from rows to their summed negative log-likelihood, in float32."""

    def __init__(self, causal: PreTrainedModel, autocast_dtype: torch.dtype | None):
        super().__init__()
        self.causal = causal
        self.autocast_dtype = autocast_dtype
        self.head = find_output_head(causal)  #: None: the model makes all its logits at once
        self.is_head_sharded = False  #: whether ZeRO-3 is to be taken for granted, where its marks are not there
        self._packed: dict[str, Tensor] = {}  # the positions of the rows in work, where they hold several examples

    def verify(self) -> str:
        """Hold the loss against that of the model's own logits, on a few tokens; before ZeRO shards anything.

        Where they differ the model's own are used from here on, and the line returned says why and what they cost.
        """
        if self.head is None:
            return self._use_own_logits("its output is not a layer of the hidden states")
        config, was_training = self.causal.config, self.causal.training
        vocab_size = self.head.layer.weight.shape[0] if hasattr(self.head.layer, "weight") else config.vocab_size
        width = min(VERIFIED_TOKENS, getattr(config, "max_position_embeddings", None) or VERIFIED_TOKENS)
        device = next(self.causal.parameters()).device
        ids = (torch.arange(2 * width, device=device) * 7919 % vocab_size).view(2, width)
        self.causal.eval()
        try:
            by_head, own = float(self(ids, ids)[0].detach()), float(self._own_loss(ids))
        except Exception as error:  # as many kinds as there are architectures
            return self._use_own_logits(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}")
        finally:
            self.causal.train(was_training)
        dtype = self.autocast_dtype or next(self.causal.parameters()).dtype
        if not abs(by_head - own) <= MAX_HEAD_DIFFERENCE.get(dtype, 2**-8) * abs(own):
            return self._use_own_logits(f"its output layer gives a loss of {by_head:.6g}, the model itself {own:.6g}")
        return ""

    @torch.no_grad()
    def _own_loss(self, ids: Tensor) -> Tensor:
        with self._autocast(ids.device):
            logits = self.causal(input_ids=ids, use_cache=False).logits
        return _nll(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).sum()

    def _use_own_logits(self, reason: str) -> str:
        self.head = None
        size = 4 * self.causal.config.get_text_config().vocab_size / 2**20
        return f"all logits of a micro-batch are made at once, {size:.2g} MiB a token: {reason}"

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        # Inside forward, because DeepSpeed's engine switches off an autocast that stands around it.
        return torch.autocast(device.type, self.autocast_dtype) if self.autocast_dtype else contextlib.nullcontext()

    def _compute_hidden(self, **inputs: Tensor) -> Tensor:
        """Last hidden states [positions, d]."""
        hidden = self.causal.base_model(**inputs, **self._packed, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids and labels [rows, width] (labels not shifted, -100 where not counted) -> (sum [], sums of rows [rows]).

        In nats; the sum has a gradient, the rows' have none. `position_ids` [rows, width], from 0 in each of the
        examples that share a row: transformers then masks them from one another, unless it is given an attention mask
        or a cache. So neither is given: rows are padded on the right only, where a causal model cannot look.
        """
        attention = self.causal.config._attn_implementation
        if position_ids is not None and attention not in PACKED_ATTENTIONS:
            raise ValueError(f"packed rows need an attention that masks examples from one another, not {attention}")
        self._packed = {} if position_ids is None else {"position_ids": position_ids}
        with self._autocast(input_ids.device):
            targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()  # the last has no next token
            if self.head is not None:
                nll_sum, nll = self._chunked_loss(self.head, input_ids, targets)
            else:
                logits = self.causal(input_ids=input_ids, use_cache=False, **self._packed).logits
                nll = _nll(logits.flatten(0, 1), targets)
                nll_sum = nll.sum()
            return nll_sum, nll.detach().view(len(labels), -1).sum(1)

    def _chunked_loss(self, head: OutputHead, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [rows, width], targets [positions] -> (sum [], nll [positions]); 0 where not counted."""
        vocab_size = self.causal.config.get_text_config().vocab_size
        chunk_size, needs_grad = max(1, MAX_LOGITS_BYTES // (4 * vocab_size)), torch.is_grad_enabled()
        weight: Any = getattr(head.layer, "weight", None)
        if self.is_head_sharded or not head.is_plain_linear or weight.dtype == torch.float16:
            hidden = self._compute_hidden(input_ids=input_ids)
            nll = torch.cat(
                [
                    checkpoint(_chunk_nll, head, h, t, use_reentrant=False)
                    if needs_grad and len(targets) > chunk_size
                    else _chunk_nll(head, h, t)
                    for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
                ]
            )
            return nll.sum(), nll
        embedding = self.causal.get_input_embeddings()
        is_tied = type(embedding) is nn.Embedding and embedding.weight is weight and weight.requires_grad
        tied_weight_grads: list[Tensor] | None = [] if needs_grad and is_tied else None
        if tied_weight_grads is not None:
            rows = TiedEmbedding.apply(weight, input_ids, tied_weight_grads, embedding.padding_idx)
            hidden = self._compute_hidden(inputs_embeds=rows)
        else:
            hidden = self._compute_hidden(input_ids=input_ids)
        is_gpu = uses_gpu_form(targets.device)
        if is_gpu and not weight.requires_grad:  # no piece adds to the weight's gradient
            chunk_size = max(1, chunk_size // FROZEN_CHUNK_DIVISOR)
        nll_sum, nll = LinearCrossEntropy.apply(
            hidden,
            weight,
            head.layer.bias,
            targets,
            even_chunk_size(len(targets), chunk_size, is_gpu),
            _nll_and_grad_inplace if needs_grad else None,
            tied_weight_grads,
            head if head.changes_logits else None,
        )
        return nll_sum, nll


def even_chunk_size(num_rows: int, max_rows: int, is_gpu: bool) -> int:
    """Rows of a piece, all alike: a small last one costs as much. On a GPU whole tiles, and what remains."""
    chunk_size = math.ceil(num_rows / math.ceil(num_rows / max_rows))
    return chunk_size + -chunk_size % ROW_MULTIPLE if is_gpu else chunk_size


class LinearCrossEntropy(torch.autograd.Function):
    """The summed loss over the output layer's logits, piece by piece, each with its gradients while it is there.

    The gradient of the sum to the logits is softmax - one-hot, whatever comes after: so no logits have to be kept or
    made a second time, which would be a quarter of the layer's work. It holds one float32 gradient of the layer's
    weight instead (where that is trained). Under fp16 the small softmax values would vanish unscaled: not used there.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk_size: int,
        nll_and_grad: Any,
        tied_weight_grads: list[Tensor] | None,
        head: OutputHead | None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden [positions, d], weight [vocabulary, d], bias [vocabulary], targets [positions] -> (sum [], nll
        [positions]).

        `nll_and_grad`: what puts their gradients in the place of logits; None: none are wanted. `tied_weight_grads`:
        where the weight's gradient is left for `TiedEmbedding`; None: it is returned. `head`: what is done to the
        logits beyond the layer, if anything is.

        Long: one pass over the logits; cut up it would hide which buffer is overwritten when.
        Parameters: as autograd takes them.
        """
        device_type, vocab_size = hidden.device.type, len(weight)
        compute_dtype = (
            torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        )
        with torch.autocast(device_type, enabled=False):
            hidden_cast, weight_cast = (
                hidden.to(compute_dtype),
                _pad_vocab(weight, compute_dtype) if uses_gpu_form(hidden.device) else weight.to(compute_dtype),
            )
            target_mask = (targets != IGNORE_INDEX).to(compute_dtype)[:, None]
            grad_hidden = torch.empty_like(hidden_cast) if nll_and_grad and ctx.needs_input_grad[0] else None
            grad_weight = (
                torch.empty_like(weight, dtype=torch.float32) if nll_and_grad and ctx.needs_input_grad[1] else None
            )
            grad_bias = (
                torch.zeros_like(bias, dtype=torch.float32)
                if nll_and_grad and bias is not None and ctx.needs_input_grad[2]
                else None
            )
            nll = hidden.new_zeros(len(targets), dtype=torch.float32)
            logits_buffer = hidden_cast.new_empty(
                min(chunk_size, len(targets)), vocab_size + -vocab_size % VOCAB_MULTIPLE
            )
            for start in range(0, len(targets), chunk_size):
                chunk = slice(start, start + chunk_size)
                logits = logits_buffer[: len(targets[chunk])]
                torch.mm(hidden_cast[chunk], weight_cast.T, out=logits[:, : len(weight_cast)])
                words = logits[:, :vocab_size]
                if bias is not None:
                    words.add_(bias)
                derivative = head.shape_(words) if head else None
                logits[:, vocab_size:] = -torch.inf  # of no word: their chances and slopes are 0
                nll[chunk] = (nll_and_grad or _nll_without_grad)(logits, targets[chunk])
                if nll_and_grad and head:
                    words.mul_(head.scale if derivative is None else derivative.mul_(head.scale))
                if grad_hidden is not None:
                    torch.mm(logits[:, : len(weight_cast)], weight_cast, out=grad_hidden[chunk]).mul_(
                        target_mask[chunk]
                    )
                if grad_weight is not None:
                    accumulate_matmul(
                        grad_weight, words.T, hidden_cast[chunk] * target_mask[chunk], overwrite=not start
                    )
                if grad_bias is not None:
                    grad_bias += (words * target_mask[chunk]).sum(0, dtype=torch.float32)
        ctx.mark_non_differentiable(nll)
        ctx.dtype, ctx.grads = hidden.dtype, (grad_hidden, grad_weight, grad_bias)
        ctx.tied_weight_grads = tied_weight_grads
        return nll.sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times that of the sum."""
        grad_hidden, grad_weight, grad_bias = ctx.grads
        ctx.grads = None
        if grad_weight is not None:
            grad_weight.mul_(grad_output)
            if ctx.tied_weight_grads is not None:
                ctx.tied_weight_grads.append(grad_weight)
                grad_weight = None
        return (
            grad_hidden.to(ctx.dtype) * grad_output if grad_hidden is not None else None,
            grad_weight,
            grad_bias * grad_output if grad_bias is not None else None,
            *[None] * 5,
        )


class TiedEmbedding(torch.autograd.Function):
    """Rows of a tied embedding, whose gradients are added into that of the output layer, where most of it comes from.

    Apart, they would be a second gradient of the weight's size, nearly all of it zeros, and a sum of the two.
    """

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
        if not uses_gpu_form(grad_weight.device):  # in order there; a GPU's index_add_ adds in any
            return grad_weight.index_add_(0, ids, grad_rows), None, None, None
        return grad_weight.index_put_((ids,), grad_rows, accumulate=True), None, None, None


def _pad_vocab(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with rows of nothing below: a GPU's products want an even width, beyond the words logits are then 0."""
    padded = weight.new_empty((len(weight) + -len(weight) % VOCAB_MULTIPLE, weight.shape[1]), dtype=dtype)
    padded[: len(weight)].copy_(weight)
    padded[len(weight) :] = 0
    return padded


def _nll_and_grad_inplace(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, vocabulary], targets [n] -> nll [n] in float32, 0 where not counted.

    In the place of the logits stands then the gradient of each row's nll as if it were counted: softmax - one-hot.
    """
    if uses_gpu_form(logits.device):
        return _gpu_nll_and_grad_inplace(logits, targets)
    nll = []
    for chunk, chunk_targets in _iter_chunks(logits, targets):
        log_probs = _log_softmax(chunk)
        nll.append(_gather_nll(log_probs, chunk_targets))
        target_index = chunk_targets.clamp(min=0)[:, None]
        grad = chunk if chunk.dtype == torch.float32 else log_probs
        torch.exp(log_probs, out=grad).scatter_add_(1, target_index, -torch.ones_like(log_probs[:, :1]))
        if grad is not chunk:
            chunk.copy_(grad)
    return torch.cat(nll)


def _gpu_nll_and_grad_inplace(logits: Tensor, targets: Tensor) -> Tensor:
    """The same in two passes: softmax is rounded to the logits' type as it is written, and only the targets' entries,
    which would lose their digits there, are made apart: p - 1 = expm1(log p)."""
    log_probs = _log_softmax(logits)
    target_index = targets.clamp(min=0)[:, None]
    target_log_probs = log_probs.gather(1, target_index)
    torch.exp(log_probs, out=logits).scatter_(1, target_index, torch.expm1(target_log_probs).to(logits.dtype))
    return -target_log_probs[:, 0] * (targets != IGNORE_INDEX)


def _nll_without_grad(logits: Tensor, targets: Tensor) -> Tensor:
    """The same numbers without gradients; what stands in the place of the logits is then of no use."""
    return torch.cat(
        [_gather_nll(_log_softmax(chunk), chunk_targets) for chunk, chunk_targets in _iter_chunks(logits, targets)]
    )


def _iter_chunks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """So many of them at a time that a processor keeps them in its cache from one operation to the next."""
    rows_per_chunk = max(1, CPU_CHUNK_LOGITS // logits.shape[1]) if not uses_gpu_form(logits.device) else len(logits)
    return zip(logits.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32; on a processor in the place of logits that are of that type."""
    if uses_gpu_form(logits.device):  # one kernel that reads other types itself
        return torch.log_softmax(logits, dim=1, dtype=torch.float32)
    log_probs = logits.float()
    return torch.log_softmax(log_probs, dim=1, out=log_probs)


def _gather_nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Minus what stands at the targets, 0 where not counted."""
    return -log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets != IGNORE_INDEX)


def _chunk_nll(head: OutputHead, hidden: Tensor, targets: Tensor) -> Tensor:
    return _nll(head(hidden), targets)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
