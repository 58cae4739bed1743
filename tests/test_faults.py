"""What goes wrong around a run, and what it then does: one clear line, the last good state in force, nothing lost.

Full and read-only file systems, damaged checkpoints, numbers that are not finite. test_crash.py has the kills,
test_signals.py the signals and the ranks that hang.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEMPLATES, make_tiny, write_records
from group import Group, at_call, events, rows, science, steps_done
from ranks import train
from transformers import AutoModelForCausalLM

from trainer.config.errors import UserError
from trainer.training.checkpoint import choose, load_weights

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


def half(run: Path, out: Path) -> Path:
    """A copy of the run as it was after step 4."""
    shutil.copytree(run, out)
    for name in ("step-000006", "step-000008"):
        shutil.rmtree(out / "checkpoints" / name)
    return out


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
        full = partial(at_call, who=0, module="trainer.training.checkpoint", name="Checkpoints.save", number=2,
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


def test_a_disk_that_fills_up_while_logging(words, tmp_path):
    """From step 7 on no page is left: the rows still fill the last one (4 KiB), and one of them fits only in part."""
    flags = [*words, "--max-steps", "12", "--eval-every", "1", "--save-every", "6", "--samples", "0"]
    with mounted(tmp_path / "disk", "size=4m") as disk:
        out = disk / "run"
        full = partial(
            at_call,
            who=0,
            module="trainer.distributed.engine",
            name="Engine.accumulate",
            number=7,
            action=partial(fill, disk, 0),
        )
        group = Group(flags, out=out, fault=full)
        assert group.wait() == [1, 1]
        assert len(group.errors) == 1
        assert f"cannot write {out / 'metrics.jsonl'}: No space left on device" in group.errors[0]
        assert (out / "metrics.jsonl").read_bytes().endswith(b"\n"), "no half row"
        assert steps_done(out) > 6
        (disk / "filler").unlink()
        train([*flags, "--resume"], out=out, ranks=2)
        assert "resumed from step-000006" in events(out, "resumed")[0]["message"]
        assert [row["step"] for row in science(out) if row["kind"] == "step"] == list(range(1, 13))


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


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over_otherwise(said, run, tmp_path):
    folder = half(run, tmp_path / "run") / "checkpoints"
    DAMAGE[said](folder / "step-000004")
    point = choose(folder, "latest")
    assert point.step == 2
    assert len(point.passed_over) == 1
    assert said in point.passed_over[0]
    assert "step-000004" in point.passed_over[0]
    with pytest.raises(UserError, match=r"step-(00000)?4") as caught:
        choose(folder, "step-4")
    assert "\n" not in str(caught.value)


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one_and_says_so(words, run, tmp_path):
    out = half(run, tmp_path / "run")
    flip(out / "checkpoints" / "step-000004")
    named = Group([*words, "--resume", "step-4"], out=out)
    assert named.wait() == [2, 2]
    assert len(named.errors) == 1
    assert "step-000004: state.safetensors was changed since it was written" in named.errors[0]
    output = train([*words, "--resume"], out=out, ranks=2)
    message = events(out, "resumed")[0]["message"]
    assert message.startswith("resumed from step-000002")
    assert "passed over: " in message
    assert "step-000004: state.safetensors was changed" in message
    assert message in output, "and it is said on the terminal"
    assert science(out) == science(run)


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
    from trainer.distributed.engine import Engine

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
    if where == "loss":  # one of them is enough
        train([*flags, "--resume"], out=out, ranks=2)
        assert science(out) == science(run)


def test_the_rows_of_a_step_that_was_not_finite_reproduce_it(tiny, tmp_path):
    """A base whose last position is infinite: only one row of the training data is so long."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["transformer.wpe.weight"][20:] = float("inf")
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    write_records(tmp_path / "data.jsonl", rows=25, seed=1)
    long = {"prompt": "w1", "completion": " " + " ".join(f"w{n}" for n in range(2, 25))}
    text = (tmp_path / "data.jsonl").read_text() + json.dumps(long)
    (tmp_path / "data.jsonl").write_text(text)
    val = write_records(tmp_path / "val.jsonl", rows=9, seed=2)
    line = f"--mode full --model {tmp_path / 'base'} --data {tmp_path / 'data.jsonl'} --val-data {val}"
    line += " --objective completion --block-size 32 --global-batch 6 --micro-batch 1 --max-steps 8 --ds-config zero2"
    out = tmp_path / "run"
    group = Group([*line.split(), *TEMPLATES], out=out)
    assert group.wait() == [1, 1], group.output
    event = events(out, "not_finite")[0]
    step = event["step"]
    assert 25 in event["facts"]["rows"], "the long row"
    assert step > 1
    assert f"the weights are those after step {step - 1}" in group.errors[0]
    assert f"the rows are in not-finite-step-{step}-rank-*.npz" in group.errors[0]

    point = choose(out / "checkpoints", "latest")
    assert point.step == step - 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    load_weights(point, model)
    lengths = {}
    for rank in range(2):
        dump = {
            name: torch.from_numpy(array)
            for name, array in np.load(out / f"not-finite-step-{step}-rank-{rank}.npz").items()
        }
        for n in range(3):
            loss = model(input_ids=dump[f"input_ids_{n}"], labels=dump[f"labels_{n}"]).loss
            lengths[int(dump[f"index_{n}"])] = (dump[f"input_ids_{n}"].shape[1], bool(torch.isfinite(loss)))
    assert len(lengths) == 6, "every row of the global batch once"
    assert all(finite == (length <= 20) for length, finite in lengths.values()), lengths
    assert sum(not finite for _, finite in lengths.values()) == 1


def test_a_learning_rate_that_explodes(words, tmp_path):
    out = tmp_path / "run"
    group = Group([*words, "--lr", "1e30", "--eval-every", "1"], out=out)
    assert group.wait() == [1, 1]
    assert len(group.errors) == 1
    assert "evaluation after step 1: validation loss" in group.errors[0] or "step 2: " in group.errors[0]
    assert events(out, "not_finite")
    assert all(np.isfinite(row["loss"]) for row in rows(out) if "loss" in row)
