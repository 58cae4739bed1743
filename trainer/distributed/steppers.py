"""How a gradient comes to be and becomes an update: through DeepSpeed's hooks, or directly where nothing needs them.

Both leave the same numbers up to the rounding of the summation order; tests/test_invariance.py holds them together.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from trainer.distributed.process_group import World
from trainer.distributed.shared import Common, Shared
from trainer.kernels.linear_cross_entropy import TokenLoss

PIECE = 2**20  # elements of a flat gradient whose squares are summed in float32 before float64 takes over


class NotFinite(Exception):
    """The loss or the global gradient of a step is NaN or infinite; the weights are still those before the step."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What became of a step: the norm of the global gradient before clipping, and whether fp16 left the update out."""

    grad_norm: Tensor | float
    skipped: bool = False


class ThroughDeepSpeed:
    """ZeRO 2 and 3, offload and fp16: DeepSpeed's own forward, backward and step."""

    guarded = False

    def __init__(self, engine: Any, precision: str):
        self.engine = engine
        self.precision = precision
        self.parts = engine.world_size  #: what the ranks' gradients are divided by when they are brought together

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Each row's summed loss, for evaluation."""
        return self.engine(ids, labels)[1]

    def backward(self, ids: Tensor, labels: Tensor, share: float) -> Tensor:
        """Add the gradient of the micro-batch's summed loss times `share`; returns each row's sum."""
        total, rows = self.engine(ids, labels)
        self.engine.backward(total * share, scale_wrt_gas=False)
        return rows

    def update(self, sound: Tensor) -> Update:
        """Reduce, measure, clip and update. Raises NotFinite, with the weights untouched, unless fp16 may skip."""
        before = self.engine.skipped_steps
        self.engine.step()
        norm, skipped = float(self.engine.get_global_grad_norm()), self.engine.skipped_steps > before
        if self.precision != "fp16" and (skipped or not math.isfinite(norm)):
            raise NotFinite(f"gradient norm {norm}")
        return Update(grad_norm=norm, skipped=skipped)

    def drop(self) -> None:
        """Let no gradient stay. Weights and moments may be worthless afterwards."""
        self.engine.step()


class Direct:
    """ZeRO 0 and 1, and 2 on one rank: one backward, one reduction, one norm, one update.

    DeepSpeed looks after each weight apart: a hook in the backward, a copy into a bucket, a norm, two walks over all
    modules. For a batch of the card's size that takes longer than the arithmetic. The partition stays DeepSpeed's: its
    flat buffers hold weights and moments, only the gradient's way into them is this class's.
    """

    parts = 1  # the ranks' gradients are summed

    def __init__(self, world: World, engine: Any, loss: TokenLoss, trained: Sequence[nn.Parameter], clip: float):
        self.world = world
        self.loss = loss
        self.clip = clip
        self.trained = list(trained)
        self.zero: Any = engine.optimizer if engine.zero_optimization() else None
        self.optimizer: Any = self.zero.optimizer if self.zero else engine.optimizer
        if self.zero:
            for hook in self.zero._grad_acc_hooks:
                hook.remove()
        alike = all(parameter.dtype == torch.float32 for parameter in self.trained)
        divides = self.zero is None and type(self.optimizer) is torch.optim.AdamW
        self.common = Common.of(world, self.optimizer, self.trained) if alike and divides else None
        self.shared = Shared.of(world, self._widest()) if alike and not self.common else None
        #: torch's fused AdamW divides by a scale and leaves an update out on the device's word: nobody has to wait
        self.guarded = bool(self.optimizer.defaults.get("fused"))
        self._broken = torch.zeros((), device=world.device)  # one after an update that was left out: no other follows

    def _widest(self) -> int:
        """Elements of the longest flat gradient that is brought together at one time."""
        if self.zero is None:
            return sum(parameter.numel() for parameter in self.trained)
        return max((flat.numel() for flat in self.zero.bit16_groups_flat), default=0)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Each row's summed loss, for evaluation."""
        return self.loss(ids, labels)[1]

    def backward(self, ids: Tensor, labels: Tensor, share: float) -> Tensor:
        """Add the gradient of the micro-batch's summed loss times `share`; returns each row's sum."""
        total, rows = self.loss(ids, labels)
        (total * share).backward()
        return rows

    def update(self, sound: Tensor) -> Update:
        """Reduce, measure, clip and update.

        Where the gradient or what `sound` (a truth on the device) speaks of is not finite, the weights stay: NotFinite
        is raised, or, `guarded`, the device leaves out the update and all that follow until `drop`, which the caller
        sees in the numbers.
        """
        for parameter in self.trained:
            if parameter.grad is None:  # not in this forward; the other stages take it for zero, too
                parameter.grad = torch.zeros_like(parameter)
        try:
            held = self._reduced_whole() if self.zero is None else self._reduced_parts()
            norm = self._norm(held)
            if not self.guarded and not torch.isfinite(norm):
                raise NotFinite(f"gradient norm {float(norm)}")
            self._apply(held, norm, sound)
            if self.zero is not None:
                self._spread()
            if self.common is not None:
                self.common.wait()
        finally:
            self._clear()
        return Update(grad_norm=norm)

    def drop(self) -> None:
        """Let no gradient stay, and take updates again after one that was left out."""
        self._clear()
        self._broken = torch.zeros_like(self._broken)

    def _clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
        if self.zero is not None:
            for part in self.zero.single_partition_of_fp32_groups:
                part.grad = None

    def _reduced_whole(self) -> list[Tensor]:
        """Stage 0: every weight's gradient, summed over the ranks; of `common` ones those that this rank updates."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        if self.common is not None:
            held = self.common.reduce(gradients)
            for number, parameter in enumerate(self.trained):
                if not self.common.owns(number):
                    parameter.grad = None  # an optimizer leaves it alone
            return held
        if self.shared is not None:
            self.shared.all_reduce(gradients)
        elif self.world.size > 1:
            flat = _flatten_dense_tensors(gradients)
            dist.all_reduce(flat)
            torch._foreach_copy_(gradients, list(_unflatten_dense_tensors(flat, gradients)))
        return gradients

    def _reduced_parts(self) -> list[Tensor]:
        """Stages 1 and 2: this rank's share of each group's gradient, summed over the ranks."""
        parts = self.zero.single_partition_of_fp32_groups
        for group, weights, part in zip(self.zero.bit16_groups, self.zero.bit16_groups_flat, parts, strict=True):
            gradients = [p.grad for p in group]
            padding = weights.numel() - sum(gradient.numel() for gradient in gradients)
            if padding:
                gradients.append(weights.new_zeros(padding))
            for parameter in group:
                parameter.grad = None
            if self.shared is not None:
                part.grad = self.shared.reduce_scatter(gradients)
                continue
            flat = _flatten_dense_tensors(gradients)
            if self.world.size > 1:
                mine = flat.new_empty(part.numel())
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # torch is renaming the function
                    dist.reduce_scatter_tensor(mine, flat)
                flat = mine
            part.grad = flat
        return [part.grad for part in parts]

    def _norm(self, held: list[Tensor]) -> Tensor:
        """Of the whole gradient, 0-dimensional float32 on the device."""
        if self.zero is None and self.common is None:
            return nn.utils.get_total_norm(held)
        pieces = [piece for gradient in held for piece in gradient.flatten().split(PIECE)]
        norms = torch.stack(torch._foreach_norm(pieces)) if pieces else torch.zeros(0, device=self.world.device)
        square = norms.double().square().sum()
        if self.world.size > 1:
            dist.all_reduce(square)
        return square.sqrt().float()

    def _apply(self, held: list[Tensor], norm: Tensor, sound: Tensor) -> None:
        """Clip by the formula of torch's clip_grad_norm_, and update."""
        if self.guarded:
            self._broken = torch.maximum(self._broken, (~(sound & torch.isfinite(norm))).float())
            self.optimizer.found_inf = self._broken
            self.optimizer.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0) if self.clip else None
        elif self.clip:
            torch._foreach_mul_(held, (self.clip / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()

    @torch.no_grad()
    def _spread(self) -> None:
        """Stages 1 and 2: give every rank the weights that this one has updated."""
        zero = self.zero
        for flat, shares, part in zip(
            zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups,
            strict=True,
        ):  # fmt: skip
            mine = shares[self.world.rank]
            mine.copy_(part)
            if self.shared is not None:
                self.shared.all_gather(flat, mine)
            elif self.world.size > 1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    dist.all_gather_into_tensor(flat, mine)


_NOTHING_MORE = {"stage", "reduce_bucket_size", "allgather_bucket_size", "contiguous_gradients", "overlap_comm"}
_THEIRS = {"communication_data_type", "comms_logger", "wall_clock_breakdown"}


def goes_direct(config: Mapping[str, Any], *, size: int, precision: str) -> bool:
    """Whether DeepSpeed's dict asks for nothing that `Direct` does not do, on `size` ranks."""
    zero = config["zero_optimization"]
    stage = int(zero.get("stage", 0))
    asked = {key for key, value in config.items() if value}
    return stage == 0 or (  # where DeepSpeed divides nothing there is nothing for it to do
        precision != "fp16" and stage <= (2 if size == 1 else 1) and set(zero) <= _NOTHING_MORE and not asked & _THEIRS
    )
