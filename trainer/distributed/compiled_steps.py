"""Compiled forward and backward: held against the eager ones at a shape's first call, and used only where equal."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trainer.distributed.step_check import MAX_DIFFERENCE, Measured, root_cause, unchanged_rng
from trainer.model.loss import CausalLMLoss


class CompiledStepRunner:
    """Lets the loss run compiled for the shapes where that gives the eager numbers.

    `error` is one line where compiling failed or gave others; from then on all is eager.
    """

    def __init__(
        self,
        loss_module: CausalLMLoss,
        trainable_params: Sequence[nn.Parameter],
        backward: Callable[[Tensor, Tensor, float], Tensor],
        forward: Callable[[Tensor, Tensor], Tensor],
        *,
        shapes: set[tuple[int, ...]],
        precision: str,
    ):
        """`backward(ids, labels, loss_weight)` and `forward(ids, labels)`: a stepper's, which call the loss."""
        self.loss_module = loss_module
        self.trainable_params = list(trainable_params)
        self._stepper_backward, self._stepper_forward = backward, forward
        self.shapes, self.precision = shapes, precision
        self.checks: list[str] = []  #: one line a shape that was verified
        self.checked_to = 0.0  #: the largest difference among them
        self._error = ""
        self._verified: set[tuple[str, tuple[int, ...]]] = set()
        loss_module.compile_for_shapes(shapes)

    @property
    def error(self) -> str:
        """Why nothing is compiled any more; empty where all goes well."""
        return self._error or self.loss_module.compile_error

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float) -> Tensor:
        """Each row's sum; the gradients are added to those that the weights have."""
        self._prepare("train", ids, labels)
        return self._stepper_backward(ids, labels, loss_weight)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Each row's sum without gradients."""
        self._prepare("eval", ids, labels)
        return self._stepper_forward(ids, labels)

    def _prepare(self, kind: str, ids: Tensor, labels: Tensor) -> None:
        """Compile and verify at the first call of a shape; where that fails the loss is eager from here on."""
        shape = tuple(ids.shape)
        if self.error or shape not in self.shapes or (kind, shape) in self._verified:
            return
        label = f"{kind} {'x'.join(map(str, shape))}"
        try:
            with unchanged_rng(ids.device), self.loss_module.uncompiled():
                eager = self._measure(kind, ids, labels)
            if not eager.is_finite:  # nothing to compare with: the step is refused, the shape verified at its next call
                return
            with unchanged_rng(ids.device):
                compiled = self._measure(kind, ids, labels)
        except Exception as error:  # compilers raise whatever they like, also late, of the backward; or memory is short
            self._give_up(f"steps are not compiled: {' '.join(root_cause(error).split())[:200]}")
            return
        if self.loss_module.compile_error:
            return
        difference = eager.relative_difference(compiled)
        if not difference <= MAX_DIFFERENCE[self.precision]:  # NaN is never equal
            self._give_up(
                f"steps are not compiled: {label} gives {compiled}, the eager step {eager}: {difference:.1e} apart, at "
                f"most {MAX_DIFFERENCE[self.precision]:.0e} is rounding"
            )
            return
        self._verified.add((kind, shape))
        self.checked_to = max(self.checked_to, difference)
        self.checks.append(f"{label} compiled, checked to {difference:.0e}")

    def _measure(self, kind: str, ids: Tensor, labels: Tensor) -> Measured:
        """Without a trace in the gradients; no hook of a stepper sees it."""
        if kind == "eval":
            with torch.no_grad():
                return Measured.of(self.loss_module(ids, labels)[1], [])
        loss_sum, row_losses = self.loss_module(ids, labels)
        return Measured.of(row_losses, torch.autograd.grad(loss_sum, self.trainable_params, allow_unused=True))

    def _give_up(self, reason: str) -> None:
        self._error = reason
        self.loss_module.compile_for_shapes(set())
