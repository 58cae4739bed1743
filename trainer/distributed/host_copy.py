"""Numbers on their way from the device to the host, without a wait for what the device is asked for afterwards."""

from collections.abc import Callable

import torch
from torch import Tensor


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
