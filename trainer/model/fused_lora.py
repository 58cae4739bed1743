"""A frozen layer and its adapter as one operation: y = x W + b + s (x A') B' (Hu et al., arXiv 2106.09685).

peft makes both products apart, scales the second and adds it: as many passes over memory again as the layer itself
needs. Here the second is added while it is made, and on a processor the bias with it, as one more column of the inner
dimension. What is kept for the backward is the input and x A'.

Gain (`launch/bench.py kernels`, one thread of an AMD EPYC): 1.06 times (1.01 to 1.17) over peft's layer; on a GPU 827
operations a step for 1,198 (`launch/bench.py operations`), not measured.
"""

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from trainer.model.loss import matmul_fp32, uses_gpu_form


def install(layers: Sequence[Any], base_model: nn.Module) -> None:
    """Compute so these layers of peft, whose formula is this one (`trainer.model.lora.find_fusable_layers`).

    `base_model`: within whose forward they are called.
    """
    casts = LowRankCasts(layers)
    base_model.register_forward_pre_hook(casts.renew)
    for layer in layers:
        layer.forward = MethodType(_make_forward(layer.forward, casts), layer)


class LowRankCasts:
    """The small weights of all adapted layers in autocast's type, made at the beginning of a forward, all at once.

    On a GPU only, where five tiny kernels a layer would cost more than their bytes.
    """

    def __init__(self, layers: Sequence[Any]):
        self.layers = layers
        # By layer its A times its scale, its B, and its bias if it has one; for good, since recorded steps write here.
        self._buffers: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._are_current = False

    def of(self, layer: Any) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """(A times its scale, B, bias) of a layer, None where this forward has none made."""
        return self._buffers.get(id(layer)) if self._are_current else None

    @torch.no_grad()
    def renew(self, *unused: Any) -> None:
        """A hook of the base model's forward."""
        weights = [_layer_weights(layer) for layer in self.layers]
        device = weights[0][0].device if weights else torch.device("cpu")
        self._are_current = uses_gpu_form(device) and torch.is_autocast_enabled(device.type)
        if not self._are_current:
            return
        dtype = torch.get_autocast_dtype(device.type)
        scaled = torch._foreach_mul([a for a, _, _, _ in weights], [scaling for _, _, _, scaling in weights])
        sources, targets = [], []
        for layer, a, (_, b, bias, _) in zip(self.layers, scaled, weights, strict=True):
            if id(layer) not in self._buffers:
                bias_copy = None if bias is None else torch.empty_like(bias, dtype=dtype)
                self._buffers[id(layer)] = torch.empty_like(a, dtype=dtype), torch.empty_like(b, dtype=dtype), bias_copy
            for source, target in zip((a, b, bias), self._buffers[id(layer)], strict=True):
                if source is not None:
                    sources.append(source)
                    targets.append(target)
        torch._foreach_copy_(targets, sources)


def _layer_weights(layer: Any) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """A [r, in], B [out, r], bias [out] and scale of an adapted layer."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.base_layer.bias, layer.scaling[name]


def _make_forward(peft_forward: Callable[..., Tensor], casts: LowRankCasts) -> Callable[..., Tensor]:
    def forward(layer: Any, x: Tensor) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return peft_forward(x)
        base_layer = layer.base_layer
        weight = base_layer.weight if isinstance(base_layer, Conv1D) else base_layer.weight.T
        lora_a, lora_b, bias, scaling = _layer_weights(layer)
        low_rank_casts = casts.of(layer)
        output: Tensor = FusedLoRALinear.apply(x, weight, bias, lora_a, lora_b, scaling, low_rank_casts)
        return output

    return forward


class FusedLoRALinear(torch.autograd.Function):
    """Under autocast all products are in its type, as they are for peft."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        casts: tuple[Tensor, Tensor, Tensor | None] | None,
    ) -> Tensor:
        """x [..., in], weight [in, out], bias [out], a [r, in], b [out, r] -> [..., out].

        `casts`: a times `scaling`, b and the bias in autocast's type, where they are there already.

        Parameters: autograd functions take what they differentiate one by one.
        """
        device = x.device.type
        compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            inputs = x.flatten(0, -2).to(compute_dtype)
            down, up, bias = casts or (
                (lora_a * scaling).to(compute_dtype),
                lora_b.to(compute_dtype),
                None if bias is None else bias.to(compute_dtype),
            )
            base_weight = weight.to(compute_dtype)
            if bias is None or uses_gpu_form(
                x.device
            ):  # a GPU's product adds a bias itself, and wants an even inner dimension
                low_rank = torch.mm(inputs, down.T)
                output = torch.mm(inputs, base_weight) if bias is None else torch.addmm(bias, inputs, base_weight)
                output.addmm_(low_rank, up.T)
            else:
                low_rank = torch.cat((torch.mm(inputs, down.T), inputs.new_ones(len(inputs), 1)), dim=1)
                output = torch.mm(inputs, base_weight).addmm_(low_rank, torch.cat((up, bias[:, None]), dim=1).T)
        ctx.save_for_backward(inputs, low_rank, weight, down, up)
        ctx.x_shape_dtype, ctx.scaling, ctx.dtypes = (x.shape, x.dtype), scaling, (lora_a.dtype, lora_b.dtype)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
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
            grad_a = _product(grad_low_rank.T, inputs, ctx.dtypes[0]) * ctx.scaling
            # Laid out as the weight is: an optimizer of one kernel takes no other, and graphs hand it over as it is.
            if uses_gpu_form(grad_output.device):
                grad_b = _product(grad_output.T, low_rank, ctx.dtypes[1])
            else:  # the other way round, in half the time on a processor
                grad_b = _product(low_rank[:, : up.shape[1]].T, grad_output, ctx.dtypes[1]).T.contiguous()
        return grad_x, None, grad_bias, grad_a, grad_b, None, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return matmul_fp32(left, right) if dtype == torch.float32 else torch.mm(left, right).to(dtype)
