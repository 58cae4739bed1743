"""One process writes into a run folder at a time."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.config.errors import UserError

LOCK_FILE = ".run.lock"


class FolderInUseError(UserError):
    """Another process holds the lock; the text says which."""


class RunLock:
    """An exclusive lock on a run folder, freed by the end of its process however that comes.

    A POSIX record lock: children do not inherit it, and network file systems that keep locks (NFS with its lock
    service, Lustre with `flock`) keep it for other hosts too. Where the file system keeps none, `is_held` stays False.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self.is_held = False
        self._file = -1

    def acquire(self) -> None:
        """Take the lock, making the folder; UserError where another process has it or nothing can be written there."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try_to_acquire():
                pass  # the holder has just ended and removed the file that was opened
        except BlockingIOError:
            raise FolderInUseError(
                f"{self.path.parent}: {self._describe_holder()} is writing there; wait until it ends, or pass another "
                "--output-dir"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path.parent}: cannot write there: {error.strerror}; name another folder with --output-dir"
            ) from error

    def _try_to_acquire(self) -> bool:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            self.is_held = _lock(file)
            if self.is_held and not _is_same_file(file, self.path):
                os.close(file)
                return False
            os.ftruncate(file, 0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.pwrite(file, json.dumps(holder).encode(), 0)
        except OSError:
            os.close(file)
            raise
        self._file = file
        return True

    def release(self) -> None:
        """Let go of the folder; a second call does nothing."""
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()  # while it is held: whoever opened the file sees that it is gone, and opens another
        os.close(self._file)
        self._file, self.is_held = -1, False

    def _describe_holder(self) -> str:
        try:
            holder = json.loads(self.path.read_bytes()[:1000])
            return f"process {int(holder['pid'])} on {str(holder['host'])[:80]} (since {str(holder['since'])[:19]})"
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return "another process"


def _lock(file: int) -> bool:
    """Whether the lock was taken; False where the file system has none. BlockingIOError where another has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except PermissionError as error:  # EACCES, by which some systems say EAGAIN
        raise BlockingIOError(*error.args) from error
    except BlockingIOError:
        raise
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return False


def _is_same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.lstat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold_run_folder(folder: Path, on_rank_zero: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Have rank 0 hold the lock on the run folder; UserError on every rank where another run has it.

    `on_rank_zero`: calls a function there and raises its error everywhere (`DistContext.on_rank_zero`).
    """
    lock = RunLock(folder)
    on_rank_zero(lock.acquire)
    try:
        yield
    finally:
        lock.release()
