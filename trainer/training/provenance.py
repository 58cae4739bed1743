"""On what a run ran: versions, commit, hardware."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.preflight import package_version
from trainer.distributed.process_group import DistContext

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "bitsandbytes", "wandb", "numpy")


def package_versions() -> dict[str, str | None]:
    """{package: version} of what the numbers depend on; None where it is not installed."""
    return {"python": platform.python_version(), **{name: package_version(name) for name in PACKAGES}}


def device_name(dist_context: DistContext) -> str:
    """What a GPU calls itself, the size of one that is only planned for, or CPU."""
    if dist_context.planned_gpu_bytes is not None:
        return f"GPU of {dist_context.planned_gpu_bytes / 2**30:g} GiB"
    is_gpu = dist_context.device.type == "cuda"
    return torch.cuda.get_device_name(dist_context.device) if is_gpu else "CPU"


def git_state() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was changed since; None outside a checkout."""
    package_dir = Path(__file__).parents[1]

    def run_git(*argv: str) -> str:
        output = subprocess.check_output(["git", *argv], cwd=package_dir, stderr=subprocess.DEVNULL, timeout=10)
        return output.decode().strip()

    try:
        return {"commit": run_git("rev-parse", "HEAD"), "dirty": bool(run_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def describe_hardware(dist_context: DistContext) -> dict[str, Any]:
    """The `hardware` block of run.json."""
    is_gpu = dist_context.device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(dist_context.device) if is_gpu else None,
        "gpus": dist_context.world_size if is_gpu else 0,
        "gpus_here": torch.cuda.device_count(),
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
