"""Rows on their way to the device, and numbers from it: the host waits for nothing but what it reads."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.sampler import IGNORE_INDEX, MicroBatch


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
