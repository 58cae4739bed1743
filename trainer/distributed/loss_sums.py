"""The summed losses of a global batch, brought together over the ranks and added exactly."""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.process_group import DistContext
from trainer.distributed.steppers import NonFiniteError


def all_gather_sums(context: DistContext, loss_sums: Sequence[Tensor], *, should_stop: bool) -> Tensor:
    """One row a rank on the device, float64 [ranks, micro-batches + 1]: its sums, and whether it wants to stop."""
    # `full` and not `tensor`: a copy to the device would wait.
    stop_flag = torch.full((), float(should_stop), dtype=torch.float64, device=context.device)
    local_sums = torch.stack([*loss_sums, stop_flag])
    if context.world_size == 1:
        return local_sums[None]
    gathered_sums = local_sums.new_empty(context.world_size * len(local_sums))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch is renaming the function
        dist.all_gather_into_tensor(gathered_sums, local_sums)
    return gathered_sums.view(context.world_size, -1)


def add_sums(sums: Sequence[float], world_size: int) -> tuple[float, bool]:
    """(exact sum of all micro-batches' sums, whether any rank wants to stop) of `all_gather_sums`, flat.

    Raises NonFiniteError where one is not finite.
    """
    width = len(sums) // world_size
    values = [value for index, value in enumerate(sums) if (index + 1) % width]
    if not all(map(math.isfinite, values)):
        raise NonFiniteError("loss nan")
    return math.fsum(values), any(sums[width - 1 :: width])
