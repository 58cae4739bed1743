"""The process of a trial, with its own GPUs, threads and log; on a CPU a fork of one that has loaded the libraries.

Loading torch, transformers and DeepSpeed takes about five CPU seconds, longer than a short run's steps, and a study
starts dozens of runs. What a run leaks or dies of still ends with its own process. A process that is to use a GPU
starts afresh: loading the libraries may have initialised CUDA, which does not survive a fork.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.distributed.launch_environment import set_library_environment, without_launcher
from trainer.tools.worker_processes import ROOT, end_with_parent
from trainer.tracking.run_lock import FolderInUseError, RunLock
from trainer.tracking.silence import silence_libraries
from trainer.tracking.wandb_logger import RUN_VARIABLES

TRAIN_SCRIPT = ROOT / "launch" / "train.py"
#: Loaded once, before the first fork; none of them starts threads while it is imported. W&B's last one is what
#: `wandb.init` imports (its launcher, 1.1 CPU seconds).
PRELOADED_MODULES = ["trainer.run", "deepspeed", "peft", "wandb.sdk.launch"]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one worker of this machine may use."""

    gpus: tuple[str, ...]  #: as CUDA_VISIBLE_DEVICES has them; () on a CPU
    num_threads: int


def make_slots(num_workers: int, gpus_per_trial: int | None) -> list[Slot]:
    """Each worker's own GPUs, `gpus_per_trial` of them (None: one where there are any); UserError for too many."""
    gpus: list[str] = []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = [gpu for gpu in visible.split(",") if gpu.strip()]
    else:
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # without asking torch
            listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
            gpus = [str(n) for n, line in enumerate(listing.stdout.splitlines()) if line.startswith("GPU ")]
    per_trial = gpus_per_trial if gpus_per_trial is not None else min(1, len(gpus))
    if num_workers * per_trial > len(gpus):
        raise UserError(
            f"--workers {num_workers} x --gpus-per-trial {per_trial}: needs {num_workers * per_trial} GPUs, there are "
            f"{len(gpus)}; lower one of them"
        )
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
    return [
        Slot(gpus=tuple(gpus[n * per_trial : (n + 1) * per_trial]), num_threads=num_threads) for n in range(num_workers)
    ]


def train_environ(slot: Slot, group: str = "") -> dict[str, str]:
    """All variables of a run that uses a slot, in this group on W&B."""
    inherited = {name: value for name, value in without_launcher(os.environ).items() if name not in RUN_VARIABLES}
    env = {"OMP_NUM_THREADS": str(slot.num_threads), **inherited}
    env.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")  # run.json has the versions; listing them takes 0.8 s a trial
    return env | {"WANDB_RUN_GROUP": group, "CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}


def start_run(slot: Slot, argv: Sequence[str], folder: Path, *, group: str = "") -> ForkServerProcess:
    """Start launch/train.py, a rank on each GPU; its output goes to `folder`/log, and it ends with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    silence_libraries()
    set_library_environment()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported
    if not slot.gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and warn that there are none
    context: Any = multiprocessing.get_context("spawn" if slot.gpus else "forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    process = context.Process(target=_train, args=(TRAIN_SCRIPT, argv, train_environ(slot, group), slot.gpus, folder))
    process.start()
    return process


def _train(script: Path, argv: Sequence[str], env: Mapping[str, str], gpus: Sequence[str], folder: Path) -> None:
    end_with_parent()
    lock = RunLock(folder / "process")  # held until this process ends
    while not lock.is_held:
        try:
            lock.acquire()
        except FolderInUseError:  # the run of a worker that has died is about to end
            time.sleep(0.2)
    os.environ.clear()
    os.environ.update(env)
    with open(os.devnull, "rb") as null, open(folder / "log", "wb") as output:
        for descriptor, file in enumerate((null, output, output)):
            os.dup2(file.fileno(), descriptor)
    if len(gpus) > 1:
        from torch.distributed.run import main

        main(["--standalone", f"--nproc-per-node={len(gpus)}", str(script), *argv])
    else:
        sys.argv = [str(script), *argv]
        runpy.run_path(str(script), run_name="__main__")
