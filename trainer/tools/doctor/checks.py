"""What the doctor looks at before anything runs: this machine, the prepared rows, and the memory.

What launch/train.py refuses or notes by itself stands in its plan, which the doctor prints, and is not checked here.
"""

import os
import platform
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any, NamedTuple

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.text import list_some
from trainer.data.dataset import PreparedDataset
from trainer.distributed import machine
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.memory import required_bytes
from trainer.distributed.process_group import package_version
from trainer.training.run_plan import RunPlan

OK, WARNING, ERROR = LEVELS = ("ok", "warning", "error")

DISTRIBUTION = "gpt2-full-vs-lora"
MIN_VAL_EXAMPLES, MIN_VAL_TOKENS = 30, 5_000  # of validation; fewer, and chance moves its loss
MAX_REPEATED_SHARE = 0.1  # of the training texts
MIN_TARGET_SHARE = 0.1  # of the training tokens
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


def check_environment(world_size: int) -> Iterator[Check]:
    try:
        package = metadata.metadata(DISTRIBUTION)
        yield from check_packages(str(package["Requires-Python"] or ""), metadata.requires(DISTRIBUTION) or [])
    except metadata.PackageNotFoundError:
        message = f"{DISTRIBUTION} is not installed, so its supported versions are unknown"
        yield Check(WARNING, "packages", message, "pip install -e . in its folder")
    on_gpu = torch.cuda.is_available()
    if host_problem := machine.find_host_problem(os.environ, on_gpu=on_gpu, world_size=world_size):
        message, _, remedy = host_problem.rpartition("; ")
        yield Check(ERROR, "host", message, remedy)
    if problem := machine.find_gpu_problem(os.environ):
        yield Check(ERROR, "GPUs", *problem)
        return
    if not on_gpu:
        yield Check(OK, "GPUs", f"none: runs on {len(os.sched_getaffinity(0))} processor cores")
        return
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    names = list_some((f"{gpu.name} {format_bytes(gpu.total_memory)}" for gpu in gpus), 6)
    remedy = f"start at most {len(gpus)}: deepspeed --num_gpus {len(gpus)}"
    yield judge(world_size > len(gpus), ERROR, "GPUs", f"{names} for {world_size} ranks", remedy)
    if (free_bytes := machine.free_shared_memory(os.environ)) is not None:
        is_short = world_size > 1 and free_bytes < world_size * machine.SHM_BYTES_PER_RANK
        yield judge(is_short, ERROR, "/dev/shm", f"{format_bytes(free_bytes)} free", machine.SHM_REMEDY)


def check_packages(python_range: str, requirements: Iterable[str]) -> Iterator[Check]:
    if platform.python_version() not in SpecifierSet(python_range):
        message = f"{platform.python_version()}, supported is {python_range}"
        yield Check(ERROR, "Python", message, "make a virtual environment with such a Python")
    supported = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            name, specifier, version = requirement.name, requirement.specifier, package_version(requirement.name)
            if version is not None and specifier.contains(version, prereleases=True):
                supported.append(f"{name} {version}")
                continue
            message = f"{version or 'missing'}, supported is {specifier or 'any'}"
            yield Check(ERROR, name, message, f"pip install '{name}{specifier}'")
    yield Check(OK, "packages", f"in the supported ranges: {', '.join(supported)}")


def check_data(data: PreparedDataset) -> Iterator[Check]:
    train, val = data.metadata["train"], data.metadata["val"]
    is_small = val["examples"] < MIN_VAL_EXAMPLES or val["num_target_tokens"] < MIN_VAL_TOKENS
    message = "{records:,} records, {examples:,} examples, {num_target_tokens:,} target tokens".format(**val)
    remedy = f"under {MIN_VAL_EXAMPLES} examples or {MIN_VAL_TOKENS:,} tokens chance decides: "
    yield judge(is_small, WARNING, "validation", message, remedy + "raise --val-fraction or give --val-data")
    num_repeated = data.metadata["repeated_in_train"]
    message = f"{num_repeated:,} of {train['records']:,} training records are repeats"
    is_bad = num_repeated > MAX_REPEATED_SHARE * train["records"]
    yield judge(is_bad, WARNING, "repeats", message, "drop them, unless their weight is meant")
    target_share = int(data.train.num_target_tokens().sum()) / int(data.train.lengths().sum())
    message = f"{1 - target_share:.1%} of the training tokens are not counted in the loss"
    remedy = "shorten the prompt, or train on whole texts with --objective blocks"
    yield judge(target_share < MIN_TARGET_SHARE, WARNING, "masked", message, remedy)


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


def check_memory(plan: RunPlan, table: list[dict[str, Any]]) -> Iterator[Check]:
    chosen = next(row for row in table if row["chosen"])
    limit_bytes, is_gpu = plan.dist_context.available_bytes(), plan.dist_context.device.type == "cuda"
    capacity = "a GPU" if is_gpu else "free memory of a rank"
    message = f"{chosen['ds_config']}: {format_bytes(chosen['peak'])} at most, {format_bytes(limit_bytes)} {capacity}"
    if chosen["fits"]:
        is_tight = chosen["peak"] > TIGHT_SHARE * limit_bytes
        yield judge(is_tight, WARNING, "memory", message, "lower --micro-batch: so close to the limit it may not fit")
        return
    fitting = next((row["ds_config"] for row in table if row["fits"]), None)
    remedy = "lower --micro-batch, pass --activation-checkpointing, or take --mode lora or a smaller model"
    remedy = f"--ds-config {fitting} would fit" if fitting else remedy
    yield Check(ERROR, "memory", message, f"{remedy}; --micro-batch 1 needs the least")
