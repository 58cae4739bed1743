"""Signals, and a launcher that is gone: both ask a run to end after the current step, within a bounded time.

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
from functools import partial

from trainer.distributed.launch_environment import reporting_rank

TICK_SECONDS = 1.0  # between two looks at the launcher
RESUME_HINT = "--resume goes on from the newest checkpoint"


def print_error(line: str) -> None:
    """One line on stderr, even where nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {line}", file=sys.stderr, flush=True)


class SignalHandler:
    """SIGINT, SIGTERM and SIGUSR1 (the notice of SLURM's `--signal`) end the process at once; within `defer_signals`,
    after the current step. So does a lost launcher.

    A run that has not ended `grace_seconds` after the signal is ended, as it is by a second signal that comes more than
    REPEAT_GRACE_SECONDS after the first.
    """

    REPEAT_GRACE_SECONDS = 2.0  # a launcher passes Ctrl-C on to ranks that the terminal has already signalled
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.signal_number = 0
        self._signal_time = 0.0
        self._is_deferred = self._is_launcher_lost = False
        self._lock = threading.Lock()
        self._is_reporting = reporting_rank(os.environ) == 0
        self._launchers = find_launchers(os.environ)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # readable at once, wherever the main thread is
        for signum in self.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        if self._launchers:  # the kernel sends SIGTERM when the launcher ends, also while this process imports
            with contextlib.suppress(OSError, AttributeError):  # not Linux: the thread sees it within TICK_SECONDS
                ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    @contextlib.contextmanager
    def defer_signals(self) -> Iterator[None]:
        """Until the end of the block a signal only sets `stop_requested`."""
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
        """Whether the launcher is found to be gone, for the first time: the run is then asked to end, and told why."""
        with self._lock:
            lost_pid = next((pid for pid, is_attached in self._launchers if not is_attached()), None)
            if self._is_launcher_lost or lost_pid is None:
                return False
            self._is_launcher_lost = True
            if self.signal_number:  # one that went to all of them
                return False
            self.signal_number, self._signal_time = signal.SIGTERM, time.monotonic()
            if self._is_reporting:
                print_error(f"the launcher (process {lost_pid}) is gone; this run ends after the current step")
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
                if signum in self.SIGNALS and not self.signal_number:
                    self.signal_number, self._signal_time = signum, time.monotonic()
                elif signum in self.SIGNALS and time.monotonic() - self._signal_time > self.REPEAT_GRACE_SECONDS:
                    os._exit(128 + signum)
            if self.signal_number and time.monotonic() - self._signal_time > self.grace_seconds:
                if self._is_reporting:
                    name = signal.Signals(self.signal_number).name
                    limit = f"{self.grace_seconds:g} s (--grace) of {name}"
                    print_error(f"the run did not end within {limit}; {RESUME_HINT}")
                os._exit(128 + self.signal_number)


def find_launchers(environ: Mapping[str, str]) -> list[tuple[int, Callable[[], bool]]]:
    """(process id, whether it still is above this process) of the launchers that started this rank; none: [].

    torchrun starts the ranks itself; `deepspeed` starts a second launcher, which outlives it, through ssh where there
    are several hosts. Only what the kernel says of parents and sessions is looked at, which is the same under both.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        children = [os.getpid()]
    elif "CROSS_SIZE" in environ:
        children = [os.getpid(), os.getppid()]
    else:
        return []
    launchers: list[tuple[int, Callable[[], bool]]] = []
    for pid in children:
        parent_pid = _parent_of(pid)
        launchers.append((parent_pid, partial(_is_child, pid, parent_pid, _is_adopted(pid, parent_pid))))
    return launchers


def _is_child(pid: int, parent_pid: int, is_adopted: bool) -> bool:
    return not is_adopted and _parent_of(pid) == parent_pid


def _is_adopted(pid: int, parent_pid: int) -> bool:
    """Whether the process that started `pid` is gone, and `parent_pid` is the one that takes in orphans.

    A process that does not lead its session was started within it; who takes in orphans (init, a service manager)
    is of another session. Of a session's leader, as sshd and torchrun start them, only this can be said: process 1 is
    its launcher where it runs the same Python, as in a container.
    """
    try:
        session = os.getsid(pid)
        if session != pid:
            return parent_pid == 0 or os.getsid(parent_pid) != session
    except OSError:  # it ended in between
        return True
    try:
        return parent_pid == 1 and not os.path.samefile("/proc/1/exe", "/proc/self/exe")
    except OSError:  # another user's
        return True


def _parent_of(pid: int) -> int:
    """The process id of a process's parent; -1 where there is no such process."""
    import psutil

    try:
        return int(psutil.Process(pid).ppid())
    except psutil.Error:
        return -1
