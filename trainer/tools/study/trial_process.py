"""The process of a trial, with its own GPUs, threads and log; on a processor a fork of one with the libraries loaded.

Loading torch, transformers and DeepSpeed takes longer than a short run's steps; a study starts dozens of runs. A fork
keeps what a process of its own is for: what a run leaves, leaks or dies of ends with it. A process that is to use a GPU
starts anew: loading the libraries may have asked the driver for devices, and CUDA does not survive a fork after that.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any

from trainer.distributed.library_environment import set_library_environment
from trainer.tracking.silence import silence_libraries

#: Loaded once, before the first fork; none of them starts threads while it is imported. W&B's last one is what
#: `wandb.init` imports (its launcher, 1.1 CPU seconds); with deepspeed they were a third of a short trial.
PRELOADED_MODULES = ["trainer.run", "deepspeed", "peft", "wandb.sdk.launch"]
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """One call of launch/train.py."""

    script: Path
    argv: tuple[str, ...]
    env: Mapping[str, str]  #: all of its environment; CUDA_VISIBLE_DEVICES has a GPU for each rank, or none
    log: Path


def start_training(command: TrainCommand, lock: IO[str]) -> ForkServerProcess:
    """Start it; `lock` stays locked until it ends, and it ends with this process."""
    silence_libraries()
    set_library_environment()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported
    if not command.env["CUDA_VISIBLE_DEVICES"]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and warn that there are none
    context: Any = multiprocessing.get_context("spawn" if command.env["CUDA_VISIBLE_DEVICES"] else "forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    # A connection is what multiprocessing hands on to another process by its descriptor, whatever file that is of.
    process = context.Process(target=_train, args=(command, Connection(os.dup(lock.fileno()))))
    process.start()
    return process


def _train(command: TrainCommand, lock: Connection) -> None:
    """`lock`: kept open until the end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.environ.clear()
    os.environ.update(command.env)
    with open(os.devnull, "rb") as null, open(command.log, "wb") as log:
        for descriptor, file in enumerate((null, log, log)):
            os.dup2(file.fileno(), descriptor)
    num_ranks = len(command.env["CUDA_VISIBLE_DEVICES"].split(","))
    if num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        os.execv(sys.executable, [sys.executable, *launcher, str(command.script), *command.argv])
    sys.argv = [str(command.script), *command.argv]
    runpy.run_path(str(command.script), run_name="__main__")
