"""Two runs of one folder, rows that were changed before a resume, links in the folder, and no terminal: real runs."""

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
    list_checkpoints,
    read_records,
)
from helpers.tiny_inputs import tiny_argv

ROOT = Path(__file__).parents[2]


class Runs:
    """Starts launch/train.py on the tiny model into one folder, one process a run."""

    def __init__(self, model: str, data_files: tuple[str, str], folder: Path):
        self.folder = folder
        text = "--mode full --objective completion --block-size 32 --global-batch 4 --micro-batch 4"
        self.flags = tiny_argv(model, data_files, f"{text} --ds-config zero0 --wandb disabled")
        self.started: list[RankProcesses] = []

    def start(self, *flags: str, stop_at: int | None = None) -> RankProcesses:
        """`stop_at`: the step in which a SIGTERM ends it."""
        fault = None if stop_at is None else fault_at(FORWARD, stop_at, partial(kill_self, signal.SIGTERM))
        run = RankProcesses([*self.flags, *flags], out=self.folder, world_size=1, fault=fault)
        self.started.append(run)
        return run

    def finish(self, *flags: str, stop_at: int | None = None) -> int:
        """The exit code."""
        return self.start(*flags, stop_at=stop_at).wait(240)[0]

    def refuse(self, *flags: str) -> str:
        """The one error line of a run that is refused."""
        run = self.start(*flags)
        assert run.wait(240) == [2], run.output
        return run.error_line

    def finish_script(self, *flags: str, redirection: str = "") -> subprocess.CompletedProcess[str]:
        """The script in a shell, its streams as the shell sets them up."""
        command = ["bash", "-c", f'exec "$@" {redirection}', "run", sys.executable, "launch/train.py", *self.flags]
        return subprocess.run(
            [*command, "--output-dir", str(self.folder), *flags],
            cwd=ROOT,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=240,
            check=False,
        )

    def step_rows(self) -> list[int]:
        return [row["step"] for row in read_records(self.folder) if row["kind"] == "step"]


@pytest.fixture
def runs(tiny_model, data_files, tmp_path) -> Iterator[Runs]:
    runs = Runs(tiny_model, data_files, tmp_path / "run")
    yield runs
    for run in runs.started:
        for process in run.processes:
            process.kill()


@pytest.mark.slow
def test_a_second_run_into_a_folder_changes_nothing_there(runs):
    first = runs.start("--epochs", "2000", "--lr", "1e-3")
    first.wait_until(lambda: last_logged_step(runs.folder) >= 3)
    assert "is not empty" in runs.refuse("--epochs", "1", "--lr", "2e-3")
    assert json.loads((runs.folder / "run.json").read_text())["settings"]["train"]["lr"] == 1e-3
    line = runs.refuse("--resume")
    assert f"process {first.pid(0)} on " in line
    assert "is writing there" in line
    step = max(runs.step_rows())
    first.wait_until(lambda: last_logged_step(runs.folder) >= step + 3)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == [143]
    steps = runs.step_rows()
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_of_several_new_runs_at_once_one_runs_and_run_json_is_its_own(runs):
    started = {lr: runs.start("--max-steps", "40", "--lr", lr, stop_at=20) for lr in ("0.001", "0.002", "0.003")}
    exit_codes = {}
    for lr, run in started.items():
        (exit_codes[lr],) = run.wait(240)
        if exit_codes[lr] == 2:
            assert run.error_line
    assert sorted(exit_codes.values()) == [2, 2, 143]
    winner = next(lr for lr, code in exit_codes.items() if code == 143)
    assert json.loads((runs.folder / "run.json").read_text())["settings"]["train"]["lr"] == float(winner)
    first_step = next(row for row in read_records(runs.folder) if row["kind"] == "step")
    assert first_step["lr"] == pytest.approx(float(winner))
    steps = runs.step_rows()
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_changed_rows_are_refused_at_a_resume_or_said(runs):
    """The runs are stopped by a signal, which saves: an export would take longer than all the rest."""
    assert runs.finish("--epochs", "5", "--save-every", "3", stop_at=8) == 143
    path = runs.folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4] + lines[5:]))
    checkpoints = list_checkpoints(runs.folder)
    line = runs.refuse("--resume")
    assert "metrics.jsonl is not as it was when " in line
    assert "; restore it, or pass --allow-change records" in line
    assert list_checkpoints(runs.folder) == checkpoints
    assert runs.finish("--resume", "--allow-change", "records", stop_at=3) == 143
    event = next(row for row in read_records(runs.folder) if row.get("event") == "resumed")
    assert "records changed from as written to metrics.jsonl: one of its first " in event["message"]
    assert runs.finish("--resume", stop_at=2) == 143, "the new rows are as written"
    path.unlink()
    line = runs.refuse("--resume")
    assert "metrics.jsonl" in line
    assert "it cannot be read: No such file" in line


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&-", pytest.param("> /dev/full", marks=pytest.mark.sweep)])
def test_a_run_without_a_terminal_ends_well(redirection, runs):
    process = runs.finish_script("--epochs", "1", redirection=redirection)
    assert process.returncode == 0, process.stderr
    assert read_records(runs.folder)[-1]["event"] == "finished"


@pytest.mark.slow
def test_names_that_are_not_utf_8_and_locales_without_it_are_handled(runs, data_files, tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/dat\xff\xe9.jsonl")
    Path(name).write_bytes(b"".join(Path(data_files[0]).read_bytes().splitlines(keepends=True)[1:]))
    runs.flags[runs.flags.index("--data") + 1] = name
    process = runs.finish_script("--epochs", "1", "--export", "none")
    assert process.returncode == 0, process.stderr
    assert "dat\\udcff\\udce9.jsonl" in process.stdout


@pytest.mark.slow
def test_links_in_the_folder_are_not_written_through(runs, tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    runs.folder.mkdir()
    (runs.folder / ".run.json.tmp").symlink_to(target)
    assert runs.finish("--epochs", "2", stop_at=3) == 143
    metadata = runs.folder / "run.json"
    metadata.rename(tmp_path / "run.json")
    metadata.symlink_to(tmp_path / "run.json")
    before = (tmp_path / "run.json").read_bytes()
    (runs.folder / "metrics.jsonl.tmp").symlink_to(target)
    assert runs.finish("--resume") == 0
    assert target.read_text() == "precious"
    assert (tmp_path / "run.json").read_bytes() == before
