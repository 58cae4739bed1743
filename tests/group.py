"""Real ranks of a real run that can be killed, frozen and waited for, with a fault put into one of them if asked."""

import importlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ranks import CONTEXT, _work, command, environment, free_port

from trainer.tracking.silence import quiet

quiet()  # before the ranks' server imports torch: its store says on stderr that a killed rank is gone
ENDS = 60  # seconds after which a run that lost a rank must be gone


class Group:
    """`train.py` with these flags on `ranks` processes; `fault(rank)` is called in each of them before it begins."""

    def __init__(
        self, arguments: list[str], *, out: Path, ranks: int = 2, fault: Callable[[int], None] | None = None,
        env: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.out = out
        self.log = Path(os.environ["TRAINER_CACHE"]).parent / f"group-{time.monotonic_ns()}.log"  # not on a full disk
        self.log.touch()
        port, words = free_port(), [*arguments, "--out", str(out)]
        mark = {"GROUP_OUT": str(out)}  # by it `relatives` knows the programs that a rank starts
        self.processes = [
            CONTEXT.Process(
                target=_work,
                args=(
                    {**environment(rank, ranks, port), **mark, **(env or {})},
                    str(self.log),
                    _begin,
                    (fault, rank, words),
                ),
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def until(self, ready: Callable[[], Any], seconds: float = 120) -> None:
        """Wait until `ready()` is true while all ranks live."""
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, f"not ready:\n{self.log.read_text()}"
            assert all(process.is_alive() for process in self.processes), self.log.read_text()
            time.sleep(0.01)

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, to all where none is named."""
        for rank in ranks or range(len(self.processes)):
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait(self, seconds: float = ENDS) -> list[int]:
        """The ranks' exit codes; fails where one is still there after so many seconds."""
        end = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.join(max(0.0, end - time.monotonic()))
            codes = [process.exitcode for process in self.processes]
            if None in codes:
                pytest.fail(f"still running after {seconds} s: {codes}\n{self.log.read_text()}")
            return [code for code in codes if code is not None]
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.kill()

    @property
    def output(self) -> str:
        """All that the ranks printed."""
        return self.log.read_text()

    @property
    def errors(self) -> list[str]:
        """The lines for people about what went wrong; a traceback is never one of them."""
        assert "Traceback" not in self.output, self.output
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


def _begin(fault: Callable[[int], None] | None, rank: int, arguments: list[str]) -> int:
    if fault is not None:
        fault(rank)
    return command(arguments)


def rows(out: Path) -> list[dict[str, Any]]:
    """Every row of metrics.jsonl; raises where a line is not whole JSON (a cut last line aside: it has no newline)."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def science(out: Path) -> list[dict[str, Any]]:
    """The rows of steps, evaluations and epochs without what a clock says: the same for every run of these settings."""
    clock = ("time", "tokens_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows(out) if row["kind"] != "event"]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    """The events of that name."""
    return [row for row in rows(out) if row["kind"] == "event" and row["event"] == name]


def told(out: Path, step: int) -> list[str]:
    """Kinds and events of a step's rows, without what a run noticed of its own speed: that depends on the clock."""
    names = [row.get("event", row["kind"]) for row in rows(out) if row["step"] == step]
    return [name for name in names if name != "diagnosis"]


def steps_done(out: Path) -> int:
    """The newest step in metrics.jsonl, -1 before the first row."""
    return max((row["step"] for row in rows(out)), default=-1) if (out / "metrics.jsonl").exists() else -1


def relatives(text: str) -> list[int]:
    """Processes on this machine whose command line or environment holds `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in words and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def die(number: int = signal.SIGKILL) -> None:
    """What a fault does."""
    os.kill(os.getpid(), number)


def at_call(rank: int, who: int, module: str, name: str, number: int | range, action: Callable[[], Any] = die) -> None:
    """A fault: in rank `who`, do `action` before the `number`-th call (or calls) of a function or method."""
    if rank != who:
        return
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    kept, calls = getattr(owner, last), 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number or (isinstance(number, range) and calls in number):
            action()
        return kept(*args, **kwargs)

    setattr(owner, last, faulty)
