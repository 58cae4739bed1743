"""How gradients come to be and become an update: by a plain loop under ZeRO 0, by DeepSpeed's engine under ZeRO 1 to 3.

Both give the same numbers up to the rounding of the summation order (tests/distributed/test_invariance.py).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.data.sampler import GlobalBatch
from trainer.distributed.process_group import DistContext
from trainer.model import torch_internals
from trainer.model.loss import CausalLMLoss, uses_gpu_form

# The least size of a message, so that its latency is nothing beside it: NCCL as in torch's DistributedDataParallel;
# over gloo's networks (0.1 to 10 Gbit/s, 0.1 to 0.5 ms) one MiB takes 1 to 80 ms.
MIN_BUCKET_BYTES = {"nccl": 25 * 2**20, "gloo": 2**20}
NORM_CHUNK = 2**14  # elements whose squares are summed in float32: relative error below 1e-6


class NonFiniteError(Exception):
    """The loss or the global gradient of a step is NaN or infinite; the weights are still those before the step."""

    batch: GlobalBatch | None = None  #: of that step, where the engine ran it


class DeepSpeedStepper:
    """ZeRO 1 to 3: DeepSpeed's own forward, backward and step."""

    def __init__(self, deepspeed_engine: Any, precision: str):
        self.deepspeed_engine = deepspeed_engine
        self.precision = precision
        #: what the ranks' gradients are divided by when they are brought together
        self.grad_divisor = deepspeed_engine.world_size

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float, *packed: Tensor) -> Tensor:
        loss_sum, row_losses = self.deepspeed_engine(ids, labels, *packed)
        self.deepspeed_engine.backward(loss_sum * loss_weight, scale_wrt_gas=False)
        return row_losses

    def optimizer_step(self, all_finite: Tensor) -> tuple[float, bool]:
        """(norm of the global gradient before clipping, whether fp16 left the update out). Raises NonFiniteError, with
        the weights untouched, unless fp16 may skip."""
        previous_skipped_steps = self.deepspeed_engine.skipped_steps
        self.deepspeed_engine.step()
        grad_norm = float(self.deepspeed_engine.get_global_grad_norm())
        is_skipped = self.deepspeed_engine.skipped_steps > previous_skipped_steps
        if self.precision != "fp16" and (is_skipped or not math.isfinite(grad_norm)):
            raise NonFiniteError(f"gradient norm {grad_norm}")
        return grad_norm, is_skipped


class PlainStepper:
    """ZeRO 0: one backward, one reduction, one norm, one update. DeepSpeed looks after each weight apart, which takes
    longer than the arithmetic for a batch of the card's size."""

    grad_divisor = 1  # the ranks' gradients are summed

    def __init__(
        self,
        dist_context: DistContext,
        optimizer: torch.optim.Optimizer,
        loss_module: CausalLMLoss,
        trainable_params: Sequence[nn.Parameter],
        max_grad_norm: float,
        *,
        skips_on_device: bool,
    ):
        """`skips_on_device`: torch's fused AdamW divides by a scale and leaves an update out on the device's word."""
        self.optimizer: Any = optimizer
        self.loss_module = loss_module
        self.max_grad_norm = max_grad_norm
        self.trainable_params = list(trainable_params)
        self.buckets = GradientBuckets(self.trainable_params) if dist_context.world_size > 1 else None
        self.skips_on_device = skips_on_device
        # 1 after an update that was left out: no other follows.
        self._found_inf = torch.zeros((), device=dist_context.device)

    def backward(self, ids: Tensor, labels: Tensor, loss_weight: float, *packed: Tensor) -> Tensor:
        """Add the gradient of the summed loss times `loss_weight`; returns each row's sum. `packed`: position ids."""
        loss_sum, row_losses = self.loss_module(ids, labels, *packed)
        (loss_sum * loss_weight).backward()
        return row_losses

    def optimizer_step(self, all_finite: Tensor) -> tuple[Tensor, bool]:
        """Reduce, measure, clip and update; returns the norm of the global gradient before clipping, and False. Where
        the gradient, or the loss (`all_finite`, on the device), is not finite, the weights stay: NonFiniteError is
        raised, or, `skips_on_device`, the device leaves out this update and all that follow."""
        if self.buckets:
            self.buckets.reduce()
        for parameter in self.trainable_params:
            if parameter.grad is None:  # not in this forward
                parameter.grad = torch.zeros_like(parameter)
        grad_norm = total_norm([p.grad for p in self.trainable_params if p.grad is not None])
        if self.skips_on_device:
            self._found_inf = torch.maximum(self._found_inf, (~(all_finite & torch.isfinite(grad_norm))).float())
            self.optimizer.found_inf = self._found_inf
            self.optimizer.grad_scale = (
                ((grad_norm + 1e-6) / self.max_grad_norm).clamp(min=1.0) if self.max_grad_norm else None
            )
        elif not torch.isfinite(grad_norm):
            raise NonFiniteError(f"gradient norm {float(grad_norm)}")
        elif self.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.trainable_params, self.max_grad_norm, grad_norm)
        self.optimizer.step()
        for parameter in self.trainable_params:
            parameter.grad = None
        return grad_norm, False


class GradientBuckets:
    """The gradients of one of several ranks, in one flat buffer, which is summed over the ranks bucket by bucket, from
    the last weights to the first, whichever gradient comes first; without an overlap the whole buffer goes at once."""

    def __init__(self, params: Sequence[nn.Parameter]):
        sizes = [parameter.numel() for parameter in params]
        self.flat = params[0].new_zeros(sum(sizes))
        #: for each weight the part of the flat buffer that is its gradient
        self.views = {p: part.view_as(p) for p, part in zip(params, self.flat.split(sizes), strict=True)}
        #: True until `reduce`: there is one backward, the step's last, and what it has made is sent while it goes on
        self.is_overlapping = False
        # (part of the flat buffer, its weights), in the order in which a backward completes them.
        self._buckets: list[tuple[Tensor, set[nn.Parameter]]] = []
        self._ready: set[nn.Parameter] = set()
        self._work: list[Any] = []
        min_size = MIN_BUCKET_BYTES[dist.get_backend()] // params[0].element_size()
        start = end = self.flat.numel()
        members: set[nn.Parameter] = set()
        for parameter in reversed(params):
            start -= parameter.numel()
            members.add(parameter)
            if end - start >= min_size or start == 0:
                self._buckets.append((self.flat[start:end], members))
                end, members = start, set()
            parameter.register_post_accumulate_grad_hook(self._on_grad_ready)

    def reduce(self) -> None:
        """Leave at each weight the sum of its gradients over the ranks. All ranks must call."""
        for parameter, view in self.views.items():
            if parameter.grad is None:  # not in this forward; the other ranks may have one
                parameter.grad = view.zero_()
        if self.is_overlapping:
            self.finish_overlap()
        else:
            dist.all_reduce(self.flat)

    def finish_overlap(self) -> None:
        """Send what is left and wait for all of it."""
        while len(self._work) < len(self._buckets):
            self._launch_next()
        for work in self._work:
            work.wait()
        self._work, self._ready, self.is_overlapping = [], set(), False

    def _on_grad_ready(self, parameter: nn.Parameter) -> None:
        """After each backward: the gradient moves to its place; buckets that are whole are sent, in their order."""
        view = self.views[parameter]
        if parameter.grad is not view:
            assert parameter.grad is not None
            view.copy_(parameter.grad)
            parameter.grad = view
        if self.is_overlapping:
            self._ready.add(parameter)
            while len(self._work) < len(self._buckets) and self._buckets[len(self._work)][1] <= self._ready:
                self._launch_next()

    def _launch_next(self) -> None:
        self._work.append(dist.all_reduce(self._buckets[len(self._work)][0], async_op=True))


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Of all together, 0-dimensional float32. On a processor it goes by chunks, as a GPU's kernel does by itself: torch
    sums a tensor's squares in float32 one after the other, and the norm of GPT-2's embedding came out 0.27 % low."""
    if uses_gpu_form(grads[0].device):
        return torch.linalg.vector_norm(torch.stack(torch_internals.foreach_norm(grads)))
    small = [grad for grad in grads if grad.numel() <= NORM_CHUNK]
    large = [grad.flatten() for grad in grads if grad.numel() > NORM_CHUNK]
    whole = [flat[: len(flat) // NORM_CHUNK * NORM_CHUNK].view(-1, NORM_CHUNK) for flat in large]
    small += [flat[chunks.numel() :] for flat, chunks in zip(large, whole, strict=True) if flat.numel() % NORM_CHUNK]
    norms = [torch.stack(torch_internals.foreach_norm(small))] if small else []
    norms += [torch.linalg.vector_norm(chunks, dim=1) for chunks in whole]
    return torch.linalg.vector_norm(torch.cat(norms))
