"""Bytes that forward and backward hold, counted operation by operation under FakeTensorMode.

The model's own modules run on tensors that have shapes and no data, so this takes neither memory nor the device that it
counts for: a GPU's kernels are stood in for by operations that save the same tensors. Weights and optimizer state are
not in it; `trainer.distributed.memory_estimate` adds them.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from trainer.distributed.frozen_bf16 import cast_frozen_weights, find_frozen_layers
from trainer.distributed.memory_estimate import PassMemory
from trainer.model import attention, cpu_attention, torch_internals
from trainer.model.build import TrainableModel
from trainer.model.loss import CausalLMLoss, simulate_gpu

_CPU_ATTENTION, _GPU_ATTENTION = "memory_count_cpu", "memory_count_gpu"  # among transformers' own


@dataclass(frozen=True, kw_only=True)
class PassSetup:
    """How one rank runs a forward and backward."""

    micro_batch_size: int  #: rows
    sequence_length: int  #: tokens of a row
    precision: str
    is_gpu: bool
    is_zero3: bool = False  #: whether the output layer's weight is sharded, and its loss not fused with it
    casts_frozen_weights: bool = False  #: whether a frozen base is held in bfloat16
    accumulates: bool = False  #: whether gradients of an earlier micro-batch are there already


def count_pass_memory(build: Callable[[], TrainableModel], setup: PassSetup) -> PassMemory:
    """The bytes of one forward and backward; takes a second or two for GPT-2 124M.

    `build` makes the model on the meta device. The random state is afterwards what it was before.
    """
    with torch.random.fork_rng(devices=[]):
        model = build()
    loss_module, num_cast = prepare_loss(model, setup)
    with torch_internals.FakeTensorMode(allow_non_fake_inputs=True), simulate_gpu(setup.is_gpu):
        materialize(loss_module)
        ids = torch.zeros(setup.micro_batch_size, setup.sequence_length, dtype=torch.long)
        with LiveBytes(loss_module) as live:
            for parameter in live.trained_params if setup.accumulates else ():
                parameter.grad = torch.zeros_like(parameter)
                live.mark_gradient(parameter)
            loss_sum, _ = loss_module(ids, ids)
            saved_bytes = live.bytes
            loss_sum.backward()
    return PassMemory(
        saved=saved_bytes,
        peak=live.peak_bytes,
        peak_with_gradients=live.peak_bytes_with_gradients,
        cast_weights=num_cast,
    )


def prepare_loss(model: TrainableModel, setup: PassSetup) -> tuple[CausalLMLoss, int]:
    """(the loss as the engine would run it, frozen weights that are held in bfloat16)."""
    autocast_dtype = torch.bfloat16 if setup.precision == "bf16" else None
    num_cast = 0
    if setup.precision == "fp16":
        model.module.half()
    if setup.casts_frozen_weights:
        num_cast = sum(layer.weight.numel() for layer in cast_frozen_weights(model))
    if model.quant_settings is not None:
        _pack(model, autocast_dtype or torch.float32)
    _install_attention(model.causal, is_gpu=setup.is_gpu)
    cpu_attention.install_dropout(model.module, _GPUDropout if setup.is_gpu else None)
    loss_module = CausalLMLoss(model.causal, autocast_dtype).train()
    loss_module.is_head_sharded = setup.is_zero3
    return loss_module, num_cast


def materialize(module: nn.Module, device: str = "cpu") -> None:
    """Put fake tensors of a device in the place of meta ones; what was one tensor stays one."""
    fakes: dict[int, Tensor] = {}
    for child in module.modules():
        for name, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
            if id(tensor) not in fakes:
                fake = torch.empty_like(tensor, device=device, requires_grad=False)
                is_parameter = isinstance(tensor, nn.Parameter)
                fakes[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
            setattr(child, name, fakes[id(tensor)])


def _pack(model: TrainableModel, compute_dtype: torch.dtype) -> None:
    """Put stand-ins in the place of the frozen layers that `trainer.model.quantization` would pack."""
    is_int8 = model.quant_settings is not None and model.quant_settings.quant == "int8"
    frozen_layers = set(find_frozen_layers(model))
    for name, layer in list(model.module.named_modules()):
        if layer in frozen_layers:
            model.module.set_submodule(name, _PackedLinear(layer, compute_dtype, is_int8=is_int8))


class _PackedLinear(nn.Module):
    """A layer whose weight is unpacked for each product and not kept, as bitsandbytes has it.

    The 4-bit kinds answer in the type of their input; int8 keeps its input.
    """

    def __init__(self, layer: Any, compute_dtype: torch.dtype, *, is_int8: bool):
        super().__init__()
        in_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
        self.in_features, self.out_features = in_out
        self.compute_dtype, self.is_int8 = compute_dtype, is_int8

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight_shape = (self.in_features, self.out_features)
        output: Tensor = _UnpackedMatmul.apply(x, weight_shape, self.compute_dtype, self.is_int8)
        return output if self.is_int8 else output.to(x.dtype)


class _UnpackedMatmul(torch.autograd.Function):
    """The weight is unpacked again for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_shape: tuple[int, int], compute_dtype: torch.dtype, keeps_input: bool
    ) -> Tensor:
        ctx.save_for_backward(*([x] if keeps_input else []))
        ctx.weight_shape, ctx.dtypes = weight_shape, (compute_dtype, x.dtype)
        return x.to(compute_dtype) @ x.new_empty(weight_shape, dtype=compute_dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        compute_dtype, input_dtype = ctx.dtypes
        grad_x = grad_output.to(compute_dtype) @ grad_output.new_empty(ctx.weight_shape, dtype=compute_dtype).T
        return grad_x.to(input_dtype), None, None, None


def _install_attention(causal: PreTrainedModel, *, is_gpu: bool) -> None:
    """Attention without a mask: for fake tensors transformers would make one, which a run on whole rows does not."""
    config: Any = causal.config
    if config._attn_implementation not in ("sdpa", attention.ATTENTION_NAME):
        return
    name, forward = (_GPU_ATTENTION, _flash_attention) if is_gpu else (_CPU_ATTENTION, _cpu_attention)
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    causal.set_attn_implementation(name)


def _cpu_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    config: Any = getattr(module, "config", None)
    is_blockwise = getattr(config, "model_type", "") == "gpt2"
    forward = cpu_attention.blockwise_attention_forward if is_blockwise else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **kwargs)


def _flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What a GPU's flash kernel keeps: its inputs, its output and one float32 for each row of scores."""
    num_groups = getattr(module, "num_key_value_groups", 1)
    if num_groups > 1:
        key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    flash = torch_internals.flash_attention
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    return flash(query, key, value, dropout, True, False, scale=scale)[0].transpose(1, 2).contiguous(), None


class _GPUDropout(nn.Dropout):
    """One kernel with a mask of bytes, as on a GPU; CPU tensors would keep a mask of their own type."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.native_dropout(input, self.p, True)[0]


class LiveBytes(torch_internals.TorchDispatchMode):
    """Bytes of the storages that operations made while it was on and that are still referenced.

    torch's own MemTracker knows one peak, of all categories together; under ZeRO 2 and 3 the peak without the gradients
    that have arrived at their weight is another moment.
    """

    def __init__(self, module: nn.Module):
        """What `module` holds already is not counted; what a backward leaves at its trained weights is a gradient."""
        super().__init__()
        self.bytes = self.gradient_bytes = 0  #: alive now: gradients that lie at their weight apart from all else
        self.peak_bytes = self.peak_bytes_with_gradients = 0
        storages = [t.untyped_storage() for t in (*module.parameters(), *module.buffers())]
        self._own = {id(storage): storage for storage in storages}
        self._live: dict[int, weakref.ref[Any]] = {}
        self._gradients: set[int] = set()
        self.trained_params = [p for p in module.parameters() if p.requires_grad]
        for parameter in self.trained_params:
            parameter.register_post_accumulate_grad_hook(self.mark_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, Sequence) else (result,):
            if isinstance(output, Tensor):
                self._add(output.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._live or key in self._own:
            return

        def subtract(_: Any) -> None:
            del self._live[key]
            if key in self._gradients:
                self._gradients.remove(key)
                self.gradient_bytes -= num_bytes
            else:
                self.bytes -= num_bytes

        self._live[key] = weakref.ref(storage, subtract)
        self.bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        self.peak_bytes_with_gradients = max(self.peak_bytes_with_gradients, self.bytes + self.gradient_bytes)

    def mark_gradient(self, parameter: nn.Parameter) -> None:
        """Count the gradient that lies at a weight as one from now on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if id(storage) in self._live and id(storage) not in self._gradients:
            self._gradients.add(id(storage))
            self.bytes -= storage.nbytes()
            self.gradient_bytes += storage.nbytes()
