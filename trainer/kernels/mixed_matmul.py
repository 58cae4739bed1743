"""Products of 16-bit matrices that are summed and left in float32, which a GPU's matrix units do by themselves.

Otherwise a product is rounded to 16 bits, and read again to be converted or added: two more passes, other last bits.

Gain: on a GPU in 16 bits only, counted (`launch/bench.py operations`), not measured; on a processor there is none,
since steps are computed in float32 there.
"""

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trainer.kernels.device_branch import uses_gpu_form


def matmul_fp32(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32."""
    if left.dtype != torch.float32 and sums_in_fp32(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def accumulate_matmul(out: Tensor, left: Tensor, right: Tensor, *, overwrite: bool) -> None:
    """out += left @ right, in the type of `out` (an `overwrite` product takes its place)."""
    if left.dtype == out.dtype:
        if overwrite:
            torch.mm(left, right, out=out)
        else:
            out.addmm_(left, right)
    elif out.dtype == torch.float32 and sums_in_fp32(left.device, left.dtype):
        # torch 2.11's sum fails for tensors without data, of which nothing is wanted but what it allocates.
        if overwrite or (isinstance(out, FakeTensor) and torch.__version__ < (2, 13)):
            torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
        else:
            torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
    elif overwrite:
        out.copy_(left @ right)
    else:
        out.add_(left @ right)


@torch.compiler.assume_constant_result
def sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device does so with this 16-bit type; tensors without data stand for those of a simulated GPU."""
    if isinstance(torch.empty(0), FakeTensor):
        return uses_gpu_form(device)
    return _device_sums_in_fp32(device, dtype)


@functools.cache
def _device_sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """By a product that is tried: torch has it for some devices only, and a wrong one is worse than none."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 64, generator=generator).to(device, dtype) for _ in range(2))
    out = torch.ones(64, 64, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(out, left, right, torch.float32, out=out)
        mm = torch.mm(left, right, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError):
        return False
    exact = left.double() @ right.double()
    error = torch.maximum((out - 1 - exact).abs().max(), (mm - exact).abs().max())
    return bool(error < 1e-3)  # rounded to bfloat16 it would be 0.1
