"""One process writes into a run folder at a time."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from trainer.config.errors import UserError
from trainer.config.text import shorten

LOCK_FILE = ".run.lock"


class FolderInUseError(UserError):
    """Another process holds the lock; the text says which."""


class RunLock:
    """An exclusive lock on a run folder, freed by the end of its process however that comes. A POSIX record lock:
    children do not inherit it, and network file systems that keep locks (NFS with its lock service, Lustre with
    `flock`) keep it for other hosts too. Where the file system keeps none, `is_held` stays False."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self.is_held = False
        self._file = -1

    def acquire(self) -> None:
        """Take the lock, making the folder; UserError where another process has it or nothing can be written there."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self.is_held = _lock(self._file)
            holder = f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})"
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, holder.encode(), 0)
        except BlockingIOError:
            holder = shorten(os.pread(self._file, 1000, 0).decode(errors="replace"), 120) or "another process"
            self.release()
            message = f"{folder}: {holder} is writing there; wait until it ends, or pass another --output-dir"
            raise FolderInUseError(message) from None
        except OSError as error:
            self.release()
            message = f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
            raise UserError(message) from error

    def release(self) -> None:
        """Let go of the folder, whose lock file stays; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file, self.is_held = -1, False


def lock_identity(folder: Path) -> tuple[int, int] | None:
    """What all hosts that see one lock file have equal; it is not opened, as closing it would let go of its lock."""
    with contextlib.suppress(OSError):
        status = (folder / LOCK_FILE).stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _lock(file: int) -> bool:
    """Whether the lock was taken; False where the file system has none. BlockingIOError where another has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # EACCES, by which some systems say EAGAIN
        raise BlockingIOError(*error.args) from error
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return False
    return True
