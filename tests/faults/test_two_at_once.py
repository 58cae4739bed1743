"""Two runs of one folder, and names that are not UTF-8: real runs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from helpers.process_groups import (
    FORWARD,
    RankProcesses,
    fault_at,
    kill_self,
    last_logged_step,
    read_records,
)
from helpers.tiny_inputs import tiny_argv

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


class Runs:
    """Starts launch/train.py on the tiny model into one folder, one process a run."""

    def __init__(self, model: str, data_files: tuple[str, str], folder: Path):
        self.folder = folder
        text = "--mode full --objective completion --block-size 32 --global-batch 4 --micro-batch 4"
        self.flags = tiny_argv(model, data_files, f"{text} --ds-config zero0 --wandb disabled")
        self.started: list[RankProcesses] = []

    def start(self, *flags: str, stop_at: int | None = None) -> RankProcesses:
        """`stop_at`: the step in which a SIGTERM ends it, which saves: faster than an export."""
        fault = None if stop_at is None else fault_at(FORWARD, stop_at, partial(kill_self, signal.SIGTERM))
        self.started.append(RankProcesses([*self.flags, *flags], out=self.folder, world_size=1, fault=fault))
        return self.started[-1]

    def refuse(self, *flags: str) -> str:
        """The one error line of a run that is refused."""
        run = self.start(*flags)
        assert run.wait(240) == [2], run.output
        return run.error_line

    def lr(self) -> float:
        """Of run.json."""
        return json.loads((self.folder / "run.json").read_text())["settings"]["train"]["lr"]

    def check_steps(self) -> dict:
        """The row of the first step; all steps are there once."""
        rows = [row for row in read_records(self.folder) if row["kind"] == "step"]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return rows[0]


@pytest.fixture
def runs(tiny_model, data_files, tmp_path) -> Iterator[Runs]:
    runs = Runs(tiny_model, data_files, tmp_path / "run")
    yield runs
    for run in runs.started:
        for process in run.processes:
            process.kill()


def test_a_second_run_into_a_folder_changes_nothing_there(runs):
    first = runs.start("--epochs", "2000", "--lr", "1e-3")
    first.wait_until(lambda: last_logged_step(runs.folder) >= 3)
    assert "already holds a run" in runs.refuse("--epochs", "1", "--lr", "2e-3")
    assert runs.lr() == 1e-3
    line = runs.refuse("--resume")
    assert f"process {first.pid(0)} on " in line
    assert "is writing there" in line
    step = last_logged_step(runs.folder)
    first.wait_until(lambda: last_logged_step(runs.folder) >= step + 3)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == [143]
    runs.check_steps()


def test_of_several_new_runs_at_once_one_runs_and_run_json_is_its_own(runs):
    started = {lr: runs.start("--max-steps", "40", "--lr", str(lr), stop_at=20) for lr in (0.001, 0.002, 0.003)}
    exit_codes = {lr: run.wait(240)[0] for lr, run in started.items()}
    assert sorted(exit_codes.values()) == [2, 2, 143]
    assert all(run.error_line for lr, run in started.items() if exit_codes[lr] == 2)
    winner = next(lr for lr, code in exit_codes.items() if code == 143)
    assert runs.lr() == winner
    assert runs.check_steps()["lr"] == pytest.approx(winner)


def test_names_that_are_not_utf_8_and_locales_without_it_are_handled(runs, data_files, tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/dat\xff\xe9.jsonl")
    Path(name).write_bytes(b"".join(Path(data_files[0]).read_bytes().splitlines(keepends=True)[1:]))
    runs.flags[runs.flags.index("--data") + 1] = name
    command = ["bash", "-c", 'exec "$@" 2>&-', "run", sys.executable, "launch/train.py", *runs.flags]
    command += ["--output-dir", str(runs.folder), "--epochs", "1", "--export", "none"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=240)
    assert "dat\\udcff\\udce9.jsonl" in output.stdout
    assert read_records(runs.folder)[-1]["event"] == "finished"
