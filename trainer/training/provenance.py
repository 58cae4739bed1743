"""On what a run ran: versions, commit, hardware, and what differs between its hosts."""

import contextlib
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.config.settings import Settings
from trainer.config.text import list_some
from trainer.data.dataset import resolve_cache_dir
from trainer.distributed.joining import MAX_HOSTS_SHOWN
from trainer.distributed.preflight import package_version
from trainer.distributed.process_group import DistContext
from trainer.tracking.run_lock import LOCK_FILE
from trainer.tracking.wandb_logger import wandb_mode

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "bitsandbytes", "wandb", "numpy")
MAX_CLOCK_SECONDS = 5.0  # of which a busy host may be late itself


def package_versions() -> dict[str, str | None]:
    """{package: version} of what the numbers depend on; None where it is not installed."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


def device_name(dist_context: DistContext) -> str:
    """What a GPU calls itself, the size of one that is only planned for, or CPU."""
    if dist_context.planned_gpu_bytes is not None:
        return f"GPU of {dist_context.planned_gpu_bytes / 2**30:g} GiB"
    return torch.cuda.get_device_name(dist_context.device) if dist_context.device.type == "cuda" else "CPU"


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None outside a checkout."""
    options: Any = {"cwd": Path(__file__).parent, "stderr": subprocess.DEVNULL, "timeout": 10, "text": True}
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], **options).strip()
        return {"commit": commit, "dirty": bool(subprocess.check_output(["git", "status", "--porcelain"], **options))}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_hardware(dist_context: DistContext) -> dict[str, Any]:
    is_gpu = dist_context.device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(dist_context.device) if is_gpu else None,
        "gpus": dist_context.world_size if is_gpu else 0,
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_hosts(settings: Settings, context: DistContext) -> list[tuple[str, str]]:
    """(what, value) lines of the plan on folders and clocks, of several hosts; all ranks must call.

    Rank 0 must hold the run folder: the others see its lock file, or not.
    """
    if context.num_nodes == 1:
        return []
    lock = None
    with contextlib.suppress(OSError):
        lock = Path(settings.run_folder, LOCK_FILE).read_text(encoding="utf-8")
    # `deepspeed` forwards no variable for these.
    folders = f"cache {resolve_cache_dir()}, HF home {os.environ.get('HF_HOME') or '~/.cache/huggingface'}"
    by_host = dict(zip(context.hosts, context.all_gather_object((folders, lock)), strict=True))
    if len({other for other, _ in by_host.values()}) > 1:
        folders = "; ".join([f"on {host} {other}" for host, (other, _) in by_host.items()][:MAX_HOSTS_SHOWN])
    mode = context.on_rank_zero(lambda: wandb_mode(settings.output.wandb))
    lines = [("environment", f"W&B {mode}; {folders}")]
    if note := describe_clocks(context):
        lines.append(("note", note))
    here = context.hosts[0]
    others = [host for host, (_, other) in by_host.items() if other != by_host[here][1]]
    if without := list_some(others, MAX_HOSTS_SHOWN):
        only_here = f"only {here} holds the checkpoints and can be the first to resume"
        lines.append(("note", f"{settings.run_folder} of {here} is not seen on {without}: {only_here}"))
    return lines


def describe_clocks(context: DistContext) -> str | None:
    """Which two hosts' clocks differ by more than their answers take; the rows have rank 0's."""
    context.all_gather_object(None)  # all go on from here at nearly one moment
    times = dict(zip(context.hosts, context.all_gather_object(time.time()), strict=True))
    early, late = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    seconds = times[late] - times[early]
    return f"the clock of {late} is {seconds:,.0f} s ahead of that of {early}" if seconds > MAX_CLOCK_SECONDS else None
