"""Whether this process moves while a library works for it and no loop of ours does: it computes, reads, writes or
receives. What waits for a lock, a server or a disk that does not answer does none of these."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

MIN_CPU_SHARE = 0.02  # of one processor; polling a lock, as libraries do while they wait, takes under 0.005
TCP_INFO_RECEIVED = 128  # where linux/tcp.h has tcpi_bytes_received, 64 bits


class WorkMeter:
    """The threads, connections and processes that this process has begun since the meter was made, and its main thread.

    Those before do the talking with other ranks, which goes on where a rank hangs. `count_bytes`: of files that may be
    written by another process, for which this one waits.
    """

    def __init__(self, count_bytes: Callable[[], int] = lambda: 0) -> None:
        self._process, self._count_bytes = psutil.Process(), count_bytes
        self._ignored_threads = {thread.id for thread in self._process.threads()} - {self._process.pid}
        self._ignored_files, self._ignored_children = set(os.listdir("/proc/self/fd")), self._children()
        self._previous: tuple[float, set[str], int, int] = 0.0, set(), 0, 0

    def has_moved(self, seconds: float) -> bool:
        """Whether anything moved in the `seconds` since the last call, which another thread than the main one makes."""
        try:
            previous, self._previous = self._previous, self._measure()
        except (OSError, psutil.Error):  # something ended meanwhile, or a file was renamed
            return True
        return self._previous[1:] != previous[1:] or self._previous[0] - previous[0] >= MIN_CPU_SHARE * seconds

    def _children(self) -> set[int]:
        children = set[int]()
        for thread in os.listdir("/proc/self/task"):  # psutil would read all processes of the host
            with contextlib.suppress(OSError):  # it has ended
                text = Path(f"/proc/self/task/{thread}/children").read_text(encoding="ascii")
                children |= set(map(int, text.split()))
        return children

    def _measure(self) -> tuple[float, set[str], int, int]:
        """(processor seconds, what each thread and process has read and written, bytes received, `count_bytes`)."""
        threads = [
            t for t in self._process.threads() if t.id not in self._ignored_threads | {threading.get_native_id()}
        ]
        cpu_seconds = sum(thread.user_time + thread.system_time for thread in threads)
        folders = [f"self/task/{thread.id}" for thread in threads]
        for child in self._children() - self._ignored_children:
            with contextlib.suppress(psutil.Error):
                cpu_seconds += sum(psutil.Process(child).cpu_times()[:2])
                folders.append(str(child))
        transfers = set[str]()
        for folder in folders:
            with contextlib.suppress(OSError):  # it has ended, or the kernel does not count this
                transfers.add(Path(f"/proc/{folder}/io").read_text(encoding="ascii"))
        return cpu_seconds, transfers, self._count_received_bytes(), self._count_bytes()

    def _count_received_bytes(self) -> int:
        num_bytes = 0
        for file in set(os.listdir("/proc/self/fd")) - self._ignored_files:
            with contextlib.suppress(OSError):  # closed meanwhile
                if not os.readlink(f"/proc/self/fd/{file}").startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(file))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_RECEIVED + 8)
                    num_bytes += struct.unpack_from("=Q", info, TCP_INFO_RECEIVED)[0]
        return num_bytes
