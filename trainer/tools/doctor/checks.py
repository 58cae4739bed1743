"""What the doctor looks at before anything runs: the GPUs of this machine and the memory.

What launch/train.py refuses or notes by itself stands in its plan, which the doctor prints, or in the rehearsal.
"""

import os
from typing import Any, NamedTuple

import torch

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.text import list_some
from trainer.distributed import machine
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.memory import required_bytes
from trainer.training.run_plan import RunPlan

OK, WARNING, ERROR = LEVELS = ("ok", "warning", "error")
TIGHT_SHARE = 0.9  # of the memory; above it the allocator's gaps may not fit


class Check(NamedTuple):
    """One thing that was looked at; `remedy` is empty where there is nothing to do."""

    level: str
    name: str
    message: str
    remedy: str = ""


def judge(is_bad: bool, level: str, name: str, message: str, remedy: str) -> Check:
    return Check(level, name, message, remedy) if is_bad else Check(OK, name, message)


def format_bytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def check_gpus(world_size: int) -> Check:
    if problem := machine.find_gpu_problem(os.environ):
        return Check(ERROR, "GPUs", *problem.split("; ", 1))
    if not torch.cuda.is_available():
        return Check(OK, "GPUs", f"none: runs on {len(os.sched_getaffinity(0))} processor cores")
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = list_some((f"{gpu.name} {format_bytes(gpu.total_memory)}" for gpu in gpus), 6)
    remedy = f"start at most {len(gpus)}: deepspeed --num_gpus {len(gpus)}"
    return judge(world_size > len(gpus), ERROR, "GPUs", f"{names} for {world_size} ranks", remedy)


def build_memory_table(plan: RunPlan, row_length: int) -> list[dict[str, Any]]:
    """A row for every ZeRO file of this program, and the plan's own where that is another; bytes of a rank.

    `peak`: on the device (for a CPU rank: of memory), all in all; `host`: beside them, where there is a GPU.
    """
    files = [read_deepspeed_file(name) for name in DS_CONFIG_NAMES]
    files += [plan.deepspeed_file] if plan.deepspeed_file.name not in DS_CONFIG_NAMES else []
    table, context = [], plan.dist_context
    for file in files:
        estimate = plan.estimate_memory(file, row_length=row_length)
        device_bytes, host_bytes = required_bytes(estimate, plan.model_info, context.device)
        row = {
            "ds_config": file.name,
            "chosen": file.name == plan.deepspeed_file.name,
            "fits": device_bytes <= context.available_bytes() and host_bytes <= context.free_host_bytes(),
            "peak": device_bytes,
            "host": host_bytes,
        }
        parts = ("weights", "gradients", "optimizer", "activations", "passing", "gathered")
        table.append(row | {name: getattr(estimate, name) for name in parts})
    return table


def check_memory(plan: RunPlan, table: list[dict[str, Any]]) -> Check:
    chosen = next(row for row in table if row["chosen"])
    limit_bytes, is_gpu = plan.dist_context.available_bytes(), plan.dist_context.device.type == "cuda"
    capacity = "a GPU" if is_gpu else "free memory of a rank"
    message = f"{chosen['ds_config']}: {format_bytes(chosen['peak'])} at most, {format_bytes(limit_bytes)} {capacity}"
    if chosen["fits"]:
        is_tight = chosen["peak"] > TIGHT_SHARE * limit_bytes
        return judge(is_tight, WARNING, "memory", message, "lower --micro-batch: so close to the limit it may not fit")
    fitting = next((row["ds_config"] for row in table if row["fits"]), None)
    remedy = "lower --micro-batch, pass --activation-checkpointing, or take --mode lora or a smaller model"
    remedy = f"--ds-config {fitting} would fit" if fitting else remedy
    return Check(ERROR, "memory", message, f"{remedy}; --micro-batch 1 needs the least")
