"""The machine's GPUs: hidden from every test that is not marked `gpu`, and shown to fresh processes of those that are.
CUDA must not be initialised in a process that forks, and ranks of CPU tests must not find a GPU. So nothing here asks
CUDA: the driver's control device says whether there is a GPU."""

import os
from pathlib import Path

import pytest

_ORIGINAL = "TESTS_CUDA_VISIBLE_DEVICES"  # what CUDA_VISIBLE_DEVICES was, also for the workers of pytest-xdist


def hide_gpus() -> None:
    """For this process and all that it starts; before anything is imported that looks for a GPU."""
    os.environ.setdefault(_ORIGINAL, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def has_gpu() -> bool:
    """Whether there was a GPU to see before `hide_gpus`."""
    has_device = Path("/dev/nvidiactl").exists() or Path("/usr/lib/wsl/lib/libcuda.so.1").exists()  # WSL2
    return has_device and os.environ.get(_ORIGINAL, "all") not in ("", "-1")


def num_gpus() -> int:
    """How many there were to see."""
    return len([name for name in gpu_environ()["CUDA_VISIBLE_DEVICES"].split(",") if name]) if has_gpu() else 0


def gpu_environ() -> dict[str, str]:
    """The variables of a fresh process that sees the GPUs as the session was started."""
    original = os.environ.get(_ORIGINAL, "all")
    devices = ",".join(str(n) for n in range(len(list(Path("/dev").glob("nvidia[0-9]*"))) or 1))
    return {"CUDA_VISIBLE_DEVICES": devices if original == "all" else original, "DS_ACCELERATOR": "cuda"}


#: Marks of a test that needs a GPU.
GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")]
TWO_GPU_MARKS = [pytest.mark.gpu, pytest.mark.skipif(num_gpus() < 2, reason="needs two CUDA devices")]
