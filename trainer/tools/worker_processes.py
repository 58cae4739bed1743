"""Processes that the tools start: a job on a group of ranks of this machine, and why a process failed."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.distributed.launch_environment import without_launcher

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


class JobResult(NamedTuple):
    """How a job ended."""

    answers: list[dict[str, Any]]  #: what rank 0 wrote, by `trial_engine.write_answer`
    exit_codes: list[int] | None  #: of the ranks; None where the time was over
    reason: str  #: why it failed, "" where it did not


def worker_environ() -> dict[str, str]:
    """The environment for a process that is nobody's rank and imports this package, wherever it is started."""
    return {**without_launcher(os.environ), "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def run_job(
    command: Sequence[str], job: Mapping[str, Any], world_size: int, *, timeout_seconds: float | None = None
) -> JobResult:
    """Run `python *command JOB` as so many ranks; they read the job with `trial_engine.join_job`.

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
    deadline = time.monotonic() + (timeout_seconds or float("inf"))
    with tempfile.TemporaryDirectory(prefix="job-") as scratch:
        job_file, answer_file, log = (Path(scratch, name) for name in ("job.json", "answers", "log"))
        job_file.write_text(json.dumps({**job, "answer": str(answer_file)}), encoding="utf-8")
        answer_file.touch()
        ranks, exit_codes = [], None
        try:
            with open(log, "wb") as output:
                for rank in range(world_size):
                    argv, own = [sys.executable, *command, str(job_file)], {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    ranks.append(
                        subprocess.Popen(argv, env=shared | own, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
                    )
            while time.monotonic() < deadline:
                codes = [rank.poll() for rank in ranks]
                if any(codes) or None not in codes:
                    exit_codes = [code or 0 for code in codes]
                    break
                time.sleep(POLL_SECONDS)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        answers = [json.loads(line) for line in answer_file.read_text(encoding="utf-8").splitlines()]
        has_failed = exit_codes is None or any(exit_codes)
        return JobResult(answers, exit_codes, failure_reason(log) if has_failed else "")


def end_with_parent() -> None:
    """Have the system end this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def failure_reason(log: Path, exit_code: int = 1) -> str:
    """Why a process with this exit code failed, by its output in `log`: its last error message, else its last line."""
    output = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")] or [line for line in lines if "Error" in line]
    reason = (errors or lines or ["no output"])[-1].removeprefix("error: ")[:300]
    return f"killed by signal {-exit_code}, after: {reason}" if exit_code < 0 else reason
