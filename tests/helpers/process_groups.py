"""Real ranks of a real run that can be killed, frozen and waited for, with a fault put into one of them if asked."""

import importlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.launch_ranks import _run_worker, find_free_port, make_environ, make_process, run_train_script
from trainer.tracking.silence import silence_libraries

silence_libraries()  # before the ranks' server imports torch: its store says on stderr that a killed rank is gone
EXIT_TIMEOUT_SECONDS = 60  # seconds after which a run that lost a rank must be gone


class RankProcesses:
    """`train.py` with these flags on `world_size` processes; `fault(rank)` is called in each before it begins."""

    def __init__(
        self, flags: list[str], *, out: Path, world_size: int = 2, fault: Callable[[int], None] | None = None,
        env: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.out = out
        self.log = Path(os.environ["TRAINER_CACHE"]).parent / f"group-{time.monotonic_ns()}.log"  # not on a full disk
        self.log.touch()
        port, argv = find_free_port(), [*flags, "--output-dir", str(out)]
        marker = {"GROUP_OUT": str(out)}  # by it `relatives` knows the programs that a rank starts
        self.processes = [
            make_process(
                target=_run_worker,
                args=(
                    {**make_environ(rank, world_size, port), **marker, **(env or {})},
                    str(self.log),
                    _run_with_fault,
                    (fault, rank, argv),
                ),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait_until(self, is_ready: Callable[[], Any], timeout_seconds: float = 120) -> None:
        """Wait until `is_ready()` is true while all ranks live."""
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            assert time.monotonic() < deadline, f"not ready:\n{self.log.read_text()}"
            assert all(process.is_alive() for process in self.processes), self.log.read_text()
            time.sleep(0.01)

    def send_signal(self, signum: int, *ranks: int) -> None:
        """Send a signal to these ranks, to all where none is named."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, signum)

    def wait(self, timeout_seconds: float = EXIT_TIMEOUT_SECONDS) -> list[int]:
        """The ranks' exit codes; fails where one is still there after so many seconds."""
        deadline = time.monotonic() + timeout_seconds
        try:
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            exit_codes = [process.exitcode for process in self.processes]
            if None in exit_codes:
                pytest.fail(f"still running after {timeout_seconds} s: {exit_codes}\n{self.log.read_text()}")
            return [exit_code for exit_code in exit_codes if exit_code is not None]
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.kill()

    @property
    def output(self) -> str:
        """All that the ranks printed."""
        return self.log.read_text()

    @property
    def error_lines(self) -> list[str]:
        """The lines for people about what went wrong; a traceback is never one of them."""
        assert "Traceback" not in self.output, self.output
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def _run_with_fault(fault: Callable[[int], None] | None, rank: int, argv: list[str]) -> int:
    if fault is not None:
        fault(rank)
    return run_train_script(argv)


def read_records(out: Path) -> list[dict[str, Any]]:
    """Every row of metrics.jsonl; raises where a line is not whole JSON (a cut last line aside: it has no newline)."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def read_reproducible_records(out: Path) -> list[dict[str, Any]]:
    """The rows of steps, evaluations and epochs without what a clock says: the same for every run of these settings."""
    return reproducible_records(read_records(out))


def reproducible_records(records: Iterable[dict[str, Any]], after: int = -1) -> list[dict[str, Any]]:
    """Of these rows, those after a step."""
    clock_columns = ("time", "tokens_per_second")
    return [
        {key: value for key, value in record.items() if key not in clock_columns}
        for record in records
        if record["kind"] != "event" and record["step"] > after
    ]


def read_events(out: Path, name: str) -> list[dict[str, Any]]:
    """The events of that name."""
    return [record for record in read_records(out) if record["kind"] == "event" and record["event"] == name]


def record_names_at_step(out: Path, step: int) -> list[str]:
    """Kinds and events of a step's rows, without what a run noticed of its own speed: that depends on the clock."""
    names = [record.get("event", record["kind"]) for record in read_records(out) if record["step"] == step]
    return [name for name in names if name != "diagnosis"]


def last_logged_step(out: Path) -> int:
    """The newest step in metrics.jsonl, -1 before the first row."""
    return max((record["step"] for record in read_records(out)), default=-1) if (out / "metrics.jsonl").exists() else -1


def find_processes(text: str) -> list[int]:
    """Processes on this machine whose command line or environment holds `text`."""
    pids = []
    for proc_dir in Path("/proc").glob("[0-9]*"):
        try:
            command_and_environ = (proc_dir / "cmdline").read_bytes() + (proc_dir / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in command_and_environ and int(proc_dir.name) != os.getpid():
            pids.append(int(proc_dir.name))
    return pids


def kill_self(signum: int = signal.SIGKILL) -> None:
    """What a fault does; a signal that is handled has been noticed when this returns, by another thread."""
    os.kill(os.getpid(), signum)
    time.sleep(0.5)


def inject_at_call(
    rank: int, target_rank: int, module: str, name: str, call_number: int | range, action: Callable[[], Any] = kill_self
) -> None:
    """A fault: in rank `target_rank`, do `action` before the `call_number`-th call (or calls) of a function."""
    if rank != target_rank:
        return
    owner: Any = importlib.import_module(module)
    *path, function_name = name.split(".")
    for attribute in path:
        owner = getattr(owner, attribute)
    original, num_calls = getattr(owner, function_name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call_number or (isinstance(call_number, range) and num_calls in call_number):
            action()
        return original(*args, **kwargs)

    setattr(owner, function_name, faulty)
