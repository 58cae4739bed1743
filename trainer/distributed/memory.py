"""Bytes that one rank needs, before anything runs: model state by a formula, forward and backward by a count.

State: the ZeRO paper (Rajbhandari et al., arXiv 1910.02054, section 3), with weights and gradients in float32 (bf16 is
autocast; only fp16 holds half weights). Forward and backward: the model's own modules run on tensors without data; a
GPU's kernels are stood in for by operations that save the same tensors.
"""

import functools
import math
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from trainer.config.settings import Settings
from trainer.distributed.deepspeed_config import DeepSpeedFile, read_deepspeed_file
from trainer.distributed.execution import cast_frozen_weights, find_frozen_layers, holds_frozen_in_bf16
from trainer.distributed.process_group import DistContext
from trainer.model import attention, torch_internals
from trainer.model.build import TrainableModel, build_model
from trainer.model.loss import CausalLMLoss, simulate_gpu

DEFAULT_BUCKET_SIZE = 5 * 10**8  # elements; DeepSpeed's reduce_bucket_size where a file does not say
MAX_LIVE_PARAMETERS = 10**9  # elements; DeepSpeed's stage3_max_live_parameters, up to which weights stay gathered
CUDA_CONTEXT_BYTES = 600 * 2**20  # what CUDA's context, NCCL and cuBLAS take of a GPU beside the tensors
PROCESS_BASE_BYTES = 700 * 2**20  # what a CPU rank holds before it has a model: Python, torch, DeepSpeed
MAX_STATE_FRACTION = 0.5  # of a device's memory; model state beyond it is divided over the ranks
MAX_ESTIMATE_FRACTION = 0.9  # of a device's memory, for all that a single rank is estimated to hold
MAX_COUNTED_TOKENS = 4096  # of a CPU rank's micro-batch, which takes an operation for every few rows of logits


# --- the sum ---


class PassMemory(NamedTuple):
    """Bytes of one forward and backward beside weights and optimizer state."""

    saved: float = 0.0  #: what the forward leaves for its backward
    peak: float = 0.0  #: the most at one time, without gradients that have arrived at their weight
    peak_with_gradients: float = 0.0  #: the same with them
    cast_weights: float = 0.0  #: frozen weights that are held in bfloat16


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float  #: AdamW's two moments, and the float32 copy that ZeRO 1 to 3 keep of the weights
    host: float  #: weights, gradients and optimizer state that offload keeps in the host's memory instead
    activations: float  #: what a forward leaves for its backward
    gathered: float  #: weights that ZeRO-3 puts together for a pass
    passing: float  #: what comes and goes within a pass: logits, products, gradients on their way
    peak: float  #: the largest sum at one time: gradients are not there yet when the activations are at their most


def estimate_memory(
    model_info: Mapping[str, Any],
    passes: PassMemory,
    deepspeed_file: DeepSpeedFile,
    world_size: int,
    *,
    precision: str,
    is_gpu: bool,
) -> MemoryEstimate:
    """The memory of one rank while it trains. `model_info`: run.json's, where `parameters` are those of the base. Stage
    1 shards the optimizer's state, 2 the gradients too, 3 the weights too, frozen ones as well."""
    stage, width, trainable = deepspeed_file.stage, 2 if precision == "fp16" else 4, model_info["trainable"]
    all_weights = model_info.get("frozen_bytes", width * count_frozen(model_info)) + width * trainable
    all_weights -= 2 * passes.cast_weights  # in place of the float32 ones
    weights = all_weights / (world_size if stage == 3 else 1)
    gradients = width * trainable / (world_size if stage >= 2 else 1)
    optimizer = (8 * trainable) if stage == 0 else 12 * trainable / world_size
    host = gathered = 0.0
    if deepspeed_file.offloads_optimizer:  # DeepSpeed keeps the sharded gradients beside the optimizer
        host += optimizer + 4 * trainable / world_size
        optimizer, gradients = 0.0, (0.0 if stage >= 2 else gradients)
    if deepspeed_file.offloads_params:
        host, weights = host + weights, 0.0
    if stage == 3:
        gathered = min(all_weights, width * MAX_LIVE_PARAMETERS)
    if stage == 1 or (world_size == 1 and stage < (2 if is_gpu else 3)):  # gradients stay where the backward left them
        pass_bytes = passes.peak_with_gradients
    else:  # each moves to its place in a flat buffer: under stage 0 of all, else of this rank's share
        pass_bytes = passes.peak + gradients
    # For the flat weights of ZeRO, gradients are laid end to end, up to a bucket: under stage 1 all of them beside the
    # gradients, when they are reduced; then, and under stages 2 and 3, a rank's share.
    step_bytes = gradients
    if stage:
        zero = deepspeed_file.content["zero_optimization"]
        bucket_size = float(zero.get("reduce_bucket_size", DEFAULT_BUCKET_SIZE))
        step_bytes += width * min(trainable, bucket_size) / (1 if stage == 1 else world_size)
        # A GPU holds buckets of their whole size; of a CPU's only the pages that were written to take memory.
        if is_gpu and (zero.get("contiguous_gradients", True) or deepspeed_file.offloads_optimizer):
            pass_bytes += width * bucket_size * (2 if stage == 2 and zero.get("overlap_comm") else 1)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        host=host,
        activations=passes.saved,
        gathered=gathered,
        passing=max(0.0, pass_bytes - passes.saved),
        peak=weights + optimizer + max(gathered + pass_bytes, step_bytes),
    )


def count_frozen(model_info: Mapping[str, Any]) -> int:
    """Weights that are not trained; tied ones are counted once."""
    return int(model_info["parameters"]) - (0 if model_info["lora_targets"] else int(model_info["trainable"]))


def estimate_rank_memory(
    settings: Settings,
    dist_context: DistContext,
    model_info: Mapping[str, Any],
    deepspeed_file: DeepSpeedFile,
    *,
    precision: str,
    row_length: int,
    micro_batch_size: int,
) -> MemoryEstimate:
    """The memory of a rank of a run, with rows of `row_length` tokens; takes seconds for a setup that is new."""
    stage, world_size, is_gpu = deepspeed_file.stage, dist_context.world_size, dist_context.device.type == "cuda"
    passes = count_pass_memory(
        settings,
        micro_batch_size=micro_batch_size,
        row_length=row_length,
        accumulates=settings.train.global_batch > micro_batch_size * world_size,
        precision=precision,
        is_gpu=is_gpu,
        is_head_sharded=stage == 3,
        casts_frozen=holds_frozen_in_bf16(settings, precision=precision, stage=stage),
    )
    return estimate_memory(model_info, passes, deepspeed_file, world_size, precision=precision, is_gpu=is_gpu)


def required_bytes(
    estimate: MemoryEstimate, model_info: Mapping[str, Any], device: torch.device
) -> tuple[float, float]:
    """(bytes on the device, bytes of the host's memory beside them): for a CPU rank all is one."""
    if device.type == "cuda":
        return estimate.peak + CUDA_CONTEXT_BYTES, estimate.host
    unquantized_bytes = 4.0 * model_info["parameters"]  # in float32 before it is packed, in the same memory
    return max(estimate.peak + estimate.host, unquantized_bytes) + PROCESS_BASE_BYTES, 0.0


def choose_deepspeed_file(
    *,
    model_info: Mapping[str, Any],
    world_size: int,
    device_memory_bytes: float | None,
    precision: str,
    estimate_bytes: Callable[[DeepSpeedFile], float],
    stages: Container[int] = range(4),
) -> DeepSpeedFile:
    """The ZeRO file where the user named none, and why. `device_memory_bytes`: of the smallest device; None: not what
    decides, as for one rank on a CPU. `estimate_bytes`: of all that a rank holds on its device under a file. `stages`:
    those that the run's other flags allow."""
    candidates = [stage for stage in ((1, 2, 3) if precision == "fp16" else (0, 2, 3)) if stage in stages]
    files = [read_deepspeed_file(f"zero{stage}") for stage in candidates]
    first, limit_bytes = files[0], math.inf if device_memory_bytes is None else device_memory_bytes
    if world_size == 1:
        needed_bytes = estimate_bytes(first) if limit_bytes < math.inf and 2 in candidates else 0.0
        if needed_bytes <= MAX_ESTIMATE_FRACTION * limit_bytes:
            return replace(first, reason="one rank: there is nothing to shard")
        sizes = f"{needed_bytes / 2**30:.1f} of {limit_bytes / 2**30:.1f} GiB"
        return read_deepspeed_file("zero2_offload", f"{first.name} would take {sizes}: the optimizer moves to the host")
    state_bytes = {}
    for file in files:
        holds_bf16 = precision == "bf16" and "frozen_bytes" not in model_info and file.stage < 3
        passes = PassMemory(cast_weights=count_frozen(model_info) if holds_bf16 else 0)
        estimate = estimate_memory(model_info, passes, file, world_size, precision=precision, is_gpu=True)
        state_bytes[file.name] = estimate.weights + estimate.gradients + estimate.optimizer
    fitting = [file for file in files if state_bytes[file.name] <= MAX_STATE_FRACTION * limit_bytes]
    chosen, size = (fitting or files[-1:])[0], state_bytes[first.name]
    state = f"{size / 2**30:.1f} GiB of state" if size >= 2**29 else f"{size / 2**20:.0f} MiB of state"
    if chosen is not first:
        parts = "weights are sharded too" if chosen.stage == 3 else "gradients and optimizer state are sharded"
        return replace(chosen, reason=f"{state} do not fit in half of a device: {parts}")
    more = f"; --ds-config zero1 to {files[-1].name} shard it" if first.stage == 0 and len(files) > 1 else ""
    return replace(first, reason=f"{state} {'fit' if fitting else 'do not fit in half of a device'}{more}")


# --- the count ---


@functools.cache
def count_pass_memory(
    settings: Settings, *, micro_batch_size: int, row_length: int, accumulates: bool = False, **form: Any
) -> PassMemory:
    """The bytes of one forward and backward; takes seconds for a setup that is new. `accumulates`: whether gradients of
    an earlier micro-batch are there already; `form`: see `prepare_loss`."""
    small_size = max(1, MAX_COUNTED_TOKENS // (2 * row_length))
    if not form["is_gpu"] and micro_batch_size > 2 * small_size:  # by the growth from two small ones
        count = functools.partial(count_pass_memory, settings, row_length=row_length, accumulates=accumulates, **form)
        pairs = zip(count(micro_batch_size=small_size), count(micro_batch_size=2 * small_size), strict=True)
        return PassMemory(*(a + (micro_batch_size / small_size - 1) * (b - a) for a, b in pairs))
    with torch.random.fork_rng(devices=[]):
        model = build_model(settings, on_meta=True)
    loss_module, num_cast = prepare_loss(model, **form)
    with torch_internals.FakeTensorMode(allow_non_fake_inputs=True), simulate_gpu(form["is_gpu"]):
        materialize(loss_module)
        ids = torch.zeros(micro_batch_size, row_length, dtype=torch.long)
        with LiveBytes(loss_module) as live:
            for parameter in live.trained_params if accumulates else ():
                parameter.grad = torch.zeros_like(parameter)
                live.mark_gradient(parameter)
            loss_sum, _ = loss_module(ids, ids)
            saved_bytes = live.bytes - live.gradient_bytes
            loss_sum.backward()
    return PassMemory(saved_bytes, live.peak_bytes, live.peak_bytes_with_gradients, num_cast)


def prepare_loss(
    model: TrainableModel, *, precision: str, is_gpu: bool, is_head_sharded: bool = False, casts_frozen: bool = False
) -> tuple[CausalLMLoss, int]:
    """(the loss as the engine would run it, frozen weights that are held in bfloat16). `is_head_sharded`: as under ZeRO
    3; `casts_frozen`: whether a frozen base is held in bfloat16."""
    autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    if precision == "fp16":
        model.module.half()
    num_cast = sum(layer.weight.numel() for layer in cast_frozen_weights(model)) if casts_frozen else 0
    quant = model.quant_settings and model.quant_settings.quant
    for layer in find_frozen_layers(model) if quant else ():
        shape = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.T.shape  # [in, out]
        packed = functools.partial(_run_packed, shape, autocast_dtype or torch.float32, quant == "int8")
        layer.forward = packed
    if not is_gpu:
        attention.install_on_cpu(model.module, model.causal)
    else:
        attention.install_dropout(model.module, _GPUDropout)
        if model.causal.config._attn_implementation == attention.CAUSAL_NAME:
            AttentionInterface.register("count_gpu", _flash_attention)
            AttentionMaskInterface.register("count_gpu", attention.mask_unless_whole)
            model.causal.set_attn_implementation("count_gpu")
    loss_module = CausalLMLoss(model.causal, autocast_dtype).train()
    loss_module.is_head_sharded = is_head_sharded
    return loss_module, num_cast


def materialize(loss_module: CausalLMLoss, device: str = "cpu") -> None:
    """Put fake tensors of a device in the place of meta ones."""
    loss_module.to_empty(device=device)
    loss_module.causal.tie_weights()


def _run_packed(weight_shape: torch.Size, compute_dtype: torch.dtype, is_int8: bool, x: Tensor) -> Tensor:
    output: Tensor = _UnpackedMatmul.apply(x, weight_shape, compute_dtype, is_int8)
    return output if is_int8 else output.to(x.dtype)  # the 4-bit kinds answer in the type of their input


class _UnpackedMatmul(torch.autograd.Function):
    """A product with a weight that is unpacked for it and not kept, as bitsandbytes has it; int8 keeps its input."""

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
    """Bytes of the storages that operations made while it was on and that are still referenced. torch's own MemTracker
    knows one peak, of all categories together; under ZeRO 2 and 3 the peak without the gradients that have arrived at
    their weight is another moment."""

    def __init__(self, module: nn.Module):
        """What `module` holds already is not counted; what a backward leaves at its trained weights is a gradient."""
        super().__init__()
        self.bytes = self.gradient_bytes = 0  #: alive now; the second, which the first contains, lie at their weight
        self.peak_bytes = self.peak_bytes_with_gradients = 0
        storages = [t.untyped_storage() for t in (*module.parameters(), *module.buffers())]
        self._known: dict[int, Any] = {id(storage): storage for storage in storages}
        self._gradients: set[int] = set()
        self.trained_params = [p for p in module.parameters() if p.requires_grad]
        for parameter in self.trained_params:
            parameter.register_post_accumulate_grad_hook(self.mark_gradient)

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, Sequence) else (result,):
            if isinstance(output, Tensor) and id(storage := output.untyped_storage()) not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, num_bytes = id(storage), storage.nbytes()

        def subtract(_: Any) -> None:
            del self._known[key]
            self.bytes -= num_bytes
            self.gradient_bytes -= num_bytes * (key in self._gradients)
            self._gradients.discard(key)

        self._known[key] = weakref.ref(storage, subtract)
        self.bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes - self.gradient_bytes)
        self.peak_bytes_with_gradients = max(self.peak_bytes_with_gradients, self.bytes)

    def mark_gradient(self, parameter: nn.Parameter) -> None:
        """Count the gradient that lies at a weight as one from now on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if id(storage) not in self._gradients:
            self._gradients.add(id(storage))
            self.gradient_bytes += storage.nbytes()
