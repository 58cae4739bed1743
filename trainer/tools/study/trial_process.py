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
from collections.abc import Mapping, Sequence
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


def start_training(
    script: Path, argv: Sequence[str], *, env: Mapping[str, str], log: Path, lock: IO[str] | None = None
) -> ForkServerProcess:
    """Start launch/train.py; it ends with this process, and until it ends `lock` stays locked.

    `env`: all of its environment; CUDA_VISIBLE_DEVICES has a GPU for each rank, or none.
    """
    silence_libraries()
    set_library_environment()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported
    if not env["CUDA_VISIBLE_DEVICES"]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and warn that there are none
    context: Any = multiprocessing.get_context("spawn" if env["CUDA_VISIBLE_DEVICES"] else "forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    # A connection is what multiprocessing hands on to another process by its descriptor, whatever file that is of.
    held = Connection(os.dup(lock.fileno())) if lock is not None else None
    process = context.Process(target=_train, args=(script, argv, env, log, held))
    process.start()
    return process


def _train(script: Path, argv: Sequence[str], env: Mapping[str, str], log: Path, held: Connection | None) -> None:
    """`held`: open until the end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    os.environ.clear()
    os.environ.update(env)
    with open(os.devnull, "rb") as null, open(log, "wb") as output:
        for descriptor, file in enumerate((null, output, output)):
            os.dup2(file.fileno(), descriptor)
    num_ranks = len(env["CUDA_VISIBLE_DEVICES"].split(","))
    if num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        os.execv(sys.executable, [sys.executable, *launcher, str(script), *argv])
    sys.argv = [str(script), *argv]
    runpy.run_path(str(script), run_name="__main__")
