"""Processes that the tools start: a group of ranks on this machine, and why one failed, by what it said last."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.distributed.launch_environment import without_launcher

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


def worker_environ() -> dict[str, str]:
    """The environment for a process that is nobody's rank and imports this package, wherever it is started."""
    return {**without_launcher(os.environ), "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def run_ranks(argv: Sequence[str], world_size: int, log: Path, *, timeout_seconds: float) -> list[int] | None:
    """Run `python *argv` as so many ranks, their output in `log`; the exit codes, None where the time was not enough.

    A rank that fails ends the others, which would wait for it; all have ended on return.
    """
    from trainer.distributed.process_group import find_free_port  # which needs torch

    shared = {
        **worker_environ(),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_port()),
    }
    deadline = time.monotonic() + timeout_seconds
    with open(log, "wb") as output:
        ranks = [
            subprocess.Popen(
                [sys.executable, *argv],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            for rank in range(world_size)
        ]
    try:
        while time.monotonic() < deadline:
            exit_codes = [rank.poll() for rank in ranks]
            if any(exit_codes) or None not in exit_codes:
                return [code or 0 for code in exit_codes]
            time.sleep(POLL_SECONDS)
        return None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def end_with_parent() -> None:
    """Have the system end this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def last_line(output: str) -> str:
    """Why a process failed, by its output: its last error message, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")[:300]


def failure_reason(log: Path, exit_code: int = 1) -> str:
    """The same of a process with this exit code, whose output went to `log`."""
    reason = last_line(log.read_text(encoding="utf-8", errors="replace"))
    return f"killed by signal {-exit_code}, after: {reason}" if exit_code < 0 else reason
