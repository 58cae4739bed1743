"""What ends a rank from outside of its main thread, and what counts as movement of one that waits for a library."""

import contextlib
import hashlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
import torch.distributed as dist

from trainer.distributed import watch
from trainer.distributed.watch import Watchdog, WorkMeter

# --- signals ---

WAIT_FOR_A_SIGNAL = """
import contextlib, ctypes, sys
from trainer.distributed import watch
watch.TICK_SECONDS, watch.SignalHandler.REPEAT_GRACE_SECONDS = 0.05, 0.2
handler = watch.SignalHandler(grace_seconds=float(sys.argv[2]))
with handler.defer_signals() if sys.argv[1] == "in a step" else contextlib.nullcontext():
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(60)  # as a collective does: no handler of Python's runs in it
"""


@pytest.mark.parametrize(
    ("place", "grace", "second", "code"),
    [
        ("before the first step", 60, None, -signal.SIGTERM),  # as always
        ("in a step", 60, signal.SIGINT, 130),  # a second one ends the run at once
        ("in a step", 0.5, None, 143),
    ],
)
def test_a_signal_before_the_first_step_a_second_one_and_the_end_of_the_grace_time_end_a_rank(
    place, grace, second, code
):
    argv = [sys.executable, "-c", WAIT_FOR_A_SIGNAL, place, str(grace)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTERM)
            if second:
                time.sleep(0.5)
                assert process.poll() is None
                process.send_signal(second)
            stderr = process.communicate(timeout=20)[1]
        finally:
            process.kill()
    assert process.returncode == code
    says_grace = "error: the run did not end within 0.5 s (--grace) of SIGTERM; " in stderr
    assert says_grace == (grace == 0.5)


# --- ranks that hang, and the end of a failed one ---


@pytest.mark.parametrize(
    ("hangs", "fails", "is_kept"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_stacks_are_kept_where_a_run_hung_and_then_failed(hangs, fails, is_kept, tmp_path: Path, monkeypatch):
    """Of a rank, too, whose collective fails because a hung one has ended."""
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.05)
    monkeypatch.setattr("os._exit", lambda code: None)  # of the watchdog, which goes on then
    watchdog = Watchdog(0, ["host"], dist.HashStore())
    with contextlib.suppress(ConnectionError), watchdog.watch_for_hangs(0.3, tmp_path):
        time.sleep(1.0 * hangs)
        if fails:
            raise ConnectionError("Connection closed by peer")
    watchdog.close()
    stacks = {path.name: path.read_text() for path in tmp_path.glob("stacks/*")}
    assert list(stacks) == ["rank-0.txt"] * is_kept
    assert all("Timeout" in text for text in stacks.values())
    assert (tmp_path / "stacks").exists() == is_kept


@pytest.mark.parametrize("others_are_there", [True, False])
def test_a_rank_that_was_frozen_reports_an_error_again_once_it_hears_the_others(others_are_there, monkeypatch):
    """As where the whole run was stopped for long. Before it does they may have named it and ended."""
    monkeypatch.setattr(watch, "TICK_SECONDS", 0.05)
    store = dist.HashStore()
    watchdog, other = (Watchdog(rank, ["host"] * 2, store) for rank in (0, 1))
    with watchdog.watch_for_hangs(60):
        time.sleep(0.3)
        if not others_are_there:
            other.close()
        watchdog._last_tick_time -= 61
        assert not watchdog.claim_error_report()
        time.sleep(0.5)
        assert watchdog.claim_error_report() == others_are_there
    for each in (watchdog, other):
        each.close()


def test_a_rank_of_a_failed_run_that_does_not_end_by_itself_is_ended():
    """Gloo waits for a peer whose cable was cut when it is taken down, with Python's lock held."""
    code = """
import ctypes, torch.distributed as dist
from trainer.distributed import watch
watch.EXIT_SECONDS = watch.TICK_SECONDS = 1.0
watch.Watchdog(1, ["a", "b"], dist.HashStore()).close(has_failed=True)
ctypes.PyDLL(None).sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=40, check=False).returncode == 1


# --- movement ---

SECONDS = 1.0


def hash_for(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        hashlib.sha256(bytes(10**6))


def begin(work: str, folder: Path) -> None:
    """Start work that takes a thread or process of its own, as libraries do; a meter was made before it."""
    if work == "a computation":
        threading.Thread(target=hash_for, args=(SECONDS,), daemon=True).start()
    elif work == "a file written slowly":
        code = "import sys, time\nfor _ in range(20): open(sys.argv[1], 'a').write('x'), time.sleep(0.1)"
        threading.Thread(target=subprocess.run, args=([sys.executable, "-c", code, folder / "x"],)).start()
    elif work == "a lock that is never free":
        filelock.FileLock(folder / "lock").acquire()
        waiting = filelock.FileLock(folder / "lock", is_singleton=False)
        threading.Thread(target=waiting.acquire, daemon=True).start()


@pytest.mark.parametrize(
    ("work", "moves"),
    [
        ("a computation", True),
        ("a file written slowly", True),
        ("a lock that is never free", False),
    ],
)
def test_a_rank_moves_while_anything_of_it_works(work, moves, tmp_path: Path):
    hash_thread = threading.Thread(target=hash_for, args=(SECONDS,))  # as that which talks with other ranks
    hash_thread.start()
    meter = WorkMeter()
    begin(work, tmp_path)
    answers: list[bool] = []

    def follow() -> None:
        for _ in range(3):
            answers.append(meter.has_moved(SECONDS / 4))
            time.sleep(SECONDS / 4)

    time.sleep(0.2)
    thread = threading.Thread(target=follow)
    thread.start()
    thread.join()
    hash_thread.join()
    assert any(answers[1:]) == moves, answers  # the first has none before it


def test_threads_that_end_while_a_meter_looks_at_them_are_no_error():
    has_ended = threading.Event()

    def start_threads() -> None:
        while not has_ended.is_set():
            threads = [threading.Thread(target=time.sleep, args=(0.0005,)) for _ in range(20)]
            [thread.start() for thread in threads]

    starter = threading.Thread(target=start_threads)
    starter.start()
    try:
        for _ in range(200):
            WorkMeter().has_moved(1.0)
    finally:
        has_ended.set()
        starter.join()
