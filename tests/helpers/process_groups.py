"""Real ranks of a real run that can be killed, frozen and waited for, with a fault put into one of them if asked."""

import contextlib
import json
import os
import pkgutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from helpers.launch_ranks import (
    BIN_DIR,
    TRAIN_SCRIPT,
    _run_worker,
    find_free_port,
    make_environ,
    make_process,
    run_train_script,
    train,
)

EXIT_TIMEOUT_SECONDS = 60.0  # after which a run that lost a rank must be gone
FORWARD = "trainer.distributed.engine:Engine.forward_backward"  # the function in which most faults happen

Fault = Callable[[int], None]  # what is called in each rank, with its number, before it begins


def wait_until(is_ready: Callable[[], Any], timeout_seconds: float = 120, report: Callable[[], object] = str) -> None:
    """Until `is_ready()` is true; fails with what `report()` says after so many seconds."""
    deadline = time.monotonic() + timeout_seconds
    while not is_ready():
        assert time.monotonic() < deadline, f"not ready:\n{report()}"
        time.sleep(0.02)


class Ranks:
    """The processes of one run, which are started, and what they print into these logs."""

    def __init__(self, processes: Sequence[BaseProcess], logs: Sequence[Path]):
        self.processes, self.logs = processes, logs
        for process in processes:
            process.start()

    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait_until(self, is_ready: Callable[[], Any], timeout_seconds: float = 120) -> None:

        def is_ready_while_alive() -> Any:
            assert self.is_alive(), self.output
            return is_ready()

        wait_until(is_ready_while_alive, timeout_seconds, lambda: self.output)

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid or 0

    def send_signal(self, signum: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.pid(rank), signum)

    def wait(self, timeout_seconds: float = EXIT_TIMEOUT_SECONDS) -> list[int]:
        """The ranks' exit codes; fails where one is still there after so many seconds."""
        deadline = time.monotonic() + timeout_seconds
        try:
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            exit_codes = [process.exitcode for process in self.processes]
            if None in exit_codes:
                pytest.fail(f"still running after {timeout_seconds} s: {exit_codes}\n{self.output}")
            return [exit_code for exit_code in exit_codes if exit_code is not None]
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.kill()

    @property
    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    @property
    def error_lines(self) -> list[str]:
        """The lines for people about what went wrong; a traceback is never one of them."""
        assert "Traceback" not in self.output, self.output
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    @property
    def error_line(self) -> str:
        assert len(self.error_lines) == 1, self.output
        return self.error_lines[0]


class RankProcesses(Ranks):
    """`train.py` with these flags on `world_size` processes of this machine."""

    def __init__(
        self,
        flags: list[str],
        *,
        out: Path,
        world_size: int = 2,
        fault: Fault | None = None,
        env: Mapping[str, str] | None = None,
    ):
        log = Path(os.environ["TRAINER_CACHE"]).parent / f"group-{time.monotonic_ns()}.log"  # not on a full disk
        log.touch()
        port, argv = find_free_port(), [*flags, "--output-dir", str(out)]
        marker = {"GROUP_OUT": str(out)}  # by it `find_processes` knows the programs that a rank starts
        environs = [{**make_environ(rank, world_size, port), **marker, **(env or {})} for rank in range(world_size)]
        super().__init__(
            [
                make_process(target=_run_worker, args=(environ, str(log), _run_with_fault, (fault, rank, argv)))
                for rank, environ in enumerate(environs)
            ],
            [log],
        )


def run_to_error(flags: list[str], *, out: Path, fault: Fault | None = None, exit_code: int = 2) -> str:
    run = RankProcesses(flags, out=out, fault=fault)
    assert run.wait() == [exit_code] * 2, run.output
    return run.error_line


class LaunchedRun:
    """`train.py` with these flags under the `deepspeed` command, torchrun or plain Python, in a session of its own."""

    def __init__(
        self, launcher: str, argv: list[str], *, out: Path, num_ranks: int = 2, env: Mapping[str, str] | None = None
    ):
        self.out, self.log = out, out.with_suffix(".log")
        command = [str(BIN_DIR / launcher)]
        if launcher != "python":
            num_ranks_flag = "--num_gpus" if launcher == "deepspeed" else "--nproc_per_node"
            command += [num_ranks_flag, str(num_ranks), "--master_port", str(find_free_port())]
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN_DIR}{os.pathsep}{os.environ['PATH']}"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, TRAIN_SCRIPT, *argv, "--output-dir", str(out)],
                env={**environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout_seconds: float = EXIT_TIMEOUT_SECONDS) -> list[int]:
        """The launcher's exit code, once all that it started is gone too."""
        exit_code = self.process.wait(timeout_seconds)
        try:
            wait_until(lambda: not find_processes(str(self.out)), timeout_seconds, lambda: self.output)
        finally:
            self.kill()
        return [exit_code]

    def kill(self) -> None:
        for pid in find_processes(str(self.out)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


def _run_with_fault(fault: Fault | None, rank: int, argv: list[str]) -> int:
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
    clock_columns = ("time", "tokens_per_second")
    return [
        {key: value for key, value in record.items() if key not in clock_columns}
        for record in records
        if record["kind"] != "event" and record["step"] > after
    ]


def assert_resumes_like(finished_run: Path, argv: list[str], out: Path) -> str:
    """--resume ends well and leaves the rows of a run that nothing happened to; what it printed."""
    output = train([*argv, "--resume"], out=out, world_size=2)
    assert read_reproducible_records(out) == read_reproducible_records(finished_run)
    return output


def read_events(out: Path, name: str) -> list[dict[str, Any]]:
    return [record for record in read_records(out) if record["kind"] == "event" and record["event"] == name]


def record_names_at_step(out: Path, step: int) -> list[str]:
    """Kinds and events, without what a run noticed of its own speed: that depends on the clock."""
    names = [record.get("event", record["kind"]) for record in read_records(out) if record["step"] == step]
    return [name for name in names if name != "diagnosis"]


def last_logged_step(out: Path) -> int:
    return max((record["step"] for record in read_records(out)), default=-1) if (out / "metrics.jsonl").exists() else -1


def list_checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def find_processes(text: str) -> list[int]:
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
    """A signal that is handled has been noticed when this returns, by another thread."""
    os.kill(os.getpid(), signum)
    time.sleep(0.5)


def fault_at(place: str, call_number: int | range, action: Callable[[], Any] = kill_self, *, rank: int = 0) -> Fault:
    """A fault: rank `rank` does `action` before the so-maniest call (or calls) of a function, `module:name`."""
    return partial(_inject, place=place, call_number=call_number, action=action, target_rank=rank)


def _inject(rank: int, place: str, call_number: int | range, action: Callable[[], Any], target_rank: int) -> None:
    if rank != target_rank:
        return
    module, _, name = place.partition(":")
    owner_name, _, function_name = name.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{owner_name}")
    original, num_calls = getattr(owner, function_name), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call_number or (isinstance(call_number, range) and num_calls in call_number):
            action()
        return original(*args, **kwargs)

    setattr(owner, function_name, faulty)
