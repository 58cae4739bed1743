"""Signals, and a launcher that is gone: both ask a run to end with the step in hand, within a bounded time.

The main thread may sit in a collective for ever, and Python runs no signal handler there: a thread looks after these.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from trainer.distributed.launch_environment import reporting_rank

TICK_SECONDS = 1.0  # between two looks at the launcher
RESUME_HINT = "--resume goes on from the newest checkpoint"


def print_error(line: str) -> None:
    """One line on stderr, whatever became of it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {line}", file=sys.stderr, flush=True)


class SignalHandler:
    """SIGINT, SIGTERM and SIGUSR1 (the notice of SLURM's `--signal`) end the process at once; within `defer_signals`,
    after the step in hand. So does a lost launcher.

    A run that has not ended `grace_seconds` after the signal is ended, and so it is by a second signal, sent more than
    REPEAT_GRACE_SECONDS after the first.
    """

    REPEAT_GRACE_SECONDS = 2.0  # a launcher passes Ctrl-C on to ranks that the terminal has already signalled
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.signal_number = 0
        self._signal_time = 0.0
        self._is_deferred = False
        self._is_launcher_lost = False
        self._lock = threading.Lock()
        self._is_quiet = reporting_rank(os.environ) != 0
        self._launchers = find_launchers(os.environ)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # told at once, wherever the main thread is
        for signum in self.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        if self._launchers:
            _request_parent_death_signal()
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    @contextlib.contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Until the end of the block a signal is only asked for, with `stop_requested`."""
        self._is_deferred = True
        for signum in self.SIGNALS:
            signal.signal(signum, lambda *_: None)
        try:
            yield
        finally:
            for signum in self.SIGNALS:
                signal.signal(signum, signal.SIG_DFL)
            self._is_deferred = False

    def stop_requested(self) -> bool:
        """Whether a signal came, or the launcher is gone."""
        return bool(self.signal_number)

    def check_launcher(self) -> bool:
        """Whether the launcher is seen to be gone, for the first time: the run is then asked to end, and told why."""
        with self._lock:
            lost_pid = next((pid for pid, is_attached in self._launchers if not is_attached()), None)
            if self._is_launcher_lost or lost_pid is None:
                return False
            self._is_launcher_lost = True
            if self.signal_number:  # one that went to all of them
                return False
            self.signal_number, self._signal_time = signal.SIGTERM, time.monotonic()
            if not self._is_quiet:
                print_error(f"the launcher (process {lost_pid}) is gone; this run ends with the step in hand")
            return True

    def _watch(self, reader: int) -> None:
        while True:
            is_readable = bool(select.select([reader], [], [], TICK_SECONDS)[0])
            if is_readable:  # the parent death signal comes when the launcher's first thread ends: let the others
                time.sleep(0.05)
            # Before the signals are read: it says why they came.
            if self.check_launcher() and not self._is_deferred:
                os._exit(128 + signal.SIGTERM)
            for signum in os.read(reader, 64) if is_readable else b"":
                self._handle_signal(signum)
            if self.signal_number and time.monotonic() - self._signal_time > self.grace_seconds:
                self._end_after_grace()

    def _handle_signal(self, signum: int) -> None:
        if signum in self.SIGNALS and not self.signal_number:
            self.signal_number, self._signal_time = signum, time.monotonic()
        elif signum in self.SIGNALS and time.monotonic() - self._signal_time > self.REPEAT_GRACE_SECONDS:
            os._exit(128 + signum)

    def _end_after_grace(self) -> None:
        if not self._is_quiet:
            name = signal.Signals(self.signal_number).name
            print_error(f"the run did not end within {self.grace_seconds:g} s (--grace) of {name}; {RESUME_HINT}")
        os._exit(128 + self.signal_number)


def find_launchers(environ: Mapping[str, str]) -> list[tuple[int, Callable[[], bool]]]:
    """(process id, whether it still is above this process) of the launchers that started this rank; none: [].

    torchrun starts the ranks itself; `deepspeed` starts a second launcher, which outlives it, through ssh where there
    are several hosts. Only what the kernel says of parents and sessions is looked at, which is the same under both.
    """
    parent_pid = os.getppid()
    if "TORCHELASTIC_RUN_ID" in environ:
        is_adopted = _is_adopted(os.getpid(), parent_pid) or (parent_pid == 1 and not _is_same_program(1))
        return [(parent_pid, lambda: not is_adopted and os.getppid() == parent_pid)]
    if "CROSS_SIZE" not in environ:
        return []
    grandparent_pid = _parent_of(parent_pid)
    is_adopted = _is_adopted(os.getpid(), parent_pid)
    is_parent_adopted = _is_adopted(parent_pid, grandparent_pid)
    return [
        (parent_pid, lambda: not is_adopted and os.getppid() == parent_pid),
        (grandparent_pid, lambda: not is_parent_adopted and _parent_of(parent_pid) == grandparent_pid),
    ]


def _is_adopted(pid: int, parent_pid: int) -> bool:
    """Whether the process that started `pid` is gone, and `parent_pid` is the one that takes in orphans.

    A process that does not lead its session was started within it; who takes in orphans (init, a service manager)
    is of another session. Of a session's leader, as sshd and torchrun start them, nothing can be said.
    """
    try:
        session = os.getsid(pid)
        return session != pid and (parent_pid == 0 or os.getsid(parent_pid) != session)
    except OSError:  # it ended in between
        return True


def _is_same_program(pid: int) -> bool:
    """Whether a process runs the Python that this one does: torchrun as process 1 of a container."""
    try:
        return Path(f"/proc/{pid}/exe").resolve(strict=True) == Path("/proc/self/exe").resolve(strict=True)
    except OSError:  # another user's
        return False


def _parent_of(pid: int) -> int:
    """The process id of a process's parent; -1 where there is no such process."""
    import psutil

    try:
        return int(psutil.Process(pid).ppid())
    except psutil.Error:
        return -1


def _request_parent_death_signal() -> None:
    """Let the kernel send SIGTERM when the launcher ends, also while this process only imports."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the thread sees it within TICK_SECONDS
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
