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
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while self._file < 0:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    is_locked = _lock(file)
                    with contextlib.suppress(FileNotFoundError):
                        # Else the holder has just ended, and removed the file that was opened.
                        if not is_locked or os.path.samestat(os.fstat(file), os.lstat(self.path)):
                            holder = f"process {os.getpid()} on {socket.gethostname()}"
                            os.ftruncate(file, 0)
                            os.pwrite(file, f"{holder} (since {time.strftime('%Y-%m-%d %H:%M:%S')})".encode(), 0)
                            self._file, self.is_held = file, is_locked
                finally:
                    if self._file != file:
                        os.close(file)
        except BlockingIOError:
            holder = ""
            with contextlib.suppress(OSError):
                holder = shorten(self.path.read_bytes()[:1000].decode(errors="replace"), 120)
            message = f"{folder}: {holder or 'another process'} is writing there; wait until it ends, or pass another "
            raise FolderInUseError(f"{message}--output-dir") from None
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
            ) from error

    def release(self) -> None:
        """Let go of the folder; a second call does nothing."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()  # while it is held: whoever opened the file sees that it is gone, and opens another
            os.close(self._file)
            self._file, self.is_held = -1, False


def _lock(file: int) -> bool:
    """Whether the lock was taken; False where the file system has none. BlockingIOError where another has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # EACCES, by which some systems say EAGAIN
        raise BlockingIOError(*error.args) from error
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return False
    return True
