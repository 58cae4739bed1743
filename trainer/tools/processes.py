"""Processes that the tools start: launch/train.py with its own GPUs, and functions, each with a log of its own.

On a CPU they are forks of a process that has loaded the libraries: that takes about five CPU seconds, longer than a
short run's steps, and a study starts dozens of runs. A process that is to use a GPU starts afresh: loading the
libraries may have initialised CUDA, which does not survive a fork.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError, report_error
from trainer.distributed.launch_environment import set_library_environment, without_launcher
from trainer.tracking.run_lock import FolderInUseError, RunLock
from trainer.tracking.silence import silence_libraries
from trainer.tracking.wandb_logger import RUN_VARIABLES

TRAIN_SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"
#: Loaded once, before the first fork; none of them starts threads while it is imported. W&B's last one is what
#: `wandb.init` imports (its launcher, 1.1 CPU seconds).
PRELOADED_MODULES = ["trainer.tools.silenced", "trainer.run", "deepspeed", "peft", "wandb.sdk.launch"]
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one run on this machine may use."""

    gpus: tuple[str, ...]  #: as CUDA_VISIBLE_DEVICES has them; () on a CPU
    num_threads: int  #: of each rank
    num_cpu_ranks: int = 1  #: where there are no GPUs


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


def start_run(slot: Slot, argv: Sequence[str], folder: Path, *, group: str = "") -> BaseProcess:
    """Start launch/train.py, a rank on each GPU; its output goes to `folder`/log, and it ends with this process.
    `group`: of the run on W&B."""
    return start_process(_run_script, (slot, TRAIN_SCRIPT, argv), folder, run_environ(slot, group), bool(slot.gpus))


def start_process(
    target: Callable[..., None], args: tuple[Any, ...], folder: Path, env: Mapping[str, str], uses_gpus: bool
) -> BaseProcess:
    """Start `target(*args)` in a process of its own with these variables; the rest is as for `start_run`."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(log := folder / "log") and not log.is_file():  # a named pipe would be waited for
        raise UserError(f"{log}: not a regular file; remove it")
    silence_libraries()
    set_library_environment()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported
    if not uses_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and warn that there are none
    context: Any = multiprocessing.get_context("spawn" if uses_gpus else "forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    process: BaseProcess = context.Process(target=_run, args=(target, args, dict(env), folder))
    process.start()
    return process


def run_environ(slot: Slot, group: str = "") -> dict[str, str]:
    """All variables of a run that uses a slot, in this group on W&B."""
    inherited = {name: value for name, value in without_launcher(os.environ).items() if name not in RUN_VARIABLES}
    env = {"OMP_NUM_THREADS": str(slot.num_threads), **inherited}
    env.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")  # run.json has the versions; listing them takes 0.8 s a trial
    return env | {"WANDB_RUN_GROUP": group, "CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}


def _run(target: Callable[..., None], args: tuple[Any, ...], env: Mapping[str, str], folder: Path) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # it ends when the process that started it ends
    with open(os.devnull, "rb") as null, open(folder / "log", "ab") as output:
        for descriptor, file in enumerate((null, output, output)):
            os.dup2(file.fileno(), descriptor)
    # Held until this process ends: the run of a worker that has died may be about to end, and to write its log.
    try:
        lock = acquire_when_free(folder / "process")
    except UserError as error:
        sys.exit(report_error(error))
    os.truncate(folder / "log", 0)
    os.environ.clear()
    os.environ.update(env)
    target(*args)
    del lock


def _run_script(slot: Slot, script: Path, argv: Sequence[str]) -> None:
    if (num_ranks := len(slot.gpus) or slot.num_cpu_ranks) > 1:
        from torch.distributed.run import main

        main(["--standalone", f"--nproc-per-node={num_ranks}", str(script), *argv])
    else:
        sys.argv = [str(script), *argv]
        runpy.run_path(str(script), run_name="__main__")


def acquire_when_free(folder: Path, should_stop: threading.Event | None = None) -> RunLock | None:
    """The lock of `folder` once it is free (held unless the file system has none); None where `should_stop` was set."""
    lock, should_stop = RunLock(folder), should_stop or threading.Event()
    while not should_stop.is_set():
        try:
            lock.acquire()
            return lock
        except FolderInUseError:
            should_stop.wait(0.2)
    return None


def failure_reason(log: Path, exit_code: int = 1) -> str:
    """Why a process with this exit code failed, by its output in `log`: its last error message, else its last line."""
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if "Error" in line]
    reason = (errors or lines or ["no output"])[-1].removeprefix("error: ")[:300]
    return f"killed by signal {-exit_code}, after: {reason}" if exit_code < 0 else reason
