"""The process of a trial, with its own GPUs, threads and log; on a CPU a fork of one that has loaded the libraries.

Loading torch, transformers and DeepSpeed takes about five CPU seconds, longer than a short run's steps, and a study
starts dozens of runs. What a run leaks or dies of still ends with its own process. A process that is to use a GPU
starts afresh: loading the libraries may have initialised CUDA, which does not survive a fork.
"""

import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from trainer.distributed.launch_environment import set_library_environment
from trainer.tools.worker_processes import end_with_parent
from trainer.tracking.run_lock import FolderInUseError, RunLock
from trainer.tracking.silence import silence_libraries

#: Loaded once, before the first fork; none of them starts threads while it is imported. W&B's last one is what
#: `wandb.init` imports (its launcher, 1.1 CPU seconds).
PRELOADED_MODULES = ["trainer.run", "deepspeed", "peft", "wandb.sdk.launch"]


def start_training(script: Path, argv: Sequence[str], *, env: Mapping[str, str], folder: Path) -> ForkServerProcess:
    """Start launch/train.py, whose output goes to `folder`/log; it ends with this process.

    `env`: all of its environment; CUDA_VISIBLE_DEVICES has a GPU for each rank, or none.
    """
    silence_libraries()
    set_library_environment()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read while wandb is imported
    if not env["CUDA_VISIBLE_DEVICES"]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for others, and warn that there are none
    context: Any = multiprocessing.get_context("spawn" if env["CUDA_VISIBLE_DEVICES"] else "forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    process = context.Process(target=_train, args=(script, argv, env, folder))
    process.start()
    return process


def _train(script: Path, argv: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
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
    num_ranks = len(env["CUDA_VISIBLE_DEVICES"].split(","))
    if num_ranks > 1:
        from torch.distributed.run import main

        main(["--standalone", f"--nproc-per-node={num_ranks}", str(script), *argv])
    else:
        sys.argv = [str(script), *argv]
        runpy.run_path(str(script), run_name="__main__")
