"""A frozen layer and its adapter as one operation: y = x W + b + s (x A') B' (Hu et al., arXiv 2106.09685).

peft makes both products apart, scales the second and adds it: as many passes over memory again as the layer itself
needs. Here the second is added while it is made, and on a processor the bias with it, as one more column of the inner
dimension. What is kept for the backward is the input and x A'.
"""

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

BIAS_AS_A_COLUMN = "cpu"  # where: a GPU's product adds a bias itself, and wants an even inner dimension


def install(layers: Iterable[Any]) -> None:
    """Compute so these layers of peft, whose formula is this one (`trainer.model.lora.plain_layers`)."""
    for layer in layers:
        layer.forward = MethodType(_forward(layer.forward), layer)


def _forward(pefts: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(layer: Any, x: Tensor) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return pefts(x)
        base, (name,) = layer.base_layer, layer.active_adapters
        weight = base.weight if isinstance(base, Conv1D) else base.weight.T
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        made: Tensor = _Adapted.apply(x, weight, base.bias, a, b, layer.scaling[name])
        return made

    return forward


class _Adapted(torch.autograd.Function):
    """Under autocast all products are in its type, as they are for peft."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """x [..., in], weight [in, out], bias [out], a [r, in], b [out, r] -> [..., out]."""
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            rows, down, up = x.flatten(0, -2).to(low), (a * scaling).to(low), b.to(low)
            matrix = weight.to(low)
            if bias is None or device != BIAS_AS_A_COLUMN:
                inner = torch.mm(rows, down.T)
                made = torch.mm(rows, matrix) if bias is None else torch.addmm(bias.to(low), rows, matrix)
                made.addmm_(inner, up.T)
            else:
                inner = rows.new_ones(len(rows), len(a) + 1)
                torch.mm(rows, down.T, out=inner[:, :-1])
                made = torch.mm(rows, matrix).addmm_(inner, torch.cat((up, bias.to(low)[:, None]), dim=1).T)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.x, ctx.scaling, ctx.dtypes = (x.shape, x.dtype), scaling, (a.dtype, b.dtype)
        return made.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor, Tensor, None]:
        rows, inner, weight, down, up = ctx.saved_tensors
        shape, dtype = ctx.x
        with torch.autocast(by.device.type, enabled=False):
            by = by.flatten(0, -2).to(rows.dtype)
            to_inner = torch.mm(by, up)
            to_x = None
            if ctx.needs_input_grad[0]:
                to_x = torch.mm(by, weight.T.to(by.dtype)).addmm_(to_inner, down).view(shape).to(dtype)
            to_bias = by.sum(0) if ctx.needs_input_grad[2] else None
            to_a = torch.mm(to_inner.T, rows).to(ctx.dtypes[0]) * ctx.scaling
            to_b = torch.mm(inner[:, : up.shape[1]].T, by)  # the other way round it takes twice as long
            # Laid out as the weight is: an optimizer of one kernel takes no other, and graphs hand it over as it is.
            to_b = to_b.to(ctx.dtypes[1]).T.contiguous()
        return to_x, None, to_bias, to_a, to_b, None
