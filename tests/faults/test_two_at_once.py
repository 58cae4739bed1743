"""Two runs of one folder, and names that are not UTF-8: real runs."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.launch_ranks import run_on_ranks, run_train_script
from helpers.process_groups import FORWARD, RankProcesses, fault_at, kill_self, last_logged_step, read_records
from helpers.tiny_inputs import tiny_argv

pytestmark = pytest.mark.slow
FLAGS = "--mode full --objective completion --block-size 32 --global-batch 4 --micro-batch 4 --ds-config zero0"


@pytest.fixture
def start(tiny_model, data_files, tmp_path) -> Iterator[Callable[..., RankProcesses]]:
    """A function that starts launch/train.py on the tiny model into one folder, one process a run."""
    started: list[RankProcesses] = []

    def start(*flags: str, fault: Any = None) -> RankProcesses:
        argv = tiny_argv(tiny_model, data_files, f"{FLAGS} --wandb disabled", *flags)
        started.append(RankProcesses(argv, out=tmp_path / "run", world_size=1, fault=fault))
        return started[-1]

    yield start
    for run in started:
        for process in run.processes:
            process.kill()


def read_lr(folder: Path) -> float:
    return json.loads((folder / "run.json").read_text())["settings"]["train"]["lr"]


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of the steps, which are there once each."""
    rows = [row for row in read_records(folder) if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return rows


def test_a_second_run_into_a_folder_changes_nothing_there(start, out):
    first = start("--epochs", "2000", "--lr", "1e-3")
    first.wait_until(lambda: last_logged_step(out) >= 3)
    for flags, expected in ((["--lr", "2e-3"], "already holds a run"), (["--resume"], "is writing there")):
        second = start(*flags)
        assert second.wait(240) == [2], second.output
        assert expected in second.error_line
        assert read_lr(out) == 1e-3
    assert f"process {first.pid(0)} on " in second.error_line
    step = last_logged_step(out)
    first.wait_until(lambda: last_logged_step(out) >= step + 3)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == [143]
    read_steps(out)


def test_of_several_new_runs_at_once_one_runs_and_run_json_is_its_own(start, out):
    stop = fault_at(FORWARD, 20, partial(kill_self, signal.SIGTERM))  # which saves: faster than an export
    started = {lr: start("--max-steps", "40", "--lr", str(lr), fault=stop) for lr in (0.001, 0.002, 0.003)}
    exit_codes = {lr: run.wait(240)[0] for lr, run in started.items()}
    assert sorted(exit_codes.values()) == [2, 2, 143]
    assert all(run.error_line for lr, run in started.items() if exit_codes[lr] == 2)
    winner = next(lr for lr, code in exit_codes.items() if code == 143)
    assert (read_lr(out), read_steps(out)[0]["lr"]) == pytest.approx((winner, winner))


def run_without_stderr(argv: list[str]) -> int:
    """As after `2>&-` in a shell: the first file that is opened would take its place."""
    os.close(2)
    sys.stderr = None  # type: ignore[assignment]
    return run_train_script(argv)


def test_names_that_are_not_utf_8_and_a_closed_stderr_are_handled(tiny_model, data_files, out, tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/dat\xff\xe9.jsonl")
    Path(name).write_bytes(b"".join(Path(data_files[0]).read_bytes().splitlines(keepends=True)[1:]))
    argv = tiny_argv(tiny_model, (name, data_files[1]), f"{FLAGS} --wandb disabled --epochs 1 --export none")
    log = tmp_path / "log"
    assert run_on_ranks(1, run_without_stderr, [*argv, "--output-dir", str(out)], log=log) == 0, log.read_text()
    assert "dat\\udcff\\udce9.jsonl" in log.read_text()
    assert read_records(out)[-1]["event"] == "finished"
