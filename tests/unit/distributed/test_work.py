"""What counts as movement of a rank that waits for a library, and what does not."""

import contextlib
import hashlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from trainer.distributed.work import WorkMeter

SECONDS = 1.5


def trickle(server: socket.socket) -> None:
    with server.accept()[0] as connection:
        for _ in range(20):
            connection.send(b"x")
            time.sleep(SECONDS / 10)


def receive(port: int) -> None:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
        while connection.recv(1):
            pass


def hash_for(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        hashlib.sha256(bytes(10**6))


def begin(work: str, server: socket.socket, folder: Path) -> None:
    """Start work that takes a thread or process of its own, as libraries do; a meter was made before it."""
    if work in ("a download of a few bytes", "a server that is silent"):
        if work == "a download of a few bytes":
            threading.Thread(target=trickle, args=(server,)).start()
        threading.Thread(target=receive, args=(server.getsockname()[1],), daemon=True).start()
    elif work == "a computation":
        threading.Thread(target=hash_for, args=(SECONDS,), daemon=True).start()
    elif work == "a file written slowly":
        code = "import sys, time\nfor _ in range(20): open(sys.argv[1], 'a').write('x'), time.sleep(0.1)"
        threading.Thread(target=subprocess.run, args=([sys.executable, "-c", code, folder / "x"],)).start()
    elif work == "a download by another process":
        threading.Thread(target=lambda: (time.sleep(0.8), (folder / "a.incomplete").write_text("x"))).start()
    elif work == "a lock that is never free":
        filelock.FileLock(folder / "lock").acquire()
        waiting = filelock.FileLock(folder / "lock", is_singleton=False)
        threading.Thread(target=waiting.acquire, daemon=True).start()


@pytest.mark.parametrize(
    ("work", "moves"),
    [
        ("a download of a few bytes", True),
        ("a computation", True),
        ("a file written slowly", True),
        ("a download by another process", True),
        ("a lock that is never free", False),
        ("a server that is silent", False),
    ],
)
def test_a_rank_moves_while_anything_of_it_works(work, moves, tmp_path: Path):
    hash_thread = threading.Thread(target=hash_for, args=(SECONDS,))  # as that which talks with other ranks
    hash_thread.start()
    meter = WorkMeter(lambda: len(list(tmp_path.glob("*.incomplete"))))
    server = socket.create_server(("127.0.0.1", 0))
    begin(work, server, tmp_path)
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
    server.close()
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
