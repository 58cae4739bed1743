"""kill -9, at any moment and at every stage of a save: the next --resume goes on from the newest whole checkpoint.

Real processes, really killed. After each: nothing of the run is left running, every rank that was not killed has ended
with a non-zero code within 60 s, metrics.jsonl is whole rows, and the run that goes on leaves the rows of a run that
was never killed. `kill_many.py` does the same at hundreds of random moments.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEMPLATES
from group import ENDS, Group, at_call, die, relatives, rows, science, steps_done, told
from ranks import free_port, on_ranks, train
from test_launch import BIN, TRAIN

from trainer.training.checkpoint import Checkpoints, Progress, choose, drop_after

STEPS = 8
INSIDE = (
    8  # a call of `Engine.accumulate` inside a window: each step has three on each rank, this is the second of step 3
)


@pytest.fixture(scope="module")
def words(tiny: str, records: tuple[str, str]) -> list[str]:
    text = f"--mode full --model {tiny} --data {records[0]} --val-data {records[1]} --block-size 16 --global-batch 6"
    text += f" --micro-batch 1 --max-steps {STEPS} --eval-every 3 --save-every 2 --keep 2 --ds-config zero2"
    return [*text.split(), *TEMPLATES]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the run that nobody kills."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(words, out=out, ranks=2)
    return science(out)


def goes_on(words: list[str], out: Path, whole: list[dict[str, Any]]) -> None:
    """--resume ends well and leaves the rows of the whole run, none twice and none missing."""
    before = rows(out) if (out / "metrics.jsonl").exists() else []
    output = train([*words, "--resume"], out=out, ranks=2)
    assert science(out) == whole
    assert rows(out)[-1]["event"] == "finished", output
    points = [row["message"] for row in rows(out) if row.get("event") == "resumed"]
    assert len(points) == 1, points
    assert not list(out.rglob("*.tmp")), "leftovers of the killed run"
    newest = max((row["step"] // 2 * 2 for row in before), default=0)
    assert any(f"step-{step:06d}" in points[0] for step in (newest, newest - 2)) or newest < 4, (points, newest)


# --- one save, killed at every line ------------------------------------------------------------------------------

SAVING = {"_write", "_write_state", "_put", "_about_text", "write_text", "_sync", "_delete_old", "_delete"}


def stub(value: float) -> Any:
    """What `Checkpoints.save` asks of an engine, with one weight and its moments of this value."""
    weight = torch.full((3, 5), value)
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    state = SimpleNamespace(
        full=lambda: ((f"{kind}/w", weight) for kind in kinds),
        layout=lambda: ((f"{kind}/w", torch.float32, (3, 5)) for kind in kinds), loss_scale=lambda: None,
    )  # fmt: skip
    return SimpleNamespace(trainable={"w": weight}, state=state)


def save_and_die(folder: Path, line: int) -> None:
    """Save step 3 into a folder that has 1 and 2; at the `line`-th line of checkpoint.py that a save executes, die."""
    done = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal done
        if Path(frame.f_code.co_filename).name != "checkpoint.py" or frame.f_code.co_name not in SAVING:
            return None
        if event == "line":
            done += 1
            if done == line:
                die()
        return trace

    sys.settrace(trace)
    save(folder, 3)


def save(folder: Path, step: int) -> None:
    alone: Any = SimpleNamespace(rank=0, gather=lambda value: [value])
    saver = Checkpoints(folder, alone, keep=2, identity={"base": "test"})
    saver.save(stub(float(step)), Progress(step=step, pending=False))


def die_at_every_line(folder: Path) -> int:
    """In folder/N: a save killed at its N-th line, in a process of its own; the last one is not killed any more."""
    for step in (1, 2):
        save(folder / "before", step)
    for line in range(1, 1000):
        shutil.copytree(folder / "before", folder / str(line))
        child = os.fork()
        if child == 0:
            save_and_die(folder / str(line), line)
            os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            return 0
    return 1


def test_a_save_killed_at_any_of_its_lines_leaves_the_last_good_one_in_force(tmp_path):
    assert on_ranks(1, die_at_every_line, tmp_path, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    taken = []
    for line in range(1, len(list(tmp_path.glob("[0-9]*"))) + 1):
        point = choose(tmp_path / str(line), "latest")  # its checksums are verified
        assert torch.equal(point.reader(torch.device("cpu"))("weight/w"), torch.full((3, 5), float(point.step))), line
        assert not point.passed_over, "nothing half-written bears the name of a checkpoint"
        taken.append(point.step)
        drop_after(tmp_path / str(line), point.step)  # what a resume does first
        assert not [path.name for path in (tmp_path / str(line)).iterdir() if path.name.startswith(".")], line
    assert len(taken) > 60
    assert taken == sorted(taken), "the new one is in force from one moment on"
    assert (taken[0], taken[-1]) == (2, 3)
    print(f"{len(taken) - 1} kills in a save: {taken.count(2)} left the old checkpoint in force, the rest the new one")


# --- a rank, all ranks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "module", "name", "number"),
    [
        (0, "trainer.distributed.engine", "Engine.accumulate", INSIDE),
        pytest.param(1, "trainer.distributed.engine", "Engine.step", 5, marks=pytest.mark.sweep),
        pytest.param(1, "trainer.distributed.engine", "Engine.evaluate", 3, marks=pytest.mark.sweep),
        (0, "trainer.training.checkpoint", "_put", 40),  # within the tensors of the first save
        (1, "trainer.training.checkpoint", "Checkpoints.save", 2),
        pytest.param(0, "trainer.training.checkpoint", "_sync", 3, marks=pytest.mark.sweep),
        (0, "trainer.run", "export", 1),
    ],
)  # fmt: skip
def test_a_killed_rank_ends_the_run_and_loses_nothing(who, module, name, number, words, whole, tmp_path):
    out = tmp_path / "run"
    fault = partial(at_call, who=who, module=module, name=name, number=number)
    group = Group(words, out=out, fault=fault)
    codes = group.wait()
    assert codes[who] == -signal.SIGKILL, group.output
    assert codes[1 - who] == 1
    assert len(group.errors) == 1, group.output
    assert "another rank of this run ended without a word" in group.errors[0]
    assert not relatives(str(out)), "nothing stays running"
    goes_on(words, out, whole)


@pytest.mark.parametrize("step", [0, pytest.param(3, marks=pytest.mark.sweep), 5])
def test_all_ranks_killed_at_once(step, words, whole, tmp_path):
    out = tmp_path / "run"
    group = Group(words, out=out)
    group.until(lambda: steps_done(out) >= step)
    group.signal(signal.SIGKILL)
    assert group.wait() == [-signal.SIGKILL] * 2
    assert not relatives(str(out))
    goes_on(words, out, whole)


def test_what_a_killed_rank_had_started_ends_with_it(words, whole, tmp_path):
    """The process that checks the export, and the W&B service: nobody else would end them."""
    out = tmp_path / "run"
    group = Group(words, out=out, env={"WANDB_MODE": "offline"})
    group.until(
        lambda: steps_done(out) == STEPS and started(out, "trainer.export.verify_worker") and started(out, "wandb-core")
    )
    group.signal(signal.SIGKILL, 0)
    assert group.wait() == [-signal.SIGKILL, 1]
    wait_for(lambda: not relatives(str(out)), ENDS, group.log)
    goes_on(words, out, whole)


def started(out: Path, program: str) -> bool:
    """Whether a program with this name runs that a rank of this run has started."""
    lines = (Path(f"/proc/{pid}/cmdline") for pid in relatives(str(out)))
    return any(program in line.read_text() for line in lines if line.exists())


def test_a_kill_before_the_first_row_can_be_begun_again(words, whole, tmp_path):
    """run.json is written and no more; and, one moment earlier, half of run.json."""
    out = tmp_path / "run"
    Group(words, out=out, fault=partial(at_call, who=0, module="trainer.run", name="show_plan", number=1)).wait()
    assert [path.name for path in out.iterdir()] == ["run.json"]
    goes_on(words, out, whole)

    out = tmp_path / "half"
    out.mkdir()
    (out / ".run.json.tmp").write_text('{"format": 1, "run_')
    train(words, out=out, ranks=2)  # no --resume: there is no run yet
    assert science(out) == whole


# --- the launcher ------------------------------------------------------------------------------------------------


def launched(launcher: str) -> list[str]:
    port = str(free_port())
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port]
    return [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_killed_launcher_takes_its_ranks_along_and_they_save_first(launcher, words, tmp_path):
    """SIGKILL to the `deepspeed` command leaves a second launcher and its ranks without anybody who waits for them."""
    out = tmp_path / "run"
    with running(launcher, words, out) as (process, log):
        process.kill()
        process.wait(10)
        wait_for(lambda: not relatives(str(out)), ENDS, log)
    output = log.read_text()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert "launcher" in errors[0]
    assert "Traceback" not in output
    last = rows(out)[-1]
    assert last["event"] == "interrupted", output
    assert (out / "checkpoints" / f"step-{last['step']:06d}").is_dir(), "the step in hand ended and was saved"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom", "codes"),
    [
        (signal.SIGINT, "all", {-signal.SIGINT, 1}),  # Ctrl-C
        (signal.SIGTERM, "a rank", {143}),
        pytest.param(signal.SIGTERM, "all", {-signal.SIGTERM, 1}, marks=pytest.mark.sweep),
        pytest.param(signal.SIGINT, "a rank", {130}, marks=pytest.mark.sweep),
        pytest.param(signal.SIGTERM, "the command", {-signal.SIGTERM, 1}, marks=pytest.mark.sweep),
    ],
)
def test_a_signal_under_the_deepspeed_launcher_saves_first(number, whom, codes, words, tmp_path):
    """It signals the ranks once more in its own order, the W&B service of each before the rank.

    A rank's code is passed on. Where both of DeepSpeed's processes are signalled, its own code is by the signal, or 1
    where the inner one, which ends with 1, is waited for first.
    """
    out = tmp_path / "run"
    with running("deepspeed", words, out, WANDB_MODE="offline") as (process, log):
        if whom == "all":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if whom == "the command" else last_rank(out), number)
        assert process.wait(ENDS) in codes, log.read_text()
        wait_for(lambda: not relatives(str(out)), ENDS, log)
    last = rows(out)[-1]
    assert last["event"] == "interrupted", log.read_text()
    assert (out / "checkpoints" / f"step-{last['step']:06d}").is_dir(), "the step in hand ended and was saved"
    assert choose(out / "checkpoints", "latest").step == last["step"]


def last_rank(out: Path) -> int:
    """Process id of the last rank that the `deepspeed` command started into `out`."""
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in relatives(str(out))}
    (found,) = [pid for pid, line in lines.items() if "--local_rank=1" in line and "launcher" not in line]
    return found


@contextlib.contextmanager
def running(launcher: str, words: list[str], out: Path, **env: str) -> Iterator[tuple[Any, Path]]:
    """(launcher's process, log) of a long run past its third step; in the end nothing of it is left."""
    long = [*words, "--max-steps", "5000", "--eval-every", "never", "--save-every", "never"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    environ |= {"GROUP_OUT": str(out), **env}
    log = out.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*launched(launcher), TRAIN, *long, "--out", str(out)], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            env=environ, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: steps_done(out) >= 3, 120, log)
        yield process, log
    finally:
        for pid in relatives(str(out)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def wait_for(ready: Any, seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


def test_a_rank_that_no_launcher_started_ends_with_nobody(monkeypatch):
    """A run under nohup outlives its shell; one whose launcher is gone before it began does not begin."""
    from trainer.distributed.watchdog import launchers

    assert launchers({}) == []
    assert launchers({"RANK": "0", "WORLD_SIZE": "1"}) == []
    assert [there() for _, there in launchers({"TORCHELASTIC_RUN_ID": "none"})] == [True]
    monkeypatch.setattr(sys, "argv", [f"/nowhere/{hashlib.sha256(b'no process names it').hexdigest()}.py"])
    import psutil

    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["/sbin/init"])
    assert [there() for _, there in launchers({"CROSS_SIZE": "1"})] == [True, False]
    assert [there() for _, there in launchers({"TORCHELASTIC_RUN_ID": "none"})] == [False]
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["python", "/usr/bin/deepspeed", "train.py"])
    assert [there() for _, there in launchers({"CROSS_SIZE": "1"})] == [True, True]


def test_a_stopped_run_that_is_killed_before_it_amends_repeats_no_row(words, whole, tmp_path):
    """A signal's checkpoint has the evaluation of its step still to come: killed after its row, it is made again.

    The signal comes inside an accumulation window: the whole of the step in hand is done, and nothing of the next.
    """
    out = tmp_path / "run"
    stop = partial(at_call, who=1, module="trainer.distributed.engine", name="Engine.accumulate", number=INSIDE,
                   action=partial(die, signal.SIGTERM))  # fmt: skip
    assert Group(words, out=out, fault=stop).wait() == [143, 143]
    about = json.loads((out / "checkpoints" / "step-000003" / "state.json").read_text())
    assert about["progress"]["pending"], "step 3 has an evaluation due"
    assert told(out, 3) == ["step", "interrupted"]
    kill = partial(at_call, who=0, module="trainer.training.checkpoint", name="Checkpoints.amend", number=1)
    Group([*words, "--resume"], out=out, fault=kill).wait()
    assert told(out, 3) == ["step", "interrupted", "resumed", "eval", "samples"]
    train([*words, "--resume"], out=out, ranks=2)
    assert science(out) == whole
