"""What a plan needs of a device's memory by formula (`trainer.distributed.memory_estimate`), and what there is."""

from dataclasses import replace

import psutil

from trainer.distributed import memory_estimate
from trainer.distributed.deepspeed_config import ZeroFile
from trainer.distributed.frozen_bf16 import holds_halves
from trainer.distributed.memory_estimate import Counts, Estimate, Load, Shape
from trainer.distributed.process_group import device_memory
from trainer.kernels.linear_cross_entropy import LARGEST_LOGITS
from trainer.model.build import load_config
from trainer.training.run_plan import Plan

PROGRAM = 700 * 2**20  # bytes; what a rank on a processor holds before it has a model: Python, torch, DeepSpeed


def load_of(plan: Plan, width: int, micro: int | None = None) -> Load:
    """What a rank feeds in one forward; `width`: tokens of the longest row, `micro`: another micro-batch."""
    settings, lora = plan.settings, plan.settings.mode == "lora"
    micro = micro or plan.course.batch.micro
    return Load(
        rows=micro, width=width, accumulation=plan.course.batch.global_batch // (micro * plan.world.size),
        precision=plan.precision, gpu=plan.world.device.type == "cuda", one_processor=plan.world.is_one_processor,
        dropout=plan.dropout,
        adapter_rank=settings.lora.rank if lora else 0, adapter_dropout=settings.lora.dropout,
        adapted=tuple(plan.model["lora_targets"]), packed=settings.model.quant,
        again=settings.engine.checkpoint_activations, largest_logits=LARGEST_LOGITS,
    )  # fmt: skip


def estimate(plan: Plan, zero: ZeroFile, load: Load) -> Estimate:
    """The formula's answer for a rank of this plan under a ZeRO file."""
    halves = holds_halves(
        precision=load.precision, stage=zero.stage, adapters=bool(load.adapter_rank), packed=load.packed is not None
    )  # fmt: skip
    load = replace(
        load, halves=halves and plan.settings.lora.adapter != "dora", lowrank=plan.fuses_adapters(zero.stage)
    )
    return memory_estimate.estimate(
        Shape.of(load_config(plan.settings.model)), Counts.of(plan.model), load, stage=zero.stage,
        ranks=plan.world.size, optimizer_on_host=zero.optimizer_on_host, weights_on_host=zero.weights_on_host,
    )  # fmt: skip


def needed(plan: Plan, made: Estimate) -> tuple[float, float]:
    """(bytes on the device, bytes of the host's memory beside them): on a processor all is one."""
    if plan.world.device.type == "cuda":
        return made.peak + memory_estimate.CONTEXT, made.state.host
    built = 4.0 * plan.model["parameters"]  # in float32 before it is packed, in the same memory
    return max(made.peak + made.state.host, built) + PROGRAM, 0.0


def available(plan: Plan) -> float:
    """Bytes that one rank may use: its GPU's, or its share of the memory that is free now."""
    whole = device_memory(plan.world.device)
    return float(whole) if whole is not None else free_host(plan)


def free_host(plan: Plan) -> float:
    """Bytes of the host's memory that are free now, for each rank on it."""
    return float(psutil.virtual_memory().available / plan.world.local_size)
