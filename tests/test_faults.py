"""What goes wrong around a run, and what it then does: one clear line, the last good state in force, nothing lost.

Real ranks and real faults: signals, full and read-only file systems, damaged checkpoints, numbers that are not finite,
ranks that hang, errors on one rank only. test_crash.py has the kills.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEMPLATES, make_tiny
from group import Group, at_call, die, events, relatives, rows, science, steps_done
from ranks import command, on_ranks, train

pytestmark = (
    pytest.mark.sweep
)  # ends hanging runs after seconds, which a busy machine exceeds: not in the default run yet
STEPS = 8


@pytest.fixture(scope="module")
def words(tiny: str, records: tuple[str, str]) -> list[str]:
    text = f"--mode full --model {tiny} --data {records[0]} --val-data {records[1]} --block-size 16 --global-batch 6"
    text += f" --max-steps {STEPS} --eval-every 3 --save-every 2 --keep 9 --ds-config zero2 --hang-timeout 6"
    return [*text.split(), *TEMPLATES]


@pytest.fixture(scope="module")
def run(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended well; tests copy it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(words, out=out, ranks=2)
    return out


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def half(run: Path, out: Path) -> Path:
    """A copy of the run as it was after step 4."""
    shutil.copytree(run, out)
    for name in ("step-000006", "step-000008"):
        shutil.rmtree(out / "checkpoints" / name)
    return out


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
    train([*words, "--resume"], out=out, ranks=2)
    assert science(out) == science(run)


def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(words, run, tmp_path):
    out = tmp_path / "run"
    slow = partial(at_call, who=0, module="trainer.engine", name="Engine.evaluate", number=range(3, 99),
                   action=partial(time.sleep, 1.0))  # fmt: skip
    group = Group([*words, "--eval-batch", "1"], out=out, fault=slow)  # 4 passes of 1 s on each rank
    group.until(lambda: steps_done(out) >= 3)
    began = time.monotonic()
    group.signal(signal.SIGTERM)
    assert group.wait() == [143, 143]
    assert time.monotonic() - began < 3.5
    assert [row["kind"] for row in rows(out) if row["step"] == 3] == ["step", "event"]
    train([*words, "--resume"], out=out, ranks=2)  # which makes the evaluation that was given up
    assert science(out) == science(run)


def test_a_second_signal_stops_at_once(words, tmp_path):
    out = tmp_path / "run"
    group = Group(words, out=out, fault=partial(at_call, who=1, module="trainer.engine", name="Engine.accumulate",
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


# --- the disk ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`; skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Take all room but `leave` bytes."""
    file = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(file, bytes(4096))
    os.close(file)
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - leave))


def test_a_disk_that_fills_up_while_saving(words, run, tmp_path):
    """A checkpoint of this model takes 110 kB: there is room for one and a half."""
    with mounted(tmp_path / "disk", "size=4m") as disk:
        out = disk / "run"
        full = partial(at_call, who=0, module="trainer.checkpoint", name="Checkpoints.save", number=2,
                       action=partial(fill, disk, 65536))  # fmt: skip
        group = Group(words, out=out, fault=full)
        assert group.wait() == [1, 1]
        assert len(group.errors) == 1
        assert (
            "step-000004 not written: No space left on device; the checkpoints before it are whole" in group.errors[0]
        )
        assert checkpoints(out) == ["step-000002"], "and nothing half-written takes up room"
        assert steps_done(out) == 4
        (disk / "filler").unlink()
        train([*words, "--resume"], out=out, ranks=2)
        assert science(out) == science(run)


def test_a_disk_that_fills_up_while_logging(words, run, tmp_path):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        out = disk / "run"
        full = partial(
            at_call, who=0, module="trainer.log", name="JsonlSink.write", number=5, action=partial(fill, disk, 0)
        )
        group = Group(words, out=out, fault=full)
        assert group.wait() == [1, 1]
        assert len(group.errors) == 1
        assert f"cannot write {out / 'metrics.jsonl'}: No space left on device" in group.errors[0]
        assert (out / "metrics.jsonl").read_bytes().endswith(b"\n"), "no half row"
        (disk / "filler").unlink()
        train([*words, "--resume"], out=out, ranks=2)
        assert science(out) == science(run)


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_run_folder(resume, words, run, tmp_path):
    with mounted(tmp_path / "disk", "size=4m") as disk:
        if resume:
            half(run, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        group = Group([*words, *(["--resume"] if resume else [])], out=disk / "run")
        assert group.wait() == [2, 2]
    assert len(group.errors) == 1
    assert f"{disk / 'run'}: cannot write there: Read-only file system" in group.errors[0]


def test_a_run_folder_under_a_file(words, tmp_path):
    (tmp_path / "file").write_text("")
    group = Group(words, out=tmp_path / "file" / "run")
    assert group.wait() == [2, 2]
    assert len(group.errors) == 1
    assert "cannot write there: Not a directory" in group.errors[0]


# --- damaged checkpoints -----------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    os.truncate(folder / "state.safetensors", (folder / "state.safetensors").stat().st_size - 7)


def flip(folder: Path, name: str = "state.safetensors", at: int = -1000) -> None:
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(data)


def flip_a_number(folder: Path) -> None:
    """The count of tokens: still JSON, still plausible."""
    text = (folder / "state.json").read_bytes()
    flip(folder, "state.json", text.index(b'"tokens": ') + len(b'"tokens": '))


DAMAGE = {
    "state.safetensors has": cut,
    "state.safetensors was changed": flip,
    "cannot read state.safetensors: No such file": lambda folder: (folder / "state.safetensors").unlink(),
    "state.json was changed": flip_a_number,
    "state.json is missing or damaged": lambda folder: os.truncate(folder / "state.json", 100),
}


def resumed(jobs: list[list[str]]) -> int:
    """The exit codes of several commands on one rank, as the last line of the output."""
    codes = []
    for job in jobs:
        print(f"--- {len(codes)}")
        codes.append(command(job))
    print(json.dumps(codes))
    return 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(words, run, tmp_path):
    jobs, dry = [], [word for word in words if word != "zero2"]
    dry[dry.index("--ds-config") : dry.index("--ds-config") + 1] = []
    for number, damage in enumerate(DAMAGE.values()):
        out = half(run, tmp_path / str(number))
        damage(out / "checkpoints" / "step-000004")
        jobs.append([*dry, "--global-batch", "6", "--out", str(out), "--resume", "step-4"])
        jobs.append([*dry, "--global-batch", "6", "--out", str(out), "--resume"])
    log = tmp_path / "log"
    assert on_ranks(1, resumed, jobs, log=log) == 0
    output = log.read_text()
    assert "Traceback" not in output, output
    parts = output.split("--- ")[1:]
    assert json.loads(parts[-1].splitlines()[-1]) == [2, 0] * len(DAMAGE)
    for number, words_said in enumerate(DAMAGE):
        named, newest = parts[2 * number], parts[2 * number + 1]
        lines = [line for line in named.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, named
        if "missing or damaged" not in words_said:
            assert words_said in lines[0]
        assert "step-4" in lines[0] or "step-000004" in lines[0]
        out = tmp_path / str(number)
        message = events(out, "resumed")[0]["message"]
        assert message.startswith("resumed from step-000002"), message
        assert words_said in message
        assert "step-000004" in message
        assert message in newest, "and it is said on the terminal"
        assert [row["step"] for row in science(out) if row["kind"] == "step"] == list(range(1, STEPS + 1))


def test_no_whole_checkpoint_left(words, run, tmp_path):
    out = half(run, tmp_path / "run")
    for name in checkpoints(out):
        cut(out / "checkpoints" / name)
    group = Group([*words, "--resume"], out=out)
    assert group.wait() == [2, 2]
    assert len(group.errors) == 1
    assert "no whole checkpoint in" in group.errors[0]
    assert "state.safetensors has" in group.errors[0]
    assert steps_done(out) == STEPS, "nothing was touched"


def test_the_checkpoint_of_another_model(words, tiny, run, tmp_path, shelf):
    other = make_tiny(shelf / "other", dropout=0.0, seed=1)
    moved = half(run, tmp_path / "run")
    stranger = tmp_path / "stranger"
    train([other if word == tiny else word for word in words], out=stranger, ranks=2)
    shutil.rmtree(moved / "checkpoints" / "step-000004")
    shutil.copytree(stranger / "checkpoints" / "step-000004", moved / "checkpoints" / "step-000004")
    group = Group([*words, "--resume"], out=moved)
    assert group.wait() == [2, 2]
    assert len(group.errors) == 1
    assert "step-000004 is of a run on another base model" in group.errors[0]
    assert "step-000004" in checkpoints(moved), "nothing was touched"


# --- numbers that are not finite ---------------------------------------------------------------------------------


def poison(rank: int, step: int, where: str, value: float) -> None:
    """On rank 1, from this step on: a loss that is not finite, or a finite loss with gradients that are not."""
    if rank != 1:
        return
    from trainer.engine import Engine

    accumulate = Engine.accumulate

    def faulty(self: Engine, micro: Any, *, step: int, counted: int, at: int = step) -> Any:
        parameter = next(iter(self.trainable.values()))
        if step == at and where == "gradient":
            parameter.register_hook(lambda gradient: gradient * value)
        nll = accumulate(self, micro, step=step, counted=counted)
        return nll * value if step == at and where == "loss" else nll

    Engine.accumulate = faulty  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("zero", "where", "value"),
    [
        ("zero2", "loss", "nan"),
        ("zero0", "gradient", "inf"),
        ("zero1", "gradient", "nan"),
        ("zero3", "gradient", "inf"),
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(
    zero, where, value, words, run, tmp_path
):
    out = tmp_path / "run"
    flags = [*words, "--ds-config", zero]
    group = Group(flags, out=out, fault=partial(poison, step=3, where=where, value=float(value)))
    assert group.wait() == [1, 1], group.output
    assert len(group.errors) == 1, group.output
    assert "error: step 4: " in group.errors[0]
    assert "the weights are those after step 3" in group.errors[0]
    event = events(out, "not_finite")[0]
    assert event["step"] == 4
    assert ("loss" in event["message"]) == (where == "loss")
    assert "step-000003" in checkpoints(out), "the last finite state is kept"
    assert steps_done(out) == 4
    dumps = [np.load(out / f"not-finite-step-4-rank-{rank}.npz") for rank in range(2)]
    assert sum(len(dump["input_ids_0"]) for dump in dumps) >= len(event["facts"]["rows"]) > 0
    train([*flags, "--resume"], out=out, ranks=2)
    assert [row["kind"] for row in rows(out)].count("step") == STEPS
    for mine, theirs in zip(science(out), science(run), strict=True):
        assert mine.get("loss") == pytest.approx(theirs.get("loss"), rel=2e-6)


def test_a_learning_rate_that_explodes(words, tmp_path):
    out = tmp_path / "run"
    group = Group([*words, "--lr", "1e30", "--eval-every", "1"], out=out)
    assert group.wait() == [1, 1]
    assert len(group.errors) == 1
    assert "evaluation after step 1: validation loss" in group.errors[0] or "step 2: " in group.errors[0]
    assert events(out, "not_finite")
    assert all(np.isfinite(row["loss"]) for row in rows(out) if "loss" in row)


# --- ranks that hang or fail alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_hangs_is_named(who, words, tmp_path):
    out = tmp_path / "run"
    hang = partial(at_call, who=who, module="trainer.engine", name="Engine.accumulate", number=4,
                   action=partial(time.sleep, 300))  # fmt: skip
    group = Group(words, out=out, ranks=3, fault=hang)
    assert group.wait() == [1, 1, 1]
    others = "1, 2" if who == 0 else "0, 2"
    assert len(group.errors) == 1, group.output
    assert f"no rank has moved for 6 s (--hang-timeout): rank {who} hangs at loop.py:" in group.errors[0]
    assert f"ranks {others} waiting at engine.py:" in group.errors[0]
    assert checkpoints(out) == ["step-000002"]


@pytest.mark.parametrize("who", [0, 1])
def test_a_frozen_rank_is_named(who, words, tmp_path):
    """Nothing of it runs any more, its watching threads included."""
    out = tmp_path / "run"
    group = Group(words, out=out, ranks=3)
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
    slow = partial(at_call, who=0, module="trainer.checkpoint", name="_put", number=range(1, 20),
                   action=partial(time.sleep, 0.5))  # fmt: skip
    group = Group(words, out=out, fault=slow)
    assert group.wait(120) == [0, 0], group.output
    assert science(out) == science(run)


def fail(kind: str) -> None:
    from trainer.errors import RunFailed

    if kind == "bug":
        raise ZeroDivisionError("of ours")
    raise RunFailed("the disk of this machine is full")


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("kind", ["failure", "bug"])
def test_an_error_on_one_rank_ends_all_and_is_said_once(who, kind, words, tmp_path):
    out = tmp_path / "run"
    fault = partial(at_call, who=who, module="trainer.engine", name="Engine.accumulate", number=4,
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
    waiting = partial(at_call, who=1, module="trainer.engine", name="Engine.accumulate", number=4,
                      action=partial(time.sleep, 300))  # fmt: skip
    for other in (partial(die, signal.SIGKILL), partial(fail, "failure")):
        failing = partial(at_call, who=0, module="trainer.engine", name="Engine.accumulate", number=4, action=other)
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
