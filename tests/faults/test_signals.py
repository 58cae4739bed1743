"""A run that is told to stop, and one that cannot go on because a rank hangs, is lost or fails alone. Real ranks and
real signals. A hanging rank sleeps or is frozen (SIGSTOP); one line names it, and all end within 60 s."""

import re
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
from helpers.launch_ranks import train
from helpers.process_groups import (
    FORWARD,
    RankProcesses,
    fault_at,
    find_processes,
    kill_self,
    last_logged_step,
    list_checkpoints,
    read_events,
    read_reproducible_records,
    record_names_at_step,
)

HANG_TIMEOUT_FLAGS = ["--hang-timeout", "5"]
NO_PROGRESS = r"no rank made progress for 5 s \(--hang-timeout\): "
hang_on = partial(time.sleep, 300)


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "to", "code"),
    [(signal.SIGINT, (0, 1), 130), (signal.SIGUSR1, (1,), 138)],  # the second: the notice of SLURM's --signal
)
def test_a_signal_finishes_the_step_saves_and_the_run_resumes_later(number, to, code, argv, finished_run, out):
    group = RankProcesses([*argv, "--resume", "auto"], out=out)  # begins, since there is nothing yet
    group.wait_until(lambda: last_logged_step(out) >= 1)
    group.send_signal(number, *to)
    assert group.wait() == [code, code], group.output
    assert group.error_lines == []
    last = read_events(out, "interrupted")[0]["step"]
    assert 1 <= last < 8
    assert f"step-{last:06d}" in list_checkpoints(out)
    assert (out / "requeue").read_text() == f"{signal.Signals(number).name}\n"
    if number == signal.SIGINT:  # one of them is enough
        train([*argv, "--resume", "auto"], out=out, world_size=2)
        assert not (out / "requeue").exists()
        assert read_reproducible_records(out) == read_reproducible_records(finished_run)


def test_a_signal_during_an_evaluation_does_not_wait_for_the_evaluation(argv, data_files, out):
    """Of 11 batches a rank; it is asked for before the first and the ninth."""
    train_data, val_data = data_files
    argv = [train_data if flag == val_data else flag for flag in argv] + ["--allow-leakage", "--eval-batch", "1"]
    slow = fault_at("trainer.distributed.engine:Engine.evaluate", range(12, 23), partial(time.sleep, 0.3))
    group = RankProcesses(argv, out=out, fault=slow)
    group.wait_until(lambda: last_logged_step(out) >= 3)
    group.send_signal(signal.SIGTERM)
    assert group.wait() == [143, 143]
    assert record_names_at_step(out, 3) == ["step", "checkpoint", "interrupted"]
    train([*argv, "--resume"], out=out, world_size=2)  # which makes the evaluation that was given up
    assert record_names_at_step(out, 3)[3:] == ["resumed", "eval", "samples"]


# --- ranks that hang or fail alone -------------------------------------------------------------------------------


class Hang(NamedTuple):
    """Where a rank of one run sleeps or is killed, and a pattern of the line that says so."""

    place: str
    number: int  #: of the call
    rank: int
    message: str
    flags: str = ""
    action: Callable[[], Any] = hang_on


HANGS = [
    Hang(FORWARD, 4, 1, r"rank 1 hangs at engine\.py:"),
    Hang("trainer.run:evaluate_other_splits", 2, 1, r"rank 1 hangs at run\.py:", "--test-fraction 0.2 --max-steps 2"),
    Hang("trainer.export.export_cli:export_checkpoint", 1, 0, r"rank 0 hangs at run\.py:", "--max-steps 2"),
    Hang("trainer.data.prepare:encode", 1, 0, r"rank 0 hangs at prepare\.py:"),
    Hang("torch.distributed:new_group", 1, 1, "rank 1 (hangs at process_group.py|does not answer)"),
    Hang("torch.distributed:init_process_group", 1, 1, "rank 1 (does not answer|of this run ended)", action=kill_self),
]


def test_a_rank_that_hangs_anywhere_is_named(argv, tmp_path):
    """All runs at once: most of their time is waiting."""
    runs = []
    for number, hang in enumerate(HANGS):
        out = tmp_path / f"run-{number}"
        fault = fault_at(hang.place, hang.number, hang.action, rank=hang.rank)
        env = {"TRAINER_CACHE": str(tmp_path / f"cache-{number}")}  # the data are prepared
        runs.append(RankProcesses([*argv, *HANG_TIMEOUT_FLAGS, *hang.flags.split()], out=out, fault=fault, env=env))
    for hang, run in zip(HANGS, runs, strict=True):
        is_killed = hang.action is kill_self
        assert [code for code in run.wait(90) if code > 0] == [1] * (1 if is_killed else 2), run.output
        assert re.search(("" if is_killed else NO_PROGRESS) + hang.message, run.error_line), (hang, run.error_line)
    for number in (0, 1):
        stacks = {path.name: path.read_text() for path in (tmp_path / f"run-{number}" / "stacks").iterdir()}
        assert sorted(stacks) == ["rank-0.txt", "rank-1.txt"]
        assert all("Timeout" in text and "in main" in text for text in stacks.values()), stacks
    assert list_checkpoints(tmp_path / "run-0") == ["step-000002"]


@pytest.mark.parametrize("target_rank", [0, pytest.param(1, marks=pytest.mark.sweep)])
def test_a_frozen_rank_is_named(target_rank, argv, out):
    """Nothing of it runs any more, its watching threads included; woken when the others are gone, it has no news."""
    group = RankProcesses([*argv, *HANG_TIMEOUT_FLAGS], out=out, world_size=3)
    group.wait_until(lambda: last_logged_step(out) >= 1)
    group.send_signal(signal.SIGSTOP, target_rank)
    others = [process for rank, process in enumerate(group.processes) if rank != target_rank]
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [1, 1], group.output
    assert f"rank {target_rank} does not answer" in group.error_line
    group.send_signal(signal.SIGCONT, target_rank)
    assert group.wait(40) == [1, 1, 1], group.output
    assert group.error_line
    stacks = {f"rank-{rank}.txt" for rank in range(3) if rank != target_rank}  # its own are not read while it runs on
    assert {path.name for path in (out / "stacks").iterdir()} == stacks


def test_a_rank_that_prepares_or_saves_for_longer_than_the_time_out_is_left_alone(argv, finished_run, tmp_path):
    """It moves all the same; the others wait for it. Two runs at once."""
    places = ("trainer.data.prepare:content_hash", "trainer.training.checkpoint:_write_chunks")
    runs = []
    for place in places:
        name = place.rpartition(":")[2]
        fault = fault_at(place, range(1, 14), partial(time.sleep, 0.5))
        env = {"TRAINER_CACHE": str(tmp_path / f"cache-{name}")}
        runs.append(RankProcesses([*argv, *HANG_TIMEOUT_FLAGS], out=tmp_path / name, fault=fault, env=env))
    for place, run in zip(places, runs, strict=True):
        assert run.wait(120) == [0, 0], run.output
        out = tmp_path / place.rpartition(":")[2]
        assert read_reproducible_records(out) == read_reproducible_records(finished_run)
        assert not (out / "stacks").exists()


def raise_failure(kind: str) -> None:
    from trainer.config.errors import TrainingError

    if kind == "bug":
        raise ZeroDivisionError("of ours")
    raise TrainingError("the disk of this machine is full")


@pytest.mark.parametrize(
    ("rank", "kind", "place", "call_number"),
    [(1, "failure", FORWARD, 4), (0, "bug", "trainer.training.recorder:Recorder.log", 8)],
)
def test_an_error_on_one_rank_ends_all_ranks_and_is_reported_once(rank, kind, place, call_number, argv, out):
    """Everything that was written stays: whole rows, up to the last step."""
    fault = fault_at(place, call_number, partial(raise_failure, kind), rank=rank)
    group = RankProcesses(argv, out=out, world_size=3, fault=fault)
    assert group.wait() == [1, 1, 1], group.output
    assert last_logged_step(out) in (3, 3 + (rank > 0))  # another rank may be a step ahead
    if kind == "bug":  # a mistake of ours: its traceback, from where it happened and nowhere else
        assert group.output.count("Traceback") == 1, group.output
        assert "ZeroDivisionError: of ours" in group.output
        assert "error: " not in group.output
    else:
        assert group.error_lines == ["error: the disk of this machine is full"]
    assert not find_processes(str(out))


def wait_or_die(rank: int) -> None:
    fault_at(FORWARD, 4, hang_on, rank=1)(rank)
    fault_at(FORWARD, 4)(rank)


def test_a_rank_that_waits_outside_of_gloo_ends_too(argv, out):
    """As with NCCL, which does not notice that another rank is gone: here the wait is a sleep that nothing ends."""
    run = RankProcesses(argv, out=out, fault=wait_or_die)
    assert run.wait(40) == [-signal.SIGKILL, 1], run.output
    assert run.error_line
    assert not find_processes(str(out))
