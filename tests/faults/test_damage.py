"""What goes wrong around a run, and what it then does: one clear line, the last good state in force, nothing lost. Full
and read-only file systems, damaged checkpoints, numbers that are not finite. test_kills.py has the kills,
test_signals.py the signals and the ranks that hang."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.process_groups import (
    assert_resumes_like,
    fault_at,
    last_logged_step,
    list_checkpoints,
    read_events,
    read_records,
    run_to_error,
)


def copy_until_step_4(finished_run: Path, out: Path) -> Path:
    """A copy of the run as it was after step 4."""
    shutil.copytree(finished_run, out)
    for name in ("step-000006", "step-000008"):
        shutil.rmtree(out / "checkpoints" / name)
    return out


@contextlib.contextmanager
def mounted_tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`; skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    process = subprocess.run(mount, capture_output=True, text=True)
    if process.returncode:
        pytest.skip(f"cannot mount a file system here: {process.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(folder: Path, free_bytes: int) -> None:
    """Take all room but `free_bytes`."""
    file = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while True:
            os.write(file, bytes(4096))
    os.close(file)
    os.truncate(folder / "filler", max(0, (folder / "filler").stat().st_size - free_bytes))


def test_a_disk_that_fills_up_while_saving_ends_the_run_with_one_line(argv, finished_run, tmp_path):
    """A checkpoint of this model takes 110 kB: there is room for one and a half."""
    with mounted_tmpfs(tmp_path / "disk", "size=4m") as disk:
        out = disk / "run"
        full = fault_at("trainer.training.checkpoint:CheckpointManager.save", 2, partial(fill_disk, disk, 65536))
        error = run_to_error(argv, out=out, fault=full, exit_code=1)
        assert "step-000004 not written: No space left on device; the checkpoints before it are whole" in error
        assert list_checkpoints(out) == ["step-000002"], "and nothing half-written takes up room"
        assert last_logged_step(out) == 4
        (disk / "filler").unlink()
        assert_resumes_like(finished_run, argv, out)


def test_a_read_only_run_folder_is_refused(argv, finished_run, tmp_path):
    with mounted_tmpfs(tmp_path / "disk", "size=4m") as disk:
        copy_until_step_4(finished_run, disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        error = run_to_error([*argv, "--resume"], out=disk / "run")
    assert re.search(f"--output-dir {disk / 'run'}: {disk}\\S* is read-only for this user", error)


def flip_byte(path: Path, offset: int = -1000) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one_and_says_so(argv, finished_run, tmp_path):
    out = copy_until_step_4(finished_run, tmp_path / "run")
    flip_byte(out / "checkpoints" / "step-000004" / "state.safetensors")
    error = run_to_error([*argv, "--resume", "step-4"], out=out)
    assert "step-000004: state.safetensors was changed since it was written" in error
    output = assert_resumes_like(finished_run, argv, out)
    message = read_events(out, "resumed")[0]["message"]
    assert message.startswith("resumed from step-000002")
    assert "passed over: " in message
    assert "step-000004: state.safetensors was changed" in message
    assert message in output, "and it is said on the terminal"


def test_losses_of_records_that_are_gone_or_changed_are_refused_before_anything_is_touched(
    argv, finished_run, tmp_path
):
    out = copy_until_step_4(finished_run, tmp_path / "run")
    evaluations, damaged = out / "eval_records", "step-000000-val.parquet"
    (evaluations / damaged).write_bytes((evaluations / damaged).read_bytes()[:-20])
    changed = run_to_error([*argv, "--resume"], out=out)
    (evaluations / damaged).rename(tmp_path / "damaged")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".run.lock"}
    gone = run_to_error([*argv, "--resume"], out=out)
    unreadable = f"{evaluations}: {damaged}: not whole records of an evaluation"
    missing = f"{evaluations} is not as it was when step-000004 was saved: it has 1 evaluations where 2 were written"
    for line, reason, remedy in ((changed, unreadable, "move it out"), (gone, missing, "--allow-change records")):
        assert reason in line
        assert remedy in line
    assert before.items() <= {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}.items()
    assert_resumes_like(finished_run, [*argv, "--allow-change", "records"], out)
    assert "records changed from as written to eval_records: it has 1 evaluations" in str(read_events(out, "resumed"))


def inject_nan(rank: int) -> None:
    """The loss of rank 1 in step 4."""
    from trainer.distributed.engine import Engine

    original = Engine.forward_backward

    def faulty(self: Engine, micro: Any, *, step: int, num_target_tokens: int) -> Any:
        loss_sum = original(self, micro, step=step, num_target_tokens=num_target_tokens)
        return loss_sum * float("nan") if (rank, step) == (1, 3) else loss_sum

    Engine.forward_backward = faulty  # type: ignore[method-assign]


def test_a_number_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(argv, finished_run, out):
    flags = [*argv, "--ds-config", "zero2"]
    error = run_to_error(flags, out=out, fault=inject_nan, exit_code=1)
    assert "error: step 4: " in error
    assert "the weights are those after step 3" in error
    event = read_events(out, "not_finite")[0]
    assert event["step"] == 4
    assert "loss" in event["message"]
    assert "step-000003" in list_checkpoints(out), "the last finite state is kept"
    assert last_logged_step(out) == 4
    assert len(event["facts"]["rows"]) == 3, "the rows of the global batch: of 21 blocks the fourth step has three"
    assert_resumes_like(finished_run, flags, out)


@pytest.mark.parametrize("lr", ["1e30", "100"], ids=["loss", "perplexity"])  # which is no longer finite
def test_a_learning_rate_that_explodes_stops_the_run_with_one_line(lr, argv, out):
    error = run_to_error([*argv, "--lr", lr, "--eval-every", "1"], out=out, exit_code=1)
    assert "evaluation after step 1: validation loss" in error or "step 2: " in error
    assert read_events(out, "not_finite")
    assert all(np.isfinite(row["loss"]) for row in read_records(out) if "loss" in row)
