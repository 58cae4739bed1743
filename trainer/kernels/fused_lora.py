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

from trainer.kernels.device_branch import uses_gpu_form


def install(layers: Iterable[Any]) -> None:
    """Compute so these layers of peft, whose formula is this one (`trainer.model.lora.find_fusable_layers`)."""
    for layer in layers:
        layer.forward = MethodType(_make_forward(layer.forward), layer)


def _make_forward(peft_forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(layer: Any, x: Tensor) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return peft_forward(x)
        base_layer, (adapter_name,) = layer.base_layer, layer.active_adapters
        weight = base_layer.weight if isinstance(base_layer, Conv1D) else base_layer.weight.T
        lora_a, lora_b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        output: Tensor = FusedLoRALinear.apply(x, weight, base_layer.bias, lora_a, lora_b, layer.scaling[adapter_name])
        return output

    return forward


class FusedLoRALinear(torch.autograd.Function):
    """Under autocast all products are in its type, as they are for peft."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        """x [..., in], weight [in, out], bias [out], a [r, in], b [out, r] -> [..., out].

        Parameters: autograd functions take what they differentiate one by one.
        """
        device = x.device.type
        compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            inputs, down, up = (
                x.flatten(0, -2).to(compute_dtype),
                (lora_a * scaling).to(compute_dtype),
                lora_b.to(compute_dtype),
            )
            base_weight = weight.to(compute_dtype)
            if bias is None or uses_gpu_form(
                x.device
            ):  # a GPU's product adds a bias itself, and wants an even inner dimension
                low_rank = torch.mm(inputs, down.T)
                output = (
                    torch.mm(inputs, base_weight)
                    if bias is None
                    else torch.addmm(bias.to(compute_dtype), inputs, base_weight)
                )
                output.addmm_(low_rank, up.T)
            else:
                low_rank = inputs.new_ones(len(inputs), len(lora_a) + 1)
                torch.mm(inputs, down.T, out=low_rank[:, :-1])
                output = torch.mm(inputs, base_weight).addmm_(
                    low_rank, torch.cat((up, bias.to(compute_dtype)[:, None]), dim=1).T
                )
        ctx.save_for_backward(inputs, low_rank, weight, down, up)
        ctx.x_shape_dtype, ctx.scaling, ctx.dtypes = (x.shape, x.dtype), scaling, (lora_a.dtype, lora_b.dtype)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor, Tensor, None]:
        """Gradients of the inputs of `forward`, in its order."""
        inputs, low_rank, weight, down, up = ctx.saved_tensors
        shape, dtype = ctx.x_shape_dtype
        with torch.autocast(grad_output.device.type, enabled=False):
            grad_output = grad_output.flatten(0, -2).to(inputs.dtype)
            grad_low_rank = torch.mm(grad_output, up)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (
                    torch.mm(grad_output, weight.T.to(grad_output.dtype))
                    .addmm_(grad_low_rank, down)
                    .view(shape)
                    .to(dtype)
                )
            grad_bias = grad_output.sum(0) if ctx.needs_input_grad[2] else None
            grad_a = torch.mm(grad_low_rank.T, inputs).to(ctx.dtypes[0]) * ctx.scaling
            grad_b = torch.mm(low_rank[:, : up.shape[1]].T, grad_output)  # the other way round it takes twice as long
            # Laid out as the weight is: an optimizer of one kernel takes no other, and graphs hand it over as it is.
            grad_b = grad_b.to(ctx.dtypes[1]).T.contiguous()
        return grad_x, None, grad_bias, grad_a, grad_b, None
