"""Names private to torch, each with why no public one does; checked against torch 2.13.

`tests/unit/model/test_torch_internals.py` fails where an upgrade changes one.
"""

from typing import Any

import torch

# One call for a list of tensors, on a GPU a few kernels for all of them. Public names only exist for whole optimizers.
foreach_add_ = torch._foreach_add_
foreach_copy_ = torch._foreach_copy_
foreach_norm = torch._foreach_norm


def release_capture_pool(device_index: int, pool: Any) -> None:
    """Let the allocator give no more memory to the pool of a CUDA graph whose capture failed, and release it.

    `torch.cuda.graph` does both at its end, which such a capture does not reach.
    """
    torch._C._cuda_endAllocateToPool(device_index, pool)
    torch._C._cuda_releasePool(device_index, pool)
