"""kill -9, at any moment and at every stage of a save: the next --resume goes on from the newest whole checkpoint.

Real processes, really killed. After each: nothing of the run is left running, every rank that was not killed has ended
with a non-zero code within 60 s, metrics.jsonl is whole rows, and the run that goes on leaves the rows of a run that
was never killed. `helpers/fault_campaign.py` does the same at hundreds of random moments.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import save_stub_checkpoint
from helpers.launch_ranks import FRESH_EXPORT, run_on_ranks, train
from helpers.process_groups import (
    EXIT_TIMEOUT_SECONDS,
    FORWARD,
    LaunchedRun,
    RankProcesses,
    fault_at,
    find_processes,
    kill_self,
    last_logged_step,
    read_records,
    read_reproducible_records,
    record_names_at_step,
    wait_until,
)
from safetensors.torch import load_file

from trainer.training.checkpoint import delete_checkpoints_after, resolve_checkpoint

STEPS = 8
# a call of `Engine.forward_backward` inside a window: each step has three on each rank, this is the second of step 3
MID_ACCUMULATION_CALL = 8


@pytest.fixture(scope="module")
def argv(argv: list[str]) -> list[str]:
    """Steps of three micro-batches on each rank, and older checkpoints deleted."""
    return [*argv, "--micro-batch", "1", "--save-total-limit", "2"]


@pytest.fixture(scope="module")
def uninterrupted_records(finished_run: Path) -> list[dict[str, Any]]:
    """The rows of the run that nobody kills."""
    return read_reproducible_records(finished_run)


def assert_resumes(argv: list[str], out: Path, uninterrupted_records: list[dict[str, Any]]) -> None:
    """--resume ends well and leaves the rows of the whole run, none twice and none missing."""
    records_before = read_records(out) if (out / "metrics.jsonl").exists() else []
    output = train([*argv, "--resume"], out=out, world_size=2)
    assert read_reproducible_records(out) == uninterrupted_records
    assert read_records(out)[-1]["event"] == "finished", output
    (message,) = [row["message"] for row in read_records(out) if row.get("event") == "resumed"]
    assert not list(out.rglob("*.tmp")), "leftovers of the killed run"
    newest = max((row["step"] // 2 * 2 for row in records_before), default=0)
    assert newest < 4 or any(f"step-{step:06d}" in message for step in (newest, newest - 2)), (message, newest)


SAVE_MODULES = ("trainer.training.checkpoint", "trainer.config.files")
SAVE_FUNCTIONS = ("save", "_write_safetensors", "_write_chunks", "_format_metadata", "_delete_folder", "new_folder")


def save_and_kill_at_line(folder: Path, line: int) -> None:
    """Save step 3 into a folder that has 1 and 2; at the `line`-th line that a save executes, die."""
    num_lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal num_lines
        if frame.f_globals["__name__"] not in SAVE_MODULES or frame.f_code.co_name not in SAVE_FUNCTIONS:
            return None
        if event == "line":
            num_lines += 1
            if num_lines == line:
                kill_self()
        return trace

    sys.settrace(trace)
    save_stub_checkpoint(folder, 3)


def kill_at_every_line(folder: Path) -> int:
    """In folder/N: a save killed at its N-th line, in a process of its own; the last one is not killed any more."""
    for step in (1, 2):
        save_stub_checkpoint(folder / "before", step)
    for line in range(1, 1000):
        shutil.copytree(folder / "before", folder / str(line))
        child = os.fork()
        if child == 0:
            save_and_kill_at_line(folder / str(line), line)
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            return 0
    return 1


def test_a_save_killed_at_any_line_leaves_the_previous_checkpoint_in_force(tmp_path):
    assert run_on_ranks(1, kill_at_every_line, tmp_path, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    steps_in_force = []
    for line in range(1, len(list(tmp_path.glob("[0-9]*"))) + 1):
        source = resolve_checkpoint(tmp_path / str(line), "latest")  # its checksums are verified
        weight = load_file(source.folder / "state.safetensors")["weight/w"]
        assert torch.equal(weight, torch.full((3,), float(source.step))), line
        assert not source.skipped_reasons, "nothing half-written bears the name of a checkpoint"
        steps_in_force.append(source.step)
        delete_checkpoints_after(tmp_path / str(line), source.step)  # what a resume does first
        assert not [path.name for path in (tmp_path / str(line)).iterdir() if path.name.startswith(".")], line
    num_kills, num_old = len(steps_in_force) - 1, steps_in_force.count(2)
    assert num_kills >= 60
    assert steps_in_force == [2] * num_old + [3] * (num_kills + 1 - num_old), "one moment from which on it is in force"
    assert 0 < num_old <= num_kills
    print(f"{num_kills} kills in a save: {num_old} left the old checkpoint in force, the rest the new one")


@pytest.mark.parametrize(
    ("rank", "place", "number"),
    [
        (0, FORWARD, MID_ACCUMULATION_CALL),
        (0, "trainer.training.checkpoint:_write_chunks", 40),  # within the tensors of the first save
        (0, "trainer.export.verify:verify_folder", 1),
    ],
)
def test_a_killed_rank_ends_the_run_and_loses_nothing(rank, place, number, argv, uninterrupted_records, out):
    fault = fault_at(place, number, rank=rank)
    group = RankProcesses(argv, out=out, fault=fault)
    codes = group.wait()
    assert codes[rank] == -signal.SIGKILL, group.output
    assert codes[1 - rank] == 1
    assert f"rank {rank} of this run ended without a word" in group.error_line
    assert not find_processes(str(out)), "nothing stays running"
    assert_resumes(argv, out, uninterrupted_records)


def test_a_run_whose_ranks_are_all_killed_at_once_resumes(argv, uninterrupted_records, out):
    group = RankProcesses(argv, out=out)
    group.wait_until(lambda: last_logged_step(out) >= 5)
    group.send_signal(signal.SIGKILL)
    assert group.wait() == [-signal.SIGKILL] * 2
    assert not find_processes(str(out))
    assert_resumes(argv, out, uninterrupted_records)


def test_child_processes_of_a_killed_rank_end_with_the_rank(argv, uninterrupted_records, out):
    """The process that exports, and the W&B service: nobody else would end them."""
    group = RankProcesses(argv, out=out, env={"WANDB_MODE": "offline"} | FRESH_EXPORT)
    programs = ("trainer.export.fresh_process", "wandb-core")
    group.wait_until(lambda: last_logged_step(out) == STEPS and all(has_child_program(out, name) for name in programs))
    group.send_signal(signal.SIGKILL, 0)
    assert group.wait() == [-signal.SIGKILL, 1]
    wait_until(lambda: not find_processes(str(out)), EXIT_TIMEOUT_SECONDS)
    assert_resumes(argv, out, uninterrupted_records)


def has_child_program(out: Path, program: str) -> bool:
    """Whether a program with this name runs that a rank of this run has started."""
    lines = [Path(f"/proc/{pid}/cmdline") for pid in find_processes(str(out))]
    return any(program in line.read_text() for line in lines if line.exists())


def test_a_run_killed_before_its_first_record_can_be_started_again(argv, uninterrupted_records, out, tmp_path):
    """run.json is written and no more; and, one moment earlier, half of run.json."""
    RankProcesses(argv, out=out, fault=fault_at("trainer.training.recorder:show_plan", 1)).wait()
    assert sorted(path.name for path in out.iterdir()) == [".run.lock", "run.json"], "the lock died with its process"
    assert_resumes(argv, out, uninterrupted_records)

    out = tmp_path / "half"
    out.mkdir()
    (out / ".run.json.tmp").write_text('{"format": 1, "run_')
    train(argv, out=out, world_size=2)  # no --resume: there is no run yet
    assert read_reproducible_records(out) == uninterrupted_records


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ranks_of_a_killed_launcher_save_and_end(launcher, argv, out):
    """SIGKILL to the `deepspeed` command leaves a second launcher and its ranks without anybody who waits for them."""
    with launched_run(launcher, argv, out) as run:
        run.process.kill()
        run.wait()
    (line,) = [line for line in run.output.splitlines() if line.startswith("error: ")]
    assert "launcher" in line
    assert "Traceback" not in run.output
    assert_saved(out, run.output)


def assert_saved(out: Path, output: str) -> None:
    """The step in hand ended and was saved."""
    last = read_records(out)[-1]
    assert last["event"] == "interrupted", output
    assert resolve_checkpoint(out / "checkpoints", "latest").step == last["step"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.sweep)])
def test_a_signal_under_the_deepspeed_launcher_saves_first(number, argv, out):
    """It signals the ranks once more in its own order, the W&B service of each before the rank; its own code is by the
    signal, or 1 where its inner process, which ends with 1, is waited for first."""
    with launched_run("deepspeed", argv, out, WANDB_MODE="offline") as run:
        os.killpg(run.process.pid, number)  # as Ctrl-C does
        assert run.wait()[0] in {-number, 1}, run.output
    assert run.output.count("What is trained") == 1, "one voice, whatever the number of ranks"
    assert_saved(out, run.output)


@contextlib.contextmanager
def launched_run(launcher: str, argv: list[str], out: Path, **env: str) -> Iterator[LaunchedRun]:
    """A long run past its third step; in the end nothing of it is left."""
    long_argv = [*argv, "--max-steps", "5000", "--eval-every", "never", "--save-every", "never"]
    run = LaunchedRun(launcher, long_argv, out=out, env={"GROUP_OUT": str(out), **env})
    try:
        wait_until(lambda: last_logged_step(out) >= 3, 120, lambda: run.output)
        yield run
    finally:
        run.kill()


def test_a_stopped_run_killed_before_it_amends_its_checkpoint_repeats_no_record(argv, uninterrupted_records, out):
    """A signal's checkpoint has the evaluation of its step still to come: killed after its row, it is made again. The
    signal comes inside an accumulation window: the whole of the step in hand is done, and nothing of the next."""
    stop = fault_at(FORWARD, MID_ACCUMULATION_CALL, partial(kill_self, signal.SIGTERM), rank=1)
    assert RankProcesses(argv, out=out, fault=stop).wait() == [143, 143]
    state = json.loads((out / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["progress"]["eval_pending"], "step 3 has an evaluation due"
    assert record_names_at_step(out, 3) == ["step", "checkpoint", "interrupted"]
    kill = fault_at("trainer.training.checkpoint:CheckpointManager.update_train_state", 1)
    RankProcesses([*argv, "--resume"], out=out, fault=kill).wait()
    names = ["step", "checkpoint", "interrupted", "resumed", "eval", "samples"]
    assert record_names_at_step(out, 3) == names
    train([*argv, "--resume"], out=out, world_size=2)
    assert read_reproducible_records(out) == uninterrupted_records
