"""A run that is told to stop, and one that cannot go on because a rank hangs, is lost or fails alone.

Real ranks and real signals. A hanging rank sleeps or is frozen (SIGSTOP); one line names it, and all end within 60 s.
"""

import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.launch_ranks import train
from helpers.process_groups import (
    FORWARD,
    Fault,
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
from helpers.tiny_inputs import write_records

HANG_TIMEOUT_FLAGS = ["--hang-timeout", "6"]


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "to", "code"),
    [
        (signal.SIGINT, (0, 1), 130),
        (signal.SIGTERM, (1,), 143),
        (signal.SIGUSR1, (1,), 138),  # the notice of SLURM's --signal, to any rank
    ],
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


def test_a_second_signal_stops_the_run_at_once(argv, out):
    hang = fault_at(FORWARD, 4, partial(time.sleep, 60), rank=1)
    group = RankProcesses(argv, out=out, fault=hang)
    group.wait_until(lambda: last_logged_step(out) >= 3)
    group.send_signal(signal.SIGTERM)  # rank 0 is in a collective, where Python runs no handler
    time.sleep(2.5)
    began = time.monotonic()
    group.send_signal(signal.SIGINT)
    assert group.wait(10) == [130, 130]
    assert time.monotonic() - began < 3
    assert list_checkpoints(out) == ["step-000002"]


def test_a_run_that_does_not_end_within_the_grace_time_is_ended(argv, out):
    hang = fault_at(FORWARD, 4, partial(time.sleep, 60), rank=1)
    group = RankProcesses([*argv, "--grace", "3"], out=out, fault=hang)
    group.wait_until(lambda: last_logged_step(out) >= 3)
    group.send_signal(signal.SIGTERM)
    assert group.wait(15) == [143, 143]
    assert group.error_line.startswith("error: the run did not end within 3 s (--grace) of SIGTERM; ")
    assert list_checkpoints(out) == ["step-000002"]


def test_a_signal_before_the_first_step_ends_the_process_as_always(argv, tmp_path):
    slow = fault_at("trainer.run:prepare", 1, partial(time.sleep, 60))
    group = RankProcesses(argv, out=tmp_path / "run", fault=slow)
    time.sleep(4)
    group.send_signal(signal.SIGTERM)
    assert group.wait(10) == [-signal.SIGTERM] * 2
    assert not (tmp_path / "run").exists()


def simulate_lost_launcher(rank: int, gone: Path) -> None:
    """A launcher that is gone when the file is there; only rank 1 looks in time."""
    from trainer.distributed import watch

    watch.find_launchers = lambda environ: [(12345, lambda: not gone.exists())]
    if rank == 0:
        watch.TICK_SECONDS = 300.0


def test_a_lost_launcher_is_reported_once_whichever_rank_sees_it_first(argv, out, tmp_path):
    gone = tmp_path / "gone"
    long = [*argv, "--max-steps", "5000", "--eval-every", "never", "--save-every", "never"]
    group = RankProcesses(long, out=out, fault=partial(simulate_lost_launcher, gone=gone))
    group.wait_until(lambda: last_logged_step(out) >= 1)
    gone.touch()
    assert group.wait() == [143, 143], group.output
    assert group.error_lines == ["error: the launcher (process 12345) is gone; this run ends after the current step"]
    assert len(read_events(out, "interrupted")) == len(list_checkpoints(out)) == 1


# --- ranks that hang or fail alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_a_rank_that_hangs_is_named(rank, argv, out):
    hang = fault_at(FORWARD, 4, partial(time.sleep, 300), rank=rank)
    group = RankProcesses([*argv, *HANG_TIMEOUT_FLAGS], out=out, world_size=3, fault=hang)
    assert group.wait() == [1, 1, 1]
    others = "1, 2" if rank == 0 else "0, 2"
    assert f"no rank made progress for 6 s (--hang-timeout): rank {rank} hangs at engine.py:" in group.error_line
    assert re.search(rf"ranks {others} waiting at (engine|stepper)\.py:", group.error_line)
    stacks = {path.name: path.read_text() for path in (out / "stacks").iterdir()}
    assert sorted(stacks) == [f"rank-{number}.txt" for number in range(3)]
    assert all("Timeout" in text and "in main" in text for text in stacks.values()), stacks
    assert list_checkpoints(out) == ["step-000002"]


def test_a_rank_that_hangs_in_the_evaluation_of_the_exported_weights_is_named(argv, out):
    hang = fault_at("trainer.run:evaluate_other_splits", 2, partial(time.sleep, 300), rank=1)
    group = RankProcesses(
        [*argv, "--test-fraction", "0.2", "--max-steps", "2", *HANG_TIMEOUT_FLAGS], out=out, fault=hang
    )
    assert group.wait() == [1, 1], group.output
    assert "no rank made progress for 6 s (--hang-timeout): rank 1 hangs at run.py:" in group.error_line
    assert sorted(path.name for path in (out / "stacks").iterdir()) == ["rank-0.txt", "rank-1.txt"]


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


def test_a_slow_rank_is_not_reported_as_hanging(argv, finished_run, out):
    """A rank that saves for longer than the time-out moves all the same; the others wait for it."""
    slow = fault_at("trainer.training.checkpoint:_write_chunks", range(1, 16), partial(time.sleep, 0.5))
    group = RankProcesses([*argv, *HANG_TIMEOUT_FLAGS], out=out, fault=slow)
    assert group.wait(120) == [0, 0], group.output
    assert read_reproducible_records(out) == read_reproducible_records(finished_run)
    assert not (out / "stacks").exists()


@pytest.mark.parametrize(
    ("place", "number", "file"),
    [
        ("trainer.training.run_folder:resolve_output_dir", 1, "run.py"),
        ("trainer.data.prepare:encode", 1, "prepare.py"),
        ("trainer.training.run_folder:resolve_output_dir", 2, "run.py"),
        ("trainer.training.checkpoint:delete_checkpoints_after", 1, "run.py"),
    ],
)
def test_a_rank_that_hangs_while_it_prepares_is_named(place, number, file, argv, finished_run, out, tmp_path):
    if "checkpoint" in place:
        shutil.copytree(finished_run, out)
        argv = [*argv, "--resume"]
    hang = fault_at(place, number, partial(time.sleep, 300), rank=0)
    group = RankProcesses(
        [*argv, "--hang-timeout", "5"], out=out, world_size=3, fault=hang, env={"TRAINER_CACHE": str(tmp_path)}
    )
    assert group.wait() == [1, 1, 1], group.output
    assert f"no rank made progress for 5 s (--hang-timeout): rank 0 hangs at {file}:" in group.error_line
    assert re.search(r"ranks 1, 2 waiting at process_group\.py:\d+ in all_gather_object$", group.error_line)


@pytest.mark.parametrize("place", ["torch.distributed:init_process_group", "torch.distributed:new_group"])
@pytest.mark.parametrize("action", [partial(time.sleep, 300), kill_self])
def test_a_rank_that_hangs_or_is_lost_while_the_ranks_join_is_named(action, place, argv, out):
    fault = fault_at(place, 1, action, rank=1)
    group = RankProcesses([*argv, "--hang-timeout", "5"], out=out, world_size=3, fault=fault)
    assert [code for code in group.wait() if code > 0] == [1] * (2 if action is kill_self else 3), group.output
    assert re.search("rank 1 (hangs at process_group.py|does not answer|of this run ended)", group.error_line)


def test_a_rank_that_hangs_in_the_evaluation_after_the_last_step_is_named(argv, out, tmp_path):
    test = write_records(tmp_path / "test.jsonl", num_records=9, seed=3)
    hang = fault_at("trainer.training.evaluation:write_evaluation", 2, partial(time.sleep, 300))
    group = RankProcesses([*argv, *HANG_TIMEOUT_FLAGS, "--test-data", test], out=out, fault=hang)
    assert group.wait(90) == [1, 1], group.output
    assert "no rank made progress for 6 s (--hang-timeout): rank 0 hangs at evaluation.py" in group.error_line


def test_a_rank_that_prepares_slowly_is_not_reported_as_hanging(argv, out, tmp_path):
    slow = fault_at("trainer.data.prepare:content_hash", range(1, 20), partial(time.sleep, 0.5))
    group = RankProcesses([*argv, "--hang-timeout", "5"], out=out, fault=slow, env={"TRAINER_CACHE": str(tmp_path)})
    assert group.wait(120) == [0, 0], group.output


def raise_failure(kind: str) -> None:
    from trainer.config.errors import TrainingError

    if kind == "bug":
        raise ZeroDivisionError("of ours")
    raise TrainingError("the disk of this machine is full")


FAILING = {  # place: (the so-maniest call, the last step whose row is then there)
    FORWARD: (4, 3),
    "trainer.distributed.engine:Engine.evaluate": (3, 6),
    "trainer.distributed.engine:Engine.generate": (2, 3),
    "trainer.training.checkpoint:CheckpointManager.save": (2, 4),
    "trainer.training.recorder:Recorder.log": (8, 3),
    "trainer.distributed.engine:Engine.measure_memory": (1, 8),
}


@pytest.mark.parametrize(
    ("rank", "kind", "place"),
    [
        (0, "failure", FORWARD),
        (1, "bug", FORWARD),
        (0, "bug", "trainer.training.recorder:Recorder.log"),
        (1, "failure", "trainer.distributed.engine:Engine.measure_memory"),
        *(
            pytest.param(rank, kind, place, marks=pytest.mark.sweep)
            for rank, kind in ((0, "bug"), (1, "failure"))
            for place in FAILING
        ),
    ],
)
def test_an_error_on_one_rank_ends_all_ranks_and_is_reported_once(rank, kind, place, argv, out):
    """Everything that was written stays: whole rows, up to the last step."""
    call_number, last_step = FAILING[place]
    fault = fault_at(place, call_number, partial(raise_failure, kind), rank=rank)
    group = RankProcesses(argv, out=out, world_size=3, fault=fault)
    assert group.wait() == [1, 1, 1], group.output
    assert last_logged_step(out) in (last_step, last_step + (rank > 0))  # another rank may be a step ahead
    if kind == "bug":  # a mistake of ours: its traceback, from where it happened and nowhere else
        assert group.output.count("Traceback") == 1, group.output
        assert "ZeroDivisionError: of ours" in group.output
        assert "error: " not in group.output
    else:
        assert group.error_lines == ["error: the disk of this machine is full"]
    assert not find_processes(str(out))


def test_a_rank_that_waits_outside_of_gloo_ends_too(argv, tmp_path):
    """As with NCCL, which does not notice that another rank is gone: here the wait is a sleep that nothing ends."""
    waiting = fault_at(FORWARD, 4, partial(time.sleep, 300), rank=1)
    for name, end in (("killed", partial(kill_self, signal.SIGKILL)), ("failed", partial(raise_failure, "failure"))):
        both = partial(inject_both, waiting, fault_at(FORWARD, 4, end))
        group = RankProcesses(argv, out=tmp_path / name, fault=both)
        began = time.monotonic()
        codes = group.wait()
        assert codes[1] == 1, group.output
        assert codes[0] in (1, -signal.SIGKILL)
        assert group.error_line
        assert time.monotonic() - began < 40
    assert not find_processes(str(tmp_path))


def inject_both(first: Fault, second: Fault, rank: int) -> None:
    first(rank)
    second(rank)
