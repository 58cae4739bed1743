"""Summed negative log-likelihood, without a full logits tensor where it would be large.

Sums and counts are kept apart everywhere and divided once, by the number of counted tokens of the *global* batch:
so the loss does not depend on how rows are spread over micro-batches and ranks.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

IGNORED = -100  # label of a position that is not counted, as in Hugging Face's models
LARGEST_LOGITS = 2**27  # bytes of float32 logits at one time; above it they are made and dropped in pieces
EVEN = 64  # on a GPU the product runs over a vocabulary that is a multiple of it: its matrix units want aligned rows
FUSED_ON = (
    "cuda",
)  # where the output layer and the loss are always one step of the backward; else if logits are large


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
        self._compiled_slopes = torch.compile(_slopes_for_compiler, dynamic=False)

    def _hidden(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """(last hidden states, the function for the slopes), compiled where that was asked for this shape."""
        if self._blocks is not None and tuple(input_ids.shape) in self._shapes:
            from torch._dynamo.exc import TorchDynamoException  # takes a second: only where it is needed

            try:
                hidden = self._blocks(input_ids=input_ids, use_cache=False).last_hidden_state
                return hidden, self._compiled_slopes
            except TorchDynamoException as problem:  # no compiler here, or a model that it does not understand
                self._blocks = None
                self.told.append(f"steps are not compiled: {' '.join(str(problem).split())[:200]}")
        return self.causal.base_model(input_ids=input_ids, use_cache=False).last_hidden_state, _slopes

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and labels [rows, width] (labels not shifted, -100 where not counted) -> (sum [], sums of rows [rows]).

        In nats; the sum has a gradient, the rows' have none. No attention mask: rows are padded on the right only,
        where a causal model cannot look; and with a mask or a cache the packed rows of newer models would silently
        attend otherwise.
        """
        # Inside forward, because DeepSpeed's engine switches off an autocast that stands around it.
        precision = torch.autocast(input_ids.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with precision:
            targets = labels[:, 1:].reshape(-1)
            if self.causal.config.model_type != "gpt2":  # others may scale or cap their logits: ask the model itself
                logits = self.causal(input_ids=input_ids, use_cache=False).logits[:, :-1]
                nll = _nll(logits.flatten(0, 1), targets)
                total = nll.sum()
            else:
                hidden, slopes = self._hidden(input_ids)
                total, nll = self._head(hidden[:, :-1].flatten(0, 1), targets, slopes)
            return total, nll.detach().view(len(labels), -1).sum(1)

    def _head(self, hidden: Tensor, targets: Tensor, slopes: Any) -> tuple[Tensor, Tensor]:
        """Hidden states [positions, d], targets [positions] -> (sum [], nll [positions]); 0 where not counted."""
        head = self.causal.get_output_embeddings()
        piece = LARGEST_LOGITS // (4 * self.causal.config.vocab_size)
        always = hidden.device.type in FUSED_ON
        if len(targets) <= piece and not always:
            nll = _nll(head(hidden), targets)
            return nll.sum(), nll
        if _plain(head) and hidden.dtype != torch.float16 and (torch.is_grad_enabled() or always):
            made = slopes if torch.is_grad_enabled() else None
            total, nll = _HeadLoss.apply(hidden, head.weight, targets, piece, made)
            return total, nll
        nll = torch.cat(
            [
                checkpoint(_piece_nll, head, h, t, use_reentrant=False)
                if torch.is_grad_enabled()
                else _piece_nll(head, h, t)
                for h, t in zip(hidden.split(piece), targets.split(piece), strict=True)
            ]
        )
        return nll.sum(), nll


class _HeadLoss(torch.autograd.Function):
    """The summed loss over the output layer's logits, piece by piece, each with its gradients while it is there.

    The gradient of the sum to the logits is softmax - one-hot, whatever comes after: so no logits have to be kept or
    made a second time, which would be a quarter of the layer's work. It holds one float32 gradient of the layer's
    weight instead (where that is trained). Under fp16 the small softmax values would vanish unscaled: not used there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, piece: int, slopes: Any
    ) -> tuple[Tensor, Tensor]:
        """Hidden [positions, d], weight [vocabulary, d], targets [positions] -> (sum [], nll [positions]).

        `slopes`: what gives the gradients to logits; None: there are none to be had.
        """
        device, words = hidden.device.type, len(weight)
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            states, matrix = hidden.to(low), _even(weight.to(low)) if device in FUSED_ON else weight.to(low)
            to_hidden = torch.empty_like(states) if slopes and ctx.needs_input_grad[0] else None
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if slopes and ctx.needs_input_grad[1] else None
            nll = hidden.new_zeros(len(targets), dtype=torch.float32)
            for start in range(0, len(targets), piece):
                part = slice(start, start + piece)
                logits = states[part] @ matrix.T
                if slopes is None:
                    nll[part] = _nll(logits[:, :words], targets[part])
                    continue
                nll[part], slope = slopes(logits[:, :words], targets[part])
                if len(matrix) > words:  # beyond the vocabulary the logits are nothing, and so are their slopes
                    logits[:, :words] = slope
                    slope = logits
                if to_hidden is not None:
                    torch.mm(slope, matrix, out=to_hidden[part])
                if to_weight is not None:
                    to_weight += (slope.T @ states[part])[:words]
        ctx.mark_non_differentiable(nll)
        ctx.dtype, ctx.slopes = hidden.dtype, (to_hidden, to_weight)
        return nll.sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The kept gradients times that of the sum."""
        to_hidden, to_weight = ctx.slopes
        ctx.slopes = None
        return (
            to_hidden.to(ctx.dtype) * by if to_hidden is not None else None,
            to_weight.mul_(by) if to_weight is not None else None,
            None,
            None,
            None,
        )


def _even(matrix: Tensor) -> Tensor:
    """With rows of nothing below, so that their number is a multiple of EVEN."""
    return functional.pad(matrix, (0, 0, 0, -len(matrix) % EVEN))


def _slopes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary], targets [n] -> (nll [n] in float32, the sum's gradient to the logits, in their type)."""
    counted, at = targets != IGNORED, targets.clamp(min=0)[:, None]
    logs = torch.log_softmax(logits.float(), dim=1)
    nll = -logs.gather(1, at)[:, 0] * counted
    slope = logs.exp_().scatter_add_(1, at, -torch.ones_like(logs[:, :1])).mul_(counted[:, None])
    return nll, slope.to(logits.dtype)


def _slopes_for_compiler(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same without writing over anything: a compiler makes one pass of it."""
    counted, at = targets != IGNORED, targets.clamp(min=0)[:, None]
    logs = torch.log_softmax(logits.float(), dim=1)
    nll = -logs.gather(1, at)[:, 0] * counted
    hot = torch.arange(logits.shape[1], device=logits.device)[None] == at
    return nll, ((logs.exp() - hot.float()) * counted[:, None]).to(logits.dtype)


def _plain(head: nn.Module) -> bool:
    """Whether the output layer is a matrix product and nothing else, with its weight at hand: not under ZeRO-3."""
    weight = getattr(head, "weight", None)
    return type(head) is nn.Linear and head.bias is None and not hasattr(weight, "ds_id")


def _piece_nll(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return _nll(head(hidden), targets)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none")
