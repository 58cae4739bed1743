"""How a gradient comes to be and becomes an update: through DeepSpeed's hooks, or directly where nothing needs them.

Both leave the same numbers up to the rounding of the summation order (tests/distributed/test_invariance.py).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.data.sampler import GlobalBatch
from trainer.distributed.gradients import GradientBuckets, LocalGradients, all_gather, total_norm
from trainer.distributed.process_group import DistContext
from trainer.model.loss import CausalLMLoss


class NonFiniteError(Exception):
    """The loss or the global gradient of a step is NaN or infinite; the weights are still those before the step."""

    batch: GlobalBatch | None = None  #: of that step, where the engine ran it


@dataclass(frozen=True, kw_only=True)
class OptimizerStepResult:
    """What became of a step: the norm of the global gradient before clipping, and whether fp16 left the update out."""

    grad_norm: Tensor | float
    is_skipped: bool = False


class DeepSpeedStepper:
    """ZeRO 2 and 3, offload and fp16: DeepSpeed's own forward, backward and step."""

    skips_on_device = False

    def __init__(self, deepspeed_engine: Any, precision: str):
        self.deepspeed_engine = deepspeed_engine
        self.precision = precision
        #: what the ranks' gradients are divided by when they are brought together
        self.grad_divisor = deepspeed_engine.world_size

    def reduce_during_backward(self) -> None:
        """DeepSpeed's own hooks decide when what is sent."""

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """As `NativeStepper`'s."""
        return self.deepspeed_engine(ids, labels)[1]

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float, *packed: Tensor) -> Tensor:
        """As `NativeStepper`'s."""
        loss_sum, row_losses = self.deepspeed_engine(ids, labels, *packed)
        self.deepspeed_engine.backward(loss_sum * loss_weight, scale_wrt_gas=False)
        return row_losses

    def optimizer_step(self, all_finite: Tensor) -> OptimizerStepResult:
        """Reduce, measure, clip and update. Raises NonFiniteError, with the weights untouched, unless fp16 may skip."""
        previous_skipped_steps = self.deepspeed_engine.skipped_steps
        self.deepspeed_engine.step()
        grad_norm = float(self.deepspeed_engine.get_global_grad_norm())
        is_skipped = self.deepspeed_engine.skipped_steps > previous_skipped_steps
        if self.precision != "fp16" and (is_skipped or not math.isfinite(grad_norm)):
            raise NonFiniteError(f"gradient norm {grad_norm}")
        return OptimizerStepResult(grad_norm=grad_norm, is_skipped=is_skipped)

    def discard_step(self) -> None:
        """Let no gradient stay. Weights and moments may be worthless afterwards."""
        self.deepspeed_engine.step()


class NativeStepper:
    """ZeRO 0 and 1, and 2 on one rank: one backward, one reduction, one norm, one update.

    DeepSpeed looks after each weight apart: a norm, two walks over all modules. For a batch of the card's size that
    takes longer than the arithmetic. The partition stays DeepSpeed's: its flat buffers hold weights and moments, only
    the gradient's way into them is ours (`trainer.distributed.gradients`).
    """

    grad_divisor = 1  # the ranks' gradients are summed

    def __init__(
        self,
        dist_context: DistContext,
        deepspeed_engine: Any,
        loss_module: CausalLMLoss,
        trainable_params: Sequence[nn.Parameter],
        max_grad_norm: float,
        *,
        skips_on_device: bool,
    ):
        """`skips_on_device`: torch's fused AdamW divides by a scale and leaves an update out on the device's word."""
        self.dist_context = dist_context
        self.loss_module = loss_module
        self.max_grad_norm = max_grad_norm
        self.trainable_params = list(trainable_params)
        self.zero_optimizer: Any = deepspeed_engine.optimizer if deepspeed_engine.zero_optimization() else None
        self.optimizer: Any = self.zero_optimizer.optimizer if self.zero_optimizer else deepspeed_engine.optimizer
        #: under a ZeRO stage this rank's float32 part of each group, with its gradient as the optimizer looks for it
        self._partitions: list[Any] = []
        if self.zero_optimizer:
            self._partitions = self.zero_optimizer.single_partition_of_fp32_groups
            for hook in self.zero_optimizer._grad_acc_hooks:
                hook.remove()
        self.gradients = self._make_gradients()
        self.skips_on_device = skips_on_device
        # 1 after an update that was left out: no other follows until `discard_step`.
        self._found_inf = torch.zeros((), device=dist_context.device)

    def _make_gradients(self) -> LocalGradients | GradientBuckets:
        kind = LocalGradients if self.dist_context.world_size == 1 else GradientBuckets
        if self.zero_optimizer is None:
            return kind([self.trainable_params], [sum(p.numel() for p in self.trainable_params)], is_sharded=False)
        flat_sizes = [flat.numel() for flat in self.zero_optimizer.bit16_groups_flat]
        return kind(self.zero_optimizer.bit16_groups, flat_sizes, is_sharded=True)

    @property
    def flat_grads(self) -> list[Tensor] | None:
        """Of several ranks: the place of each weight's gradient in the flat buffers that are reduced."""
        buckets = self.gradients if isinstance(self.gradients, GradientBuckets) else None
        return [buckets.views[parameter] for parameter in self.trainable_params] if buckets else None

    def reduce_during_backward(self) -> None:
        """The next backward is the last of its step: what it has made is reduced while it goes on."""
        if isinstance(self.gradients, GradientBuckets):
            self.gradients.overlap()

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Each row's summed loss, for evaluation."""
        return self.loss_module(ids, labels)[1]

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float, *packed: Tensor) -> Tensor:
        """Add the gradient of the micro-batch's summed loss times `loss_weight`; returns each row's sum.

        `packed`: the position ids of rows that hold several examples.
        """
        loss_sum, row_losses = self.loss_module(ids, labels, *packed)
        (loss_sum * loss_weight).backward()
        return row_losses

    def optimizer_step(self, all_finite: Tensor) -> OptimizerStepResult:
        """Reduce, measure, clip and update.

        Where the gradient or what `all_finite` (a truth on the device) speaks of is not finite, the weights stay:
        NonFiniteError is raised, or, `skips_on_device`, the device leaves out the update and all that follow
        until `discard_step`, which the caller sees in the numbers.
        """
        try:
            grads = self.gradients.reduce()
            if self._partitions:  # none without ZeRO
                for partition, grad in zip(self._partitions, grads, strict=True):
                    partition.grad = grad
            grad_norm = self._grad_norm(grads)
            if not self.skips_on_device and not torch.isfinite(grad_norm):
                raise NonFiniteError(f"gradient norm {float(grad_norm)}")
            self._clip_and_step(grads, grad_norm, all_finite)
            if self.zero_optimizer is not None:
                self._all_gather_params()
        finally:
            self._clear_grads()
        return OptimizerStepResult(grad_norm=grad_norm)

    def discard_step(self) -> None:
        """Let no gradient stay, and take updates again after one that was left out."""
        if isinstance(self.gradients, GradientBuckets):
            self.gradients.discard()
        self._clear_grads()
        self._found_inf = torch.zeros_like(self._found_inf)

    def _clear_grads(self) -> None:
        for tensor in (*self.trainable_params, *self._partitions):
            tensor.grad = None

    def _grad_norm(self, grads: list[Tensor]) -> Tensor:
        """Of the whole gradient, 0-dimensional float32 on the device."""
        grad_norm = total_norm(grads)
        if self.zero_optimizer is None or self.dist_context.world_size == 1:
            return grad_norm
        square = grad_norm.double().square()
        dist.all_reduce(square)
        return square.sqrt().float()

    def _clip_and_step(self, grads: list[Tensor], grad_norm: Tensor, all_finite: Tensor) -> None:
        """Clip by the formula of torch's clip_grad_norm_, and update."""
        if self.skips_on_device:
            self._found_inf = torch.maximum(self._found_inf, (~(all_finite & torch.isfinite(grad_norm))).float())
            self.optimizer.found_inf = self._found_inf
            self.optimizer.grad_scale = (
                ((grad_norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm else None
            )
        elif self.max_grad_norm:
            torch._foreach_mul_(grads, (self.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()

    @torch.no_grad()
    def _all_gather_params(self) -> None:
        """Stages 1 and 2: give every rank the weights that this one has updated."""
        zero_optimizer = self.zero_optimizer
        for flat, shards, partition in zip(
            zero_optimizer.bit16_groups_flat,
            zero_optimizer.parallel_partitioned_bit16_groups,
            self._partitions,
            strict=True,
        ):
            local_shard = shards[self.dist_context.rank]
            local_shard.copy_(partition)
            if self.dist_context.world_size > 1:
                all_gather(flat, local_shard)


_NATIVE_ZERO_KEYS = {"stage", "reduce_bucket_size", "allgather_bucket_size", "contiguous_gradients", "overlap_comm"}
_DEEPSPEED_ONLY_KEYS = {"communication_data_type", "comms_logger", "wall_clock_breakdown"}


def supports_native_stepper(deepspeed_config: Mapping[str, Any], *, world_size: int, precision: str) -> bool:
    """Whether DeepSpeed's dict asks for nothing that `NativeStepper` does not do, on `world_size` ranks."""
    zero_config = deepspeed_config["zero_optimization"]
    stage = int(zero_config.get("stage", 0))
    enabled_keys = {key for key, value in deepspeed_config.items() if value}
    return stage == 0 or (  # where DeepSpeed divides nothing there is nothing for it to do
        precision != "fp16"
        and stage <= (2 if world_size == 1 else 1)
        and set(zero_config) <= _NATIVE_ZERO_KEYS
        and not enabled_keys & _DEEPSPEED_ONLY_KEYS
    )
