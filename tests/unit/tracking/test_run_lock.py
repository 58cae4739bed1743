"""One process writes into a run folder at a time, and nothing it writes goes through somebody's link."""

import fcntl
import subprocess
import sys

import pytest

from trainer.config.errors import TrainingError, UserError
from trainer.tracking.records import JsonlLogger
from trainer.tracking.run_lock import LOCK_FILE, RunLock
from trainer.training.run_folder import write_run_json

HOLD = """
import sys, time
from pathlib import Path
from trainer.tracking.run_lock import RunLock, lock_identity
RunLock(Path(sys.argv[1])).acquire()
assert lock_identity(Path(sys.argv[1]))  # as several hosts ask, and keep the lock
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_folder_that_another_process_holds_is_refused_until_that_is_dead(tmp_path):
    folder = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            RunLock(folder).acquire()
        assert str(caught.value).startswith(f"{folder}: process {holder.pid} on ")
        assert "is writing there; wait until it ends, or pass another --output-dir" in str(caught.value)
        assert (folder / LOCK_FILE).exists(), "the loser takes nothing away"
    finally:
        holder.kill()
        holder.communicate()
    lock = RunLock(folder)
    lock.acquire()
    assert lock.is_held
    lock.release()
    lock.release()
    RunLock(folder).acquire()


def test_a_child_of_the_holder_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        lock.release()
        RunLock(tmp_path).acquire()
    finally:
        child.kill()
        child.wait()


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert not lock.is_held
    lock.release()


def test_files_of_a_run_are_not_written_through_links(tmp_path):
    (tmp_path / "target").write_text("precious")
    for name in (LOCK_FILE, ".run.json.tmp", "run.json", "metrics.jsonl"):
        (tmp_path / name).symlink_to(tmp_path / "target")
    with pytest.raises(UserError, match="cannot write there"):
        RunLock(tmp_path).acquire()
    write_run_json(tmp_path, {"run_id": "x"})
    assert not (tmp_path / "run.json").is_symlink()
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl"):
        JsonlLogger(tmp_path / "metrics.jsonl", resume=True)
    assert (tmp_path / "target").read_text() == "precious"
