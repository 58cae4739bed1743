"""Two runs of one folder, rows that were changed before a resume, links in the folder, and no terminal: real runs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_inputs import TEMPLATE_FLAGS

ROOT = Path(__file__).parents[2]


class Runs:
    """Starts launch/train.py on the tiny model, one process a run."""

    def __init__(self, model: str, data_files: tuple[str, str], folder: Path):
        self.folder = folder
        self.flags = [
            "--mode", "full", "--model", model, "--data", data_files[0], "--val-data", data_files[1],
            "--objective", "completion", "--block-size", "32", "--global-batch", "4", "--micro-batch", "4",
            "--ds-config", "zero0", "--wandb", "disabled", "--output-dir", str(folder),
            "--preset", "demo", *TEMPLATE_FLAGS,
        ]  # fmt: skip
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *flags: str, redirection: str = "") -> "subprocess.Popen[str]":
        command = ["bash", "-c", f'exec "$@" {redirection}', "run", sys.executable, "launch/train.py"]
        process = subprocess.Popen(
            [*command, *self.flags, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def finish(self, *flags: str, redirection: str = "") -> tuple[int, str, str]:
        process = self.start(*flags, redirection=redirection)
        stdout, stderr = process.communicate(timeout=240)
        return process.returncode, stdout, stderr

    def wait_for_row(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if any(row["kind"] == "step" and row["step"] >= step for row in self.rows()):
                return
            time.sleep(0.05)
        raise AssertionError("the run does not get on")

    def rows(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def step_rows(self) -> list[int]:
        return [row["step"] for row in self.rows() if row["kind"] == "step"]


@pytest.fixture
def runs(tiny_model, data_files, tmp_path) -> Iterator[Runs]:
    runs = Runs(tiny_model, data_files, tmp_path / "run")
    yield runs
    for process in runs.processes:
        process.kill()
        process.communicate()


def assert_one_line(stderr: str, *words: str) -> None:
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert all(word in stderr for word in words), stderr


@pytest.mark.slow
def test_a_second_run_into_a_folder_changes_nothing_there(runs):
    first = runs.start("--epochs", "2000", "--lr", "1e-3")
    runs.wait_for_row(3)
    exit_code, _, stderr = runs.finish("--epochs", "1", "--lr", "2e-3")
    assert exit_code == 2
    assert_one_line(stderr, "is not empty")
    assert json.loads((runs.folder / "run.json").read_text())["settings"]["train"]["lr"] == 1e-3
    exit_code, _, stderr = runs.finish("--resume")
    assert exit_code == 2
    assert_one_line(stderr, f"process {first.pid} on ", "is writing there")
    runs.wait_for_row(max(runs.step_rows()) + 3)
    first.terminate()
    assert first.wait(timeout=120) == 143
    steps = runs.step_rows()
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_of_several_new_runs_at_once_one_runs_and_run_json_is_its_own(runs):
    started = {lr: runs.start("--max-steps", "20", "--lr", lr) for lr in ("0.001", "0.002", "0.003")}
    exit_codes = {}
    for lr, process in started.items():
        _, stderr = process.communicate(timeout=400)
        exit_codes[lr] = process.returncode
        if process.returncode:
            assert_one_line(stderr)
    assert sorted(exit_codes.values()) == [0, 2, 2]
    winner = next(lr for lr, code in exit_codes.items() if code == 0)
    assert json.loads((runs.folder / "run.json").read_text())["settings"]["train"]["lr"] == float(winner)
    first_step = next(row for row in runs.rows() if row["kind"] == "step")
    assert first_step["lr"] == pytest.approx(float(winner))
    assert runs.step_rows() == list(range(1, 21))


@pytest.mark.slow
def test_changed_rows_are_refused_at_a_resume_or_said(runs):
    assert runs.finish("--epochs", "2", "--save-every", "3")[0] == 0
    path = runs.folder / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4] + lines[5:]))
    checkpoints = sorted(folder.name for folder in (runs.folder / "checkpoints").iterdir())
    exit_code, _, stderr = runs.finish("--resume", "--epochs", "3", "--allow-change", "epochs")
    assert exit_code == 2
    assert_one_line(stderr, "metrics.jsonl is not as it was when ", "follows step", "--allow-change records")
    assert sorted(folder.name for folder in (runs.folder / "checkpoints").iterdir()) == checkpoints
    exit_code, _, _ = runs.finish("--resume", "--epochs", "3", "--allow-change", "records", "--allow-change", "epochs")
    assert exit_code == 0
    event = next(row for row in runs.rows() if row.get("event") == "resumed")
    assert "records changed from as written to line 5" in event["message"]
    assert runs.finish("--resume", "--epochs", "4", "--allow-change", "epochs")[0] == 0, "the new rows are as written"
    path.unlink()
    exit_code, _, stderr = runs.finish("--resume", "--epochs", "5", "--allow-change", "epochs")
    assert exit_code == 2
    assert_one_line(stderr, "metrics.jsonl", "it is gone")


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&-", "> /dev/full"])
def test_a_run_without_a_terminal_ends_well(runs, redirection):
    exit_code, _, stderr = runs.finish("--epochs", "1", redirection=redirection)
    assert exit_code == 0, stderr
    assert runs.rows()[-1]["event"] == "finished"


@pytest.mark.slow
def test_names_that_are_not_utf_8_and_locales_without_it_are_handled(runs, data_files, tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/dat\xff\xe9.jsonl")
    Path(name).write_bytes(b"".join(Path(data_files[0]).read_bytes().splitlines(keepends=True)[1:]))
    runs.flags[runs.flags.index("--data") + 1] = name
    exit_code, stdout, stderr = runs.finish("--epochs", "1")
    assert exit_code == 0, stderr
    assert "dat\\udcff\\udce9.jsonl" in stdout


@pytest.mark.slow
def test_links_in_the_folder_are_not_written_through(runs, tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    runs.folder.mkdir()
    (runs.folder / ".run.json.tmp").symlink_to(target)
    assert runs.finish("--epochs", "1")[0] == 0
    metadata = runs.folder / "run.json"
    metadata.rename(tmp_path / "run.json")
    metadata.symlink_to(tmp_path / "run.json")
    before = (tmp_path / "run.json").read_bytes()
    (runs.folder / "metrics.jsonl.tmp").symlink_to(target)
    assert runs.finish("--resume", "--epochs", "2", "--allow-change", "epochs")[0] == 0
    assert target.read_text() == "precious"
    assert (tmp_path / "run.json").read_bytes() == before
