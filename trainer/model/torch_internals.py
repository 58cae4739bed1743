"""Names private to torch that have no public form; checked against torch 2.13.

`tests/unit/model/test_torch_internals.py` fails where an upgrade changes one.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeTensor", "FakeTensorMode", "TorchDispatchMode"]  # tensors without data, and what sees each operation

# One call for a list of tensors, on a GPU a few kernels for all of them. Public names only exist for whole optimizers.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_norm = torch._foreach_norm

#: what a GPU's flash kernel is called among torch's operations
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention


def release_capture_pool(device_index: int, pool: Any) -> None:
    """Let the allocator give no more memory to the pool of a CUDA graph whose capture failed, and release it.
    `torch.cuda.graph` does both at its end, which such a capture does not reach."""
    torch._C._cuda_endAllocateToPool(device_index, pool)
    torch._C._cuda_releasePool(device_index, pool)
