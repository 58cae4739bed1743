"""What a plan needs of a device's memory by formula (`trainer.distributed.memory_estimate`), and what there is."""

from dataclasses import replace

import psutil

from trainer.distributed import memory_estimate
from trainer.distributed.deepspeed_config import DeepSpeedFile
from trainer.distributed.frozen_bf16 import should_cast_frozen_weights
from trainer.distributed.memory_estimate import MemoryEstimate, ModelDims, ParamCounts, Workload
from trainer.distributed.process_group import device_memory_bytes
from trainer.kernels.linear_cross_entropy import MAX_LOGITS_BYTES
from trainer.model.build import load_config
from trainer.training.run_plan import RunPlan

PROCESS_BASE_BYTES = (
    700 * 2**20
)  # bytes; what a rank on a processor holds before it has a model: Python, torch, DeepSpeed


def build_workload(plan: RunPlan, sequence_length: int, micro_batch_size: int | None = None) -> Workload:
    """What a rank feeds in one forward; `sequence_length`: tokens of the longest row, `micro_batch_size`: another
    micro-batch."""
    settings, is_lora = plan.settings, plan.settings.mode == "lora"
    micro_batch_size = micro_batch_size or plan.schedule.batch.micro_batch_size
    return Workload(
        micro_batch_size=micro_batch_size, sequence_length=sequence_length,
        gradient_accumulation_steps=plan.schedule.batch.global_batch
        // (micro_batch_size * plan.dist_context.world_size),
        precision=plan.precision, is_gpu=plan.dist_context.device.type == "cuda",
        is_single_node_cpu=plan.dist_context.is_single_node_cpu,
        dropout=plan.dropout,
        lora_rank=settings.lora.rank if is_lora else 0, lora_dropout=settings.lora.dropout,
        lora_target_modules=tuple(plan.model_info["lora_targets"]), quant=settings.model.quant,
        activation_checkpointing=settings.engine.activation_checkpointing, max_logits_bytes=MAX_LOGITS_BYTES,
    )  # fmt: skip


def estimate_plan(plan: RunPlan, deepspeed_file: DeepSpeedFile, workload: Workload) -> MemoryEstimate:
    """The formula's answer for a rank of this plan under a ZeRO file."""
    casts_frozen_weights = should_cast_frozen_weights(
        precision=workload.precision, stage=deepspeed_file.stage, has_adapters=bool(workload.lora_rank),
        is_quantized=workload.quant is not None
    )  # fmt: skip
    workload = replace(
        workload,
        has_bf16_frozen_weights=casts_frozen_weights and plan.settings.lora.adapter != "dora",
        uses_fused_lora=plan.uses_fused_lora(deepspeed_file.stage),
    )
    return memory_estimate.estimate_memory(
        ModelDims.from_config(load_config(plan.settings.model)), ParamCounts.from_model_info(plan.model_info), workload,
        stage=deepspeed_file.stage,
        world_size=plan.dist_context.world_size, offload_optimizer=deepspeed_file.offloads_optimizer,
        offload_params=deepspeed_file.offloads_params,
    )  # fmt: skip


def required_bytes(plan: RunPlan, estimate: MemoryEstimate) -> tuple[float, float]:
    """(bytes on the device, bytes of the host's memory beside them): on a processor all is one."""
    if plan.dist_context.device.type == "cuda":
        return estimate.peak + memory_estimate.CUDA_CONTEXT_BYTES, estimate.model_states.host
    unquantized_bytes = 4.0 * plan.model_info["parameters"]  # in float32 before it is packed, in the same memory
    return max(estimate.peak + estimate.model_states.host, unquantized_bytes) + PROCESS_BASE_BYTES, 0.0


def available_bytes(plan: RunPlan) -> float:
    """Bytes that one rank may use: its GPU's, or its share of the memory that is free now."""
    device_bytes = device_memory_bytes(plan.dist_context.device)
    return float(device_bytes) if device_bytes is not None else free_host_bytes(plan)


def free_host_bytes(plan: RunPlan) -> float:
    """Bytes of the host's memory that are free now, for each rank on it."""
    return float(psutil.virtual_memory().available / plan.dist_context.local_world_size)
