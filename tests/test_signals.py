"""A run that is told to stop, and one that cannot go on because a rank hangs, is lost or fails alone.

Real ranks and real signals. A hanging rank sleeps or is frozen (SIGSTOP); one line names it, and all end within 60 s.
"""

import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATES
from group import Group, at_call, die, events, relatives, science, steps_done, told
from ranks import train

PATIENCE = ["--hang-timeout", "8"]
STEPS = 8


@pytest.fixture(scope="module")
def words(tiny: str, records: tuple[str, str]) -> list[str]:
    text = f"--mode full --model {tiny} --data {records[0]} --val-data {records[1]} --block-size 16 --global-batch 6"
    text += f" --max-steps {STEPS} --eval-every 3 --save-every 2 --keep 9 --ds-config zero2"
    return [*text.split(), *TEMPLATES]


@pytest.fixture(scope="module")
def run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended well; tests copy it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(words, out=out, ranks=2)
    return out


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# --- signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "to", "code"), [(signal.SIGTERM, (0, 1), 143), (signal.SIGINT, (0, 1), 130), (signal.SIGTERM, (1,), 143)]
)
def test_a_signal_ends_the_step_in_hand_saves_and_goes_on_later(number, to, code, words, run, tmp_path):
    out = tmp_path / "run"
    group = Group(words, out=out)
    group.until(lambda: steps_done(out) >= 1)
    group.signal(number, *to)
    assert group.wait() == [code, code], group.output
    assert group.errors == []
    last = events(out, "interrupted")[0]["step"]
    assert 1 <= last < STEPS
    assert f"step-{last:06d}" in checkpoints(out)
    if number == signal.SIGINT:  # one of them is enough
        train([*words, "--resume"], out=out, ranks=2)
        assert science(out) == science(run)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(words, run, tmp_path):
    out = tmp_path / "run"
    slow = partial(at_call, who=0, module="trainer.distributed.engine", name="Engine.evaluate", number=range(5, 9),
                   action=partial(time.sleep, 2.5))  # fmt: skip
    group = Group([*words, "--eval-batch", "1"], out=out, fault=slow)  # 4 batches on each rank, 2.5 s each at step 3
    group.until(lambda: steps_done(out) >= 3)
    began = time.monotonic()
    group.signal(signal.SIGTERM)
    assert group.wait() == [143, 143]
    assert time.monotonic() - began < 7
    assert told(out, 3) == ["step", "interrupted"]
    train([*words, "--resume"], out=out, ranks=2)  # which makes the evaluation that was given up
    assert science(out) == science(run)


def test_a_second_signal_stops_at_once(words, tmp_path):
    out = tmp_path / "run"
    group = Group(words, out=out, fault=partial(at_call, who=1, module="trainer.distributed.engine", name="Engine.accumulate",
                                                number=4, action=partial(time.sleep, 60)))  # fmt: skip
    group.until(lambda: steps_done(out) >= 3)
    group.signal(signal.SIGTERM)  # rank 0 is in a collective, where Python runs no handler
    time.sleep(2.5)
    began = time.monotonic()
    group.signal(signal.SIGINT)
    assert group.wait(10) == [130, 130]
    assert time.monotonic() - began < 3
    assert checkpoints(out) == ["step-000002"]


def test_a_signal_before_the_first_step_ends_the_process_as_always(words, tmp_path):
    slow = partial(at_call, who=0, module="trainer.run", name="prepare", number=1, action=partial(time.sleep, 60))
    group = Group(words, out=tmp_path / "run", fault=slow)
    time.sleep(4)
    group.signal(signal.SIGTERM)
    assert group.wait(10) == [-signal.SIGTERM] * 2
    assert not (tmp_path / "run").exists()


def lose_launcher(rank: int, gone: Path) -> None:
    """A launcher that is gone when the file is there; only rank 1 looks in time."""
    from trainer.distributed import watchdog

    watchdog.launchers = lambda environ: [(12345, lambda: not gone.exists())]
    if rank == 0:
        watchdog.TICK = 300.0


def test_whoever_sees_first_that_the_launcher_is_gone_it_is_said_once(words, tmp_path):
    out, gone = tmp_path / "run", tmp_path / "gone"
    long = [*words, "--max-steps", "5000", "--eval-every", "never", "--save-every", "never"]
    group = Group(long, out=out, fault=partial(lose_launcher, gone=gone))
    group.until(lambda: steps_done(out) >= 1)
    gone.touch()
    assert group.wait() == [143, 143], group.output
    assert group.errors == ["error: the launcher (process 12345) is gone; this run ends with the step in hand"]
    assert len(events(out, "interrupted")) == len(checkpoints(out)) == 1


# --- ranks that hang or fail alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_a_rank_that_hangs_is_named(who, words, tmp_path):
    out = tmp_path / "run"
    hang = partial(at_call, who=who, module="trainer.distributed.engine", name="Engine.accumulate", number=4,
                   action=partial(time.sleep, 300))  # fmt: skip
    group = Group([*words, *PATIENCE], out=out, ranks=3, fault=hang)
    assert group.wait() == [1, 1, 1]
    others = "1, 2" if who == 0 else "0, 2"
    assert len(group.errors) == 1, group.output
    assert f"no rank has moved for 8 s (--hang-timeout): rank {who} hangs at loop.py:" in group.errors[0]
    assert re.search(rf"ranks {others} waiting at (engine|ways)\.py:", group.errors[0])
    assert checkpoints(out) == ["step-000002"]


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.sweep)])
def test_a_frozen_rank_is_named(who, words, tmp_path):
    """Nothing of it runs any more, its watching threads included."""
    out = tmp_path / "run"
    group = Group([*words, *PATIENCE], out=out, ranks=3)
    group.until(lambda: steps_done(out) >= 1)
    group.signal(signal.SIGSTOP, who)
    others = [process for rank, process in enumerate(group.processes) if rank != who]
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [1, 1], group.output
    assert len(group.errors) == 1, group.output
    assert f"rank {who} does not answer" in group.errors[0]
    group.signal(signal.SIGKILL, who)
    group.wait()


def test_slow_is_not_hanging(words, run, tmp_path):
    """A rank that saves for longer than the time-out moves all the same; the others wait for it."""
    out = tmp_path / "run"
    slow = partial(at_call, who=0, module="trainer.training.checkpoint", name="_put", number=range(1, 21),
                   action=partial(time.sleep, 0.5))  # fmt: skip
    group = Group([*words, *PATIENCE], out=out, fault=slow)
    assert group.wait(120) == [0, 0], group.output
    assert science(out) == science(run)


def fail(kind: str) -> None:
    from trainer.config.errors import RunFailed

    if kind == "bug":
        raise ZeroDivisionError("of ours")
    raise RunFailed("the disk of this machine is full")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("kind", ["failure", "bug"])
def test_an_error_on_one_rank_ends_all_and_is_said_once(who, kind, words, tmp_path):
    out = tmp_path / "run"
    fault = partial(at_call, who=who, module="trainer.distributed.engine", name="Engine.accumulate", number=4,
                    action=partial(fail, kind))  # fmt: skip
    group = Group(words, out=out, ranks=3, fault=fault)
    assert group.wait() == [1, 1, 1], group.output
    if kind == "bug":  # a mistake of ours: its traceback, from where it happened and nowhere else
        assert group.output.count("Traceback") == 1, group.output
        assert "ZeroDivisionError: of ours" in group.output
        assert "error: " not in group.output
    else:
        assert group.errors == ["error: the disk of this machine is full"]
    assert not relatives(str(out))


def test_a_rank_that_waits_outside_of_gloo_ends_too(words, tmp_path):
    """As with NCCL, which does not notice that another rank is gone: here the wait is a sleep that nothing ends."""
    out = tmp_path / "run"
    waiting = partial(at_call, who=1, module="trainer.distributed.engine", name="Engine.accumulate", number=4,
                      action=partial(time.sleep, 300))  # fmt: skip
    for other in (partial(die, signal.SIGKILL), partial(fail, "failure")):
        failing = partial(
            at_call, who=0, module="trainer.distributed.engine", name="Engine.accumulate", number=4, action=other
        )
        group = Group(words, out=tmp_path / f"run-{other.func.__name__}", fault=partial(both, waiting, failing))
        began = time.monotonic()
        codes = group.wait()
        assert codes[1] == 1, group.output
        assert codes[0] in (1, -signal.SIGKILL)
        assert len(group.errors) == 1, group.output
        assert time.monotonic() - began < 40
    assert not relatives(str(out))


def both(first: Any, second: Any, rank: int) -> None:
    first(rank)
    second(rank)
