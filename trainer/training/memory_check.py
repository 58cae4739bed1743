"""What a plan needs of a device's memory before anything runs, and what there is."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import psutil

from trainer.config.settings import Settings
from trainer.distributed.deepspeed_config import DeepSpeedFile
from trainer.distributed.execution import make_execution_plan
from trainer.distributed.memory_count import PassSetup, count_pass_memory
from trainer.distributed.memory_estimate import (
    CUDA_CONTEXT_BYTES,
    MemoryEstimate,
    ParamCounts,
    PassMemory,
    Sharding,
    estimate_memory,
)
from trainer.distributed.process_group import DistContext
from trainer.model.build import build_model

if TYPE_CHECKING:
    from trainer.training.run_plan import RunPlan

PROCESS_BASE_BYTES = 700 * 2**20  # what a CPU rank holds before it has a model: Python, torch, DeepSpeed
MAX_COUNTED_TOKENS = 4096  # of a CPU rank's micro-batch, which takes an operation for every few rows of logits


def estimate_plan(
    plan: "RunPlan", deepspeed_file: DeepSpeedFile, row_length: int, micro_batch_size: int | None = None
) -> MemoryEstimate:
    """The memory of a rank of this plan under a ZeRO file, with rows of `row_length` tokens.

    `micro_batch_size`: another than the plan's. Takes a few seconds for a setup that was not asked about before.
    """
    return estimate_rank_memory(
        plan.settings,
        plan.dist_context,
        plan.model_info,
        deepspeed_file,
        precision=plan.precision,
        model_dropout=plan.dropout,
        row_length=row_length,
        micro_batch_size=micro_batch_size or plan.schedule.batch.micro_batch_size,
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
    """As `estimate_plan`, before there is a plan."""
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
        Sharding(
            stage=deepspeed_file.stage,
            world_size=world_size,
            offloads_optimizer=deepspeed_file.offloads_optimizer,
            offloads_params=deepspeed_file.offloads_params,
        ),
        precision=precision,
        is_gpu=setup.is_gpu,
        accumulates=setup.accumulates,
    )


@functools.cache
def pass_memory(settings: Settings, setup: PassSetup) -> PassMemory:
    """The bytes of a forward and backward; of a large micro-batch on a CPU by the growth from two small ones."""
    small_size = max(1, MAX_COUNTED_TOKENS // (2 * setup.sequence_length))
    if setup.is_gpu or setup.micro_batch_size <= 2 * small_size:
        return count_pass_memory(lambda: build_model(settings, on_meta=True), setup)
    small, large = (
        pass_memory(settings, dataclasses.replace(setup, micro_batch_size=size))
        for size in (small_size, 2 * small_size)
    )
    factor = (setup.micro_batch_size - small_size) / small_size
    pairs = {name: (value, getattr(large, name)) for name, value in dataclasses.asdict(small).items()}
    return PassMemory(**{name: value + factor * (other - value) for name, (value, other) in pairs.items()})


def required_bytes(plan: "RunPlan", estimate: MemoryEstimate) -> tuple[float, float]:
    """(bytes on the device, bytes of the host's memory beside them): for a CPU rank all is one."""
    if plan.dist_context.device.type == "cuda":
        return estimate.peak + CUDA_CONTEXT_BYTES, estimate.model_states.host
    unquantized_bytes = 4.0 * plan.model_info["parameters"]  # in float32 before it is packed, in the same memory
    return max(estimate.peak + estimate.model_states.host, unquantized_bytes) + PROCESS_BASE_BYTES, 0.0


def available_bytes(plan: "RunPlan") -> float:
    """Bytes that one rank may use: its GPU's, or its share of the memory that is free now."""
    device_bytes = plan.dist_context.device_memory_bytes()
    return float(device_bytes) if device_bytes is not None else free_host_bytes(plan)


def free_host_bytes(plan: "RunPlan") -> float:
    """Bytes of the host's memory that are free now, for each rank on it."""
    return float(psutil.virtual_memory().available / plan.dist_context.local_world_size)
