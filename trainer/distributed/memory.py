"""Bytes that one rank needs, before anything runs: model state by a formula, forward and backward by a count.

State: the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3), with weights and gradients in float32, which is
how this program trains (bf16 is autocast; only fp16 holds half weights).
Forward and backward: the model's own modules run on tensors that have shapes and no data, which takes neither memory
nor the device that is counted for: a GPU's kernels are stood in for by operations that save the same tensors.
"""

import functools
import math
import weakref
from collections.abc import Callable, Container, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from trainer.config.settings import Settings
from trainer.distributed.deepspeed_config import DeepSpeedFile, read_deepspeed_file
from trainer.distributed.execution import cast_frozen_weights, find_frozen_layers, make_execution_plan
from trainer.distributed.process_group import DistContext
from trainer.model import attention, cpu_attention, torch_internals
from trainer.model.build import TrainableModel, build_model
from trainer.model.loss import CausalLMLoss, simulate_gpu

MAX_LIVE_PARAMETERS = 10**9  # elements; DeepSpeed's stage3_max_live_parameters, up to which weights stay gathered
REDUCE_BUCKET_SIZE = 5 * 10**8  # elements; DeepSpeed's reduce_bucket_size
CUDA_CONTEXT_BYTES = 600 * 2**20  # what CUDA's context, NCCL and cuBLAS take of a GPU beside the tensors
MAX_STATE_FRACTION = 0.5  # of a device's memory; model state beyond it is divided over the ranks
MAX_ESTIMATE_FRACTION = 0.9  # of a device's memory, for all that a single rank is estimated to hold
PROCESS_BASE_BYTES = 700 * 2**20  # what a CPU rank holds before it has a model: Python, torch, DeepSpeed
MAX_COUNTED_TOKENS = 4096  # of a CPU rank's micro-batch, which takes an operation for every few rows of logits


# --- the sum ---


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Weights by what training does to them; tied ones are counted once."""

    frozen: int
    trainable: int
    quantized_bytes: int | None = None  #: of the frozen ones in a quantised base; None: they are not packed

    @classmethod
    def from_model_info(cls, model_info: dict[str, Any]) -> "ParamCounts":
        """From run.json's block `model_info`, where `parameters` are those of the base, without adapters."""
        trainable, parameters = model_info["trainable"], model_info["parameters"]
        return cls(
            frozen=parameters if model_info["lora_targets"] else parameters - trainable,
            trainable=trainable,
            quantized_bytes=model_info.get("frozen_bytes"),
        )

    def weight_bytes(self, bytes_per_weight: int) -> int:
        """Of all weights, with `bytes_per_weight` for each that is not packed."""
        frozen_bytes = bytes_per_weight * self.frozen if self.quantized_bytes is None else self.quantized_bytes
        return frozen_bytes + bytes_per_weight * self.trainable


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """Bytes of one forward and backward beside weights and optimizer state."""

    saved: float  #: what the forward leaves for its backward
    peak: float  #: the most at one time, without gradients that have arrived at their weight
    peak_with_gradients: float  #: the same with them
    cast_weights: int = 0  #: frozen weights that are held in bfloat16


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Bytes of what lives from step to step on one rank; `host` is what offload keeps in the host's memory instead."""

    weights: float
    gradients: float
    optimizer: float  #: AdamW's two moments, and the float32 copy that ZeRO 1 to 3 keep of the weights
    host: float = 0.0

    @property
    def total(self) -> float:
        """On the device."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank by what they are for."""

    model_states: ModelStates
    activations: float  #: what a forward leaves for its backward
    gathered: float  #: weights that ZeRO-3 puts together for a pass
    forward_backward: float  #: the most that forward and backward hold beside weights and optimizer state
    optimizer_step: float  #: the most that the step holds beside them

    @property
    def passing(self) -> float:
        """What comes and goes within a forward and backward: logits, products, gradients on their way."""
        return max(0.0, self.forward_backward - self.activations - self.gathered)

    @property
    def peak(self) -> float:
        """The largest sum at one time: gradients are not there yet when the activations are at their most."""
        states = self.model_states
        return states.weights + states.optimizer + max(self.forward_backward, self.optimizer_step)


def estimate_model_states(
    counts: ParamCounts, deepspeed_file: DeepSpeedFile, world_size: int, *, precision: str
) -> ModelStates:
    """State per rank: stage 1 shards the optimizer's, 2 the gradients too, 3 the weights too, frozen ones as well.

    Frozen weights count in float32, also where bf16 halves most of them (`choose_deepspeed_file`, `estimate_memory`).
    """
    bytes_per_weight = 2 if precision == "fp16" else 4
    num_trainable, stage = counts.trainable, deepspeed_file.stage
    weights = counts.weight_bytes(bytes_per_weight) / (world_size if stage == 3 else 1)
    gradients = bytes_per_weight * num_trainable / (world_size if stage >= 2 else 1)
    optimizer = (8 * num_trainable) if stage == 0 else 12 * num_trainable / world_size
    host = 0.0
    if deepspeed_file.offloads_optimizer:  # DeepSpeed keeps the sharded gradients beside the optimizer
        host += optimizer + 4 * num_trainable / world_size
        optimizer, gradients = 0.0, (0.0 if stage >= 2 else gradients)
    if deepspeed_file.offloads_params:
        host, weights = host + weights, 0.0
    return ModelStates(weights=weights, gradients=gradients, optimizer=optimizer, host=host)


def estimate_memory(
    counts: ParamCounts,
    passes: PassMemory,
    deepspeed_file: DeepSpeedFile,
    world_size: int,
    *,
    precision: str,
    accumulates: bool,
) -> MemoryEstimate:
    """The memory of one rank while it trains, without what the program takes (of a GPU: CUDA_CONTEXT_BYTES)."""
    states = estimate_model_states(counts, deepspeed_file, world_size, precision=precision)
    states = replace(states, weights=states.weights - 2 * passes.cast_weights)  # in place of the float32 ones
    stage, bytes_per_weight = deepspeed_file.stage, 2 if precision == "fp16" else 4
    gathered_bytes = 0.0
    if stage == 3:
        gathered_bytes = min(counts.weight_bytes(bytes_per_weight), bytes_per_weight * MAX_LIVE_PARAMETERS)
    if stage == 1 or (world_size == 1 and stage < 3):  # every gradient stays where the backward left it
        pass_bytes = passes.peak_with_gradients
    elif stage == 0:  # each moves to its place in a flat buffer that is always there
        pass_bytes = passes.peak + states.gradients
    else:  # this rank's share of them: of earlier micro-batches, and the buffer that ZeRO-3 keeps
        pass_bytes = passes.peak + (states.gradients if accumulates or stage == 3 else 0.0)
    # For the flat weights of ZeRO, gradients are laid end to end, up to a bucket: under stage 1 all of them beside the
    # gradients, when they are reduced; then, and under stages 2 and 3, a rank's share.
    step_bytes = states.gradients
    if stage:
        flat_bytes = bytes_per_weight * float(min(counts.trainable, REDUCE_BUCKET_SIZE))
        step_bytes += flat_bytes / (1 if stage == 1 else world_size)
    return MemoryEstimate(
        model_states=states,
        activations=passes.saved,
        gathered=gathered_bytes,
        forward_backward=gathered_bytes + pass_bytes,
        optimizer_step=step_bytes,
    )


def estimate_rank_memory(
    settings: Settings,
    dist_context: DistContext,
    model_info: dict[str, Any],
    deepspeed_file: DeepSpeedFile,
    *,
    precision: str,
    model_dropout: float,
    row_length: int,
    micro_batch_size: int,
) -> MemoryEstimate:
    """The memory of a rank of a run under a ZeRO file, with rows of `row_length` tokens.

    Takes a few seconds for a setup that was not asked about before.
    """
    world_size = dist_context.world_size
    execution = make_execution_plan(
        settings, dist_context, stage=deepspeed_file.stage, precision=precision, model_dropout=model_dropout
    )
    setup = PassSetup(
        micro_batch_size=micro_batch_size,
        sequence_length=row_length,
        precision=precision,
        is_gpu=dist_context.device.type == "cuda",
        is_zero3=deepspeed_file.stage == 3,
        casts_frozen_weights=execution.frozen_dtype == "bfloat16",
        accumulates=settings.train.global_batch > micro_batch_size * world_size,
    )
    return estimate_memory(
        ParamCounts.from_model_info(model_info),
        pass_memory(settings, setup),
        deepspeed_file,
        world_size,
        precision=precision,
        accumulates=setup.accumulates,
    )


def required_bytes(estimate: MemoryEstimate, num_parameters: int, device: torch.device) -> tuple[float, float]:
    """(bytes on the device, bytes of the host's memory beside them): for a CPU rank all is one."""
    if device.type == "cuda":
        return estimate.peak + CUDA_CONTEXT_BYTES, estimate.model_states.host
    unquantized_bytes = 4.0 * num_parameters  # in float32 before it is packed, in the same memory
    return max(estimate.peak + estimate.model_states.host, unquantized_bytes) + PROCESS_BASE_BYTES, 0.0


def choose_deepspeed_file(
    *,
    counts: ParamCounts,
    world_size: int,
    device_memory_bytes: float | None,
    precision: str,
    estimate_bytes: Callable[[DeepSpeedFile], float],
    stages: Container[int] = range(4),
) -> DeepSpeedFile:
    """The ZeRO file where the user named none, and why.

    `device_memory_bytes`: of the smallest device; None: not what decides, as for one rank on a CPU. `estimate_bytes`:
    of all that a rank holds on its device under a file. `stages`: those that the run's other flags allow.
    """
    frozen_bytes = counts.frozen * (2 if precision == "bf16" and counts.quantized_bytes is None else 0)
    candidates = [stage for stage in ((1, 2, 3) if precision == "fp16" else (0, 2, 3)) if stage in stages]
    files = [read_deepspeed_file(f"zero{stage}") for stage in candidates]
    first = files[0]
    if world_size == 1:
        needed_bytes = 0.0 if device_memory_bytes is None or 2 not in candidates else estimate_bytes(first)
        if device_memory_bytes is None or needed_bytes <= MAX_ESTIMATE_FRACTION * device_memory_bytes:
            return replace(first, reason="one rank: there is nothing to shard")
        sizes = f"{needed_bytes / 2**30:.1f} of {device_memory_bytes / 2**30:.1f} GiB"
        return read_deepspeed_file("zero2_offload", f"{first.name} would take {sizes}: the optimizer moves to the host")
    state_bytes = [
        estimate_model_states(counts, file, world_size, precision=precision).total
        - (frozen_bytes if file.stage < 3 else 0)  # held in bfloat16, where frozen and not sharded
        for file in files
    ]
    max_bytes = math.inf if device_memory_bytes is None else MAX_STATE_FRACTION * device_memory_bytes
    fitting = [file for file, size in zip(files, state_bytes, strict=True) if size <= max_bytes]
    chosen, size = (fitting or files[-1:])[0], state_bytes[0]
    state = f"{size / 2**30:.1f} GiB of state" if size >= 2**29 else f"{size / 2**20:.0f} MiB of state"
    if chosen is not first:
        parts = "weights are sharded too" if chosen.stage == 3 else "gradients and optimizer state are sharded"
        return replace(chosen, reason=f"{state} do not fit in half of a device: {parts}")
    more = f"; --ds-config zero1 to {files[-1].name} shard it" if first.stage == 0 and len(files) > 1 else ""
    return replace(first, reason=f"{state} {'fit' if fitting else 'do not fit in half of a device'}{more}")


# --- the count ---


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


@functools.cache
def pass_memory(settings: Settings, setup: PassSetup) -> PassMemory:
    """The bytes of a forward and backward; of a large micro-batch on a CPU by the growth from two small ones."""
    small_size = max(1, MAX_COUNTED_TOKENS // (2 * setup.sequence_length))
    if setup.is_gpu or setup.micro_batch_size <= 2 * small_size:
        return count_pass_memory(settings, setup)
    small, large = (
        asdict(pass_memory(settings, replace(setup, micro_batch_size=size))) for size in (small_size, 2 * small_size)
    )
    factor = (setup.micro_batch_size - small_size) / small_size
    return PassMemory(**{name: value + factor * (large[name] - value) for name, value in small.items()})


def count_pass_memory(settings: Settings, setup: PassSetup) -> PassMemory:
    """The bytes of one forward and backward; takes a second or two for GPT-2 124M.

    The random state is afterwards what it was before.
    """
    with torch.random.fork_rng(devices=[]):
        model = build_model(settings, on_meta=True)
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
        frozen_layers, is_int8 = set(find_frozen_layers(model)), model.quant_settings.quant == "int8"
        for name, layer in list(model.module.named_modules()):
            if layer in frozen_layers:
                packed = _PackedLinear(layer, autocast_dtype or torch.float32, is_int8=is_int8)
                model.module.set_submodule(name, packed)
    config: Any = model.causal.config
    if config._attn_implementation in ("sdpa", attention.ATTENTION_NAME):
        # Without a mask: for fake tensors transformers would make one, which a run on whole rows does not.
        name, forward = ("count_gpu", _flash_attention) if setup.is_gpu else ("count_cpu", _cpu_attention)
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, lambda *_, **__: None)
        model.causal.set_attn_implementation(name)
    cpu_attention.install_dropout(model.module, _GPUDropout if setup.is_gpu else cpu_attention.Dropout)
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


class _PackedLinear(nn.Module):
    """A layer whose weight is unpacked for each product and not kept, as bitsandbytes has it.

    The 4-bit kinds answer in the type of their input; int8 keeps its input.
    """

    def __init__(self, layer: Any, compute_dtype: torch.dtype, *, is_int8: bool):
        super().__init__()
        self.weight_shape = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]  # [in, out]
        self.in_features, self.out_features = self.weight_shape
        self.compute_dtype, self.is_int8 = compute_dtype, is_int8

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        output: Tensor = _UnpackedMatmul.apply(x, self.weight_shape, self.compute_dtype, self.is_int8)
        return output if self.is_int8 else output.to(x.dtype)


class _UnpackedMatmul(torch.autograd.Function):
    """The weight is unpacked again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_shape: torch.Size, compute_dtype: torch.dtype, keeps_input: bool) -> Tensor:
        ctx.save_for_backward(*([x] if keeps_input else []))
        ctx.weight_shape, ctx.dtypes = weight_shape, (compute_dtype, x.dtype)
        return x.to(compute_dtype) @ x.new_empty(weight_shape, dtype=compute_dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        compute_dtype, input_dtype = ctx.dtypes
        grad_x = grad_output.to(compute_dtype) @ grad_output.new_empty(ctx.weight_shape, dtype=compute_dtype).T
        return grad_x.to(input_dtype), None, None, None


def _cpu_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    is_blockwise = getattr(getattr(module, "config", None), "model_type", "") == "gpt2"
    forward = cpu_attention.blockwise_attention_forward if is_blockwise else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **kwargs)


def _flash_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What a GPU's flash kernel keeps: its inputs, its output and one float32 for each row of scores."""
    num_groups = getattr(module, "num_key_value_groups", 1)
    if num_groups > 1:
        key, value = (tensor.repeat_interleave(num_groups, dim=1) for tensor in (key, value))
    dropout, scale = options.get("dropout", 0.0), options.get("scaling")
    output = torch_internals.flash_attention(query, key, value, dropout, True, False, scale=scale)[0]
    return output.transpose(1, 2).contiguous(), None


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

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
