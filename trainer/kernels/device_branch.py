"""Whether a kernel takes its GPU form or its CPU form: the one place that asks for the device. It gains no time.

`simulate_gpu` lets CPU tensors take the GPU form, so that it can be tested, and its memory counted, without a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_is_gpu_simulated = False


def uses_gpu_form(device: torch.device) -> bool:
    """Whether tensors on `device` are computed as on a GPU."""
    return device.type != "cpu" or _is_gpu_simulated


@contextmanager
def simulate_gpu(is_simulated: bool = True) -> Iterator[None]:
    """Within it CPU tensors take the GPU form of every kernel (`is_simulated` False: nothing changes)."""
    global _is_gpu_simulated
    previous = _is_gpu_simulated
    _is_gpu_simulated = is_simulated or previous
    try:
        yield
    finally:
        _is_gpu_simulated = previous
