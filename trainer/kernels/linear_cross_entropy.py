"""Summed negative log-likelihood, without a full logits tensor where it would be large.

Sums and counts are kept apart everywhere and divided once, by the number of counted tokens of the *global* batch:
so the loss does not depend on how rows are spread over micro-batches and ranks.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

IGNORED = -100  # label of a position that is not counted, as in Hugging Face's models
LARGEST_LOGITS = 2**27  # bytes of float32 logits at one time; above it they are made and dropped in pieces
FROZEN = 2  # times smaller are the pieces before an output layer that does not train, on a GPU, where it costs little
EVEN = 64  # logits lie in rows of a multiple of it: matrix units and vector registers want them aligned
CACHED = 2**20  # logits that a processor works on at one time: they stay in its cache


class TokenLoss(nn.Module):
    """A causal LM as a function from rows to their summed negative log-likelihood, in float32."""

    def __init__(self, causal: PreTrainedModel, autocast: torch.dtype | None):
        super().__init__()
        self.causal = causal
        self.autocast = autocast
        self.told: list[str] = []  #: one line where compiling failed
        self._shapes: set[tuple[int, ...]] = set()
        self._blocks: Any = None
        self._compiled_slopes: Any = None

    def compile_for(self, shapes: set[tuple[int, ...]]) -> None:
        """Compile for ids of these shapes, at their first use; all others stay eager, as do ends of an epoch."""
        self._shapes = shapes
        self._blocks = torch.compile(self.causal.base_model.forward, dynamic=False)
        compiled = torch.compile(_slopes_for_compiler, dynamic=False)

        def slopes(logits: Tensor, targets: Tensor) -> Tensor:
            nll, made = compiled(logits, targets)
            logits.copy_(made)
            return nll

        self._compiled_slopes = slopes

    def _hidden(self, **ids: Tensor) -> tuple[Tensor, Any]:
        """(last hidden states, the function for the slopes), compiled where that was asked for this shape."""
        if self._blocks is not None and tuple(next(iter(ids.values())).shape[:2]) in self._shapes:
            from torch._dynamo.exc import TorchDynamoException  # takes a second: only where it is needed

            try:
                hidden = self._blocks(**ids, use_cache=False).last_hidden_state
                return hidden, self._compiled_slopes
            except TorchDynamoException as problem:  # no compiler here, or a model that it does not understand
                self._blocks = None
                self.told.append(f"steps are not compiled: {' '.join(str(problem).split())[:200]}")
        return self.causal.base_model(**ids, use_cache=False).last_hidden_state, _slopes

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and labels [rows, width] (labels not shifted, -100 where not counted) -> (sum [], sums of rows [rows]).

        In nats; the sum has a gradient, the rows' have none. No attention mask: rows are padded on the right only,
        where a causal model cannot look; and with a mask or a cache the packed rows of newer models would silently
        attend otherwise.
        """
        # Inside forward, because DeepSpeed's engine switches off an autocast that stands around it.
        precision = torch.autocast(input_ids.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with precision:
            targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # the last has no next token
            if self.causal.config.model_type == "gpt2":
                total, nll = self._from_hidden(input_ids, targets)
            else:  # others may scale or cap their logits: ask the model itself
                logits = self.causal(input_ids=input_ids, use_cache=False).logits
                nll = _nll(logits.flatten(0, 1), targets)
                total = nll.sum()
            return total, nll.detach().view(len(labels), -1).sum(1)

    def _from_hidden(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [rows, width], targets [positions] -> (sum [], nll [positions]); 0 where not counted."""
        head, words = self.causal.get_output_embeddings(), self.causal.get_input_embeddings()
        piece, learns = LARGEST_LOGITS // (4 * self.causal.config.vocab_size), torch.is_grad_enabled()
        if not _plain(head) or head.weight.dtype == torch.float16:
            hidden = self._hidden(input_ids=input_ids)[0].flatten(0, 1)
            nll = torch.cat(
                [
                    checkpoint(_piece_nll, head, h, t, use_reentrant=False)
                    if learns and len(targets) > piece
                    else _piece_nll(head, h, t)
                    for h, t in zip(hidden.split(piece), targets.split(piece), strict=True)
                ]
            )
            return nll.sum(), nll
        if not head.weight.requires_grad and targets.device.type == "cuda":  # none adds to the weight's gradient
            piece = max(1, piece // FROZEN)
        piece = math.ceil(len(targets) / math.ceil(len(targets) / piece))  # all alike: a small last one costs as much
        shared: list[Tensor] | None = None
        if learns and type(words) is nn.Embedding and words.weight is head.weight and words.weight.requires_grad:
            shared = []
            hidden, slopes = self._hidden(inputs_embeds=_LookUp.apply(words.weight, input_ids, shared))
        else:
            hidden, slopes = self._hidden(input_ids=input_ids)
        total, nll = _HeadLoss.apply(
            hidden.flatten(0, 1), head.weight, targets, piece, slopes if learns else None, shared
        )
        return total, nll


class _HeadLoss(torch.autograd.Function):
    """The summed loss over the output layer's logits, piece by piece, each with its gradients while it is there.

    The gradient of the sum to the logits is softmax - one-hot, whatever comes after: so no logits have to be kept or
    made a second time, which would be a quarter of the layer's work. It holds one float32 gradient of the layer's
    weight instead (where that is trained). Under fp16 the small softmax values would vanish unscaled: not used there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, piece: int, slopes: Any, shared: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden [positions, d], weight [vocabulary, d], targets [positions] -> (sum [], nll [positions]).

        `slopes`: what puts their gradients in the place of logits; None: none are wanted. `shared`: where the
        weight's gradient is left for `_LookUp`; None: it is returned.
        """
        device, words = hidden.device.type, len(weight)
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            states, matrix = hidden.to(low), weight.to(low) if device == "cpu" else _even(weight, low)
            counted = (targets != IGNORED).to(low)[:, None]
            to_hidden = torch.empty_like(states) if slopes and ctx.needs_input_grad[0] else None
            to_weight = torch.empty_like(weight, dtype=torch.float32) if slopes and ctx.needs_input_grad[1] else None
            nll = hidden.new_zeros(len(targets), dtype=torch.float32)
            room = states.new_empty(min(piece, len(targets)), words + -words % EVEN)
            for start in range(0, len(targets), piece):
                part = slice(start, start + piece)
                logits = room[: len(targets[part])]
                torch.mm(states[part], matrix.T, out=logits[:, : len(matrix)])
                logits[:, words:] = -torch.inf  # of no word: their chances and slopes are 0
                nll[part] = (slopes or _losses)(logits, targets[part])
                if to_hidden is not None:
                    torch.mm(logits[:, : len(matrix)], matrix, out=to_hidden[part]).mul_(counted[part])
                if to_weight is not None:
                    _add_product(to_weight, logits[:, :words].T, states[part] * counted[part], first=not start)
        ctx.mark_non_differentiable(nll)
        ctx.dtype, ctx.slopes, ctx.shared = hidden.dtype, (to_hidden, to_weight), shared
        return nll.sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """The kept gradients times that of the sum."""
        to_hidden, to_weight = ctx.slopes
        ctx.slopes = None
        if to_weight is not None:
            to_weight.mul_(by)
            if ctx.shared is not None:
                ctx.shared.append(to_weight)
                to_weight = None
        return to_hidden.to(ctx.dtype) * by if to_hidden is not None else None, to_weight, None, None, None, None


class _LookUp(torch.autograd.Function):
    """Rows of a tied embedding, whose gradients are added into that of the output layer, where most of it comes from.

    Apart, they would be a second gradient of the weight's size, nearly all of it zeros, and a sum of the two.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, shared: list[Tensor]) -> Tensor:
        """Weight [vocabulary, d], ids [rows, width] -> [rows, width, d]."""
        ctx.save_for_backward(ids)
        ctx.shared = shared
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor, None, None]:
        """The weight's whole gradient: `_HeadLoss`, whose input this is, has run before."""
        whole = ctx.shared.pop()
        ids, rows = ctx.saved_tensors[0].flatten(), by.flatten(0, 1).to(whole.dtype)
        if whole.device.type == "cpu":  # in order there; a GPU's index_add_ adds in any
            return whole.index_add_(0, ids, rows), None, None
        return whole.index_put_((ids,), rows, accumulate=True), None, None


def _even(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with rows of nothing below: a GPU's products want an even width, beyond the words logits are then 0."""
    matrix = weight.new_empty((len(weight) + -len(weight) % EVEN, weight.shape[1]), dtype=dtype)
    matrix[: len(weight)].copy_(weight)
    matrix[len(weight) :] = 0
    return matrix


def _add_product(to: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """to += left @ right, in the type of `to` (a `first` product takes its place)."""
    if left.dtype != to.dtype:
        made = left @ right
        to.copy_(made) if first else to.add_(made)
    elif first:
        torch.mm(left, right, out=to)
    else:
        to.addmm_(left, right)


def _slopes(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, vocabulary], targets [n] -> nll [n] in float32, 0 where not counted.

    In the place of the logits stands then the gradient of each row's nll as if it were counted: softmax - one-hot.
    """
    nll = []
    for part, wanted in _rows(logits, targets):
        logs = _log_softmax(part)
        nll.append(_picked(logs, wanted))
        at = wanted.clamp(min=0)[:, None]
        place = part if part.dtype == torch.float32 else logs
        torch.exp(logs, out=place).scatter_add_(1, at, -torch.ones_like(logs[:, :1]))
        if place is not part:
            part.copy_(place)
    return torch.cat(nll)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The same numbers without gradients; what stands in the place of the logits is then of no use."""
    return torch.cat([_picked(_log_softmax(part), wanted) for part, wanted in _rows(logits, targets)])


def _rows(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """So many of them at a time that a processor keeps them in its cache from one operation to the next."""
    rows = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(logits.split(rows), targets.split(rows), strict=True)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32; on a processor in the place of logits that are of that type."""
    if logits.device.type != "cpu":  # one kernel that reads other types itself
        return torch.log_softmax(logits, dim=1, dtype=torch.float32)
    logs = logits.float()
    return torch.log_softmax(logs, dim=1, out=logs)


def _picked(logs: Tensor, targets: Tensor) -> Tensor:
    """Minus what stands at the targets, 0 where not counted."""
    return -logs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets != IGNORED)


def _slopes_for_compiler(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, gradients) of the same without writing over anything: a compiler makes one pass of it."""
    at = targets.clamp(min=0)[:, None]
    logs = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    hot = torch.arange(logits.shape[1], device=logits.device)[None] == at
    return -logs.gather(1, at)[:, 0] * (targets != IGNORED), (logs.exp() - hot.float()).to(logits.dtype)


def _plain(head: nn.Module) -> bool:
    """Whether the output layer is a matrix product and nothing else, with its weight at hand: not under ZeRO-3."""
    weight = getattr(head, "weight", None)
    return type(head) is nn.Linear and head.bias is None and not hasattr(weight, "ds_id")


def _piece_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return _nll(head(hidden), targets)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
