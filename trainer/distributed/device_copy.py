"""What goes to a rank's device and comes from it: the model, rows of tokens, numbers.

The host waits for nothing but what it reads.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from trainer.data.sampler import IGNORE_INDEX, MicroBatch
from trainer.distributed.process_group import DistContext
from trainer.distributed.steppers import NonFiniteError
from trainer.model.build import TrainableModel
from trainer.model.loss import CausalLMLoss


def place_model(
    loss_module: CausalLMLoss, model: TrainableModel, deepspeed_config: Mapping[str, Any], device: torch.device
) -> str:
    """Move the model there; returns what its loss finds of its head (`CausalLMLoss.verify`). All ranks must call.

    Under ZeRO 3 it goes weight by weight, and of each only this rank's part stays. A packed base is there already.
    """
    if int(deepspeed_config["zero_optimization"].get("stage", 0)) < 3 or model.quant_settings is not None:
        loss_module.to(device)
        return loss_module.verify()
    head_problem = loss_module.verify()
    if "fp16" in deepspeed_config:
        loss_module.half()
    import_module("deepspeed").zero.Init(module=loss_module, config_dict_or_path=dict(deepspeed_config))
    for buffer in loss_module.buffers():
        buffer.data = buffer.data.to(device)
    return head_problem


def copy_to_device(
    micro_batch: MicroBatch, device: torch.device, width_multiple: int = 1, max_width: int | None = None
) -> tuple[Tensor, Tensor]:
    """(ids, labels) [rows, width], padded to a multiple of `width_multiple` but not beyond `max_width`.

    Rows in which several examples stand have positions of their own and are left as they are.
    """
    ids, labels = torch.from_numpy(micro_batch.input_ids), torch.from_numpy(micro_batch.labels)
    width = ids.shape[1]
    padding = min(width + -width % width_multiple, max_width or 2**62) - width
    if padding > 0 and micro_batch.position_ids is None:
        ids, labels = functional.pad(ids, (0, padding)), functional.pad(labels, (0, padding), value=IGNORE_INDEX)
    if device.type != "cuda":
        return ids, labels
    return ids.pin_memory().to(device, non_blocking=True), labels.pin_memory().to(device, non_blocking=True)


def copy_to_host(numbers: Tensor) -> Callable[[], list[float]]:
    """Queue a copy of a flat tensor now; what is returned waits for that copy alone, and gives the numbers.

    A read at the time they are wanted would be queued behind the next step, which has been launched by then.
    """
    if not numbers.is_cuda:
        return numbers.tolist
    buffer = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    buffer.copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return buffer.tolist()

    return read


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
