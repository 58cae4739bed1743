"""Real ranks for tests: processes that join one gloo group and run `trainer.run.run`, as a launcher would start them.
They are forked from a server that has imported the heavy packages once, so a run costs seconds. The same code runs
under the real `deepspeed` command in distributed/test_launch.py."""

import contextlib
import gc
import importlib
import itertools
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from trainer.tracking.silence import silence_libraries

silence_libraries()  # before torch is imported, whose store says on stderr that a killed rank is gone
from helpers.gpu_visibility import gpu_environ  # noqa: E402
from trainer.distributed.machine import find_free_port  # noqa: E402

MP_CONTEXT = multiprocessing.get_context("forkserver")
MP_CONTEXT.set_forkserver_preload(["helpers.preload"])
BIN_DIR = Path(sys.executable).parent
TRAIN_SCRIPT = str(Path(__file__).parents[2] / "launch" / "train.py")
#: for `env`: the run is exported in a process of its own, as outside of tests; else here, which saves ten seconds
FRESH_EXPORT = {"TEST_FRESH_EXPORT": "1"}
TIMEOUT_SECONDS = 240  # seconds; a healthy run takes 2 to 10


def make_process(target: Callable[..., Any], args: tuple[Any, ...]) -> BaseProcess:
    """A process that the server will fork."""
    fork_server()
    return MP_CONTEXT.Process(target=target, args=args)


def fork_server() -> None:
    """Start the server, unless it runs, as a fork of this process, which needs the same imports: they take eight
    seconds."""
    importlib.import_module("helpers.preload")

    def fork(_: Any, args: list[Any], descriptors: list[int]) -> int:
        if pid := os.fork():
            return pid
        try:
            for before, after in itertools.pairwise([2, *sorted(descriptors), 2**16]):
                os.closerange(before + 1, after)
            gc.freeze()  # what is imported stays; and a rank that looked through it would copy its pages
            gc.enable()
            importlib.reload(warnings)  # Python's own filters in place of pytest's
            exec(args[-1])
        finally:
            os._exit(0)

    resource_tracker.ensure_running()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on a fork beside threads has one, and xdist has a thread
        patch.setattr(util, "spawnv_passfds", fork)
        forkserver.ensure_running()


def make_environ(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        **session_environ(),
    }


def session_environ() -> dict[str, str]:
    """What came after the server."""
    return {name: os.environ[name] for name in ("TRAINER_CACHE",) if name in os.environ}


def _run_worker(environ: Mapping[str, str], log: str, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    has_packages = "helpers.preload" in sys.modules or environ.get("DS_ACCELERATOR") == "cuda"
    assert has_packages, "the server has imported nothing"
    os.environ.update(environ)
    with open(log, "a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            exit_code = target(*args)
        except SystemExit as error:
            exit_code = error.code
        except BaseException:
            traceback.print_exc()
            exit_code = 1
    os._exit(exit_code or 0)


def run_on_ranks(
    world_size: int,
    target: Callable[..., Any],
    *args: Any,
    log: Path,
    env: Mapping[str, str] | None = None,
    on_gpu: bool = False,
) -> int:
    """Call `target(*args)` on `world_size` ranks; returns the largest exit code, all output goes to `log`. `on_gpu`: in
    processes of their own that see the GPUs, since CUDA cannot be initialised in a forked one."""
    port, env = find_free_port(), {**(env or {}), **(gpu_environ() if on_gpu else {})}
    start: Callable[..., Any] = multiprocessing.get_context("spawn").Process if on_gpu else make_process
    environs = [make_environ(rank, world_size, port) | env for rank in range(world_size)]
    workers = [start(target=_run_worker, args=(environ, str(log), target, args)) for environ in environs]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items() if on_gpu else ():
            patch.setenv(name, value)  # a fresh process imports before it gets its arguments
        for worker in workers:
            worker.start()
    try:
        for worker in workers:
            worker.join(TIMEOUT_SECONDS)
        assert all(worker.exitcode is not None for worker in workers), f"a rank hangs:\n{log.read_text()}"
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
    return max(abs(worker.exitcode or 0) for worker in workers)


def run_train_script(argv: list[str]) -> int:
    """What launch/train.py does, in this process; the run is exported here too unless FRESH_EXPORT is set."""
    from trainer.export import export_cli, fresh_process

    sys.path.insert(0, str(Path(TRAIN_SCRIPT).parent))
    import train as entry

    if not set(FRESH_EXPORT) <= set(os.environ):
        fresh_process.export_in_fresh_process = lambda request, _: export_cli.export_checkpoint(**request)
    sys.argv = ["train.py", *argv]
    return entry.main(argv)


def train(
    flags: list[str], *, out: Path, world_size: int = 1, env: Mapping[str, str] | None = None, check: bool = True
) -> str:
    """Run `train.py` with these flags on so many ranks into `out`; returns its output. `check`: it must succeed."""
    log = out.parent / f"{out.name}.log"
    exit_code = run_on_ranks(world_size, run_train_script, [*flags, "--output-dir", str(out)], log=log, env=env)
    output = log.read_text()
    assert not check or exit_code == 0, output
    return output
