"""What ends a run that cannot go on: a signal, a launcher that is gone, a rank that hangs or was lost.

The main thread may sit in a collective for ever, and Python runs no signal handler there; so threads look after these.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TICK_SECONDS = 1.0  # seconds between two looks
ORPHAN_GRACE_SECONDS = (
    30.0  # seconds that a run without a launcher gets to end its step and save; launchers kill after as many
)
RESUME_HINT = "--resume goes on from the newest checkpoint"
PEER_LOST_MESSAGE = f"another rank of this run ended without a word (killed, or out of memory?); {RESUME_HINT}"
PEER_FAILURE_GRACE_SECONDS = 5.0  # seconds that a rank gets to end by itself when another has failed


def print_error(line: str) -> None:
    """One line on stderr, whatever became of it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {line}", file=sys.stderr, flush=True)


# --- signals and the launcher ------------------------------------------------------------------------------------


class SignalHandler:
    """SIGINT and SIGTERM end the process at once; while `defer_signals`, after the step in hand. So does a lost
    launcher.

    A second signal, after GRACE, ends the process at once in any case.
    """

    REPEAT_GRACE_SECONDS = 2.0  # seconds; a launcher passes Ctrl-C on to ranks that the terminal has already signalled
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.signal_number = 0
        self._signal_time = 0.0
        self._is_deferred = False
        self._orphaned_time = 0.0  # when the launcher was found to be gone
        self._lock = threading.Lock()
        self._is_quiet = environ.get("RANK", "0") != "0"
        self._launchers = find_launchers(environ)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # told at once, wherever the main thread is
        for signum in self.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
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
        """Whether the launcher is found to be gone, for the first time: the run is then asked to end, and told why."""
        with self._lock:
            lost_pid = (
                None
                if self._orphaned_time
                else next((pid for pid, is_attached in self._launchers if not is_attached()), None)
            )
            if lost_pid is None:
                return False
            self._orphaned_time = time.monotonic()
            if self.signal_number:  # one that went to all of them
                return False
            self.signal_number = signal.SIGTERM
            if not self._is_quiet:
                print_error(f"the launcher (process {lost_pid}) is gone; this run ends with the step in hand")
            return True

    def _watch(self, reader: int) -> None:
        while True:
            if select.select([reader], [], [], TICK_SECONDS)[0]:
                for signum in os.read(reader, 64):
                    self._handle_signal(signum)
            if self.check_launcher() and not self._is_deferred:
                os._exit(128 + signal.SIGTERM)
            if self._orphaned_time and time.monotonic() - self._orphaned_time > ORPHAN_GRACE_SECONDS:
                os._exit(128 + signal.SIGTERM)

    def _handle_signal(self, signum: int) -> None:
        if signum not in self.SIGNALS:
            return
        if self.signal_number and time.monotonic() - self._signal_time > self.REPEAT_GRACE_SECONDS:
            os._exit(128 + signum)
        if not self.signal_number:
            self.signal_number, self._signal_time = signum, time.monotonic()


def find_launchers(environ: Mapping[str, str]) -> list[tuple[int, Callable[[], bool]]]:
    """(process id, whether it still is above this process) of the launchers that started this rank; none: [].

    torchrun starts the ranks itself; `deepspeed` starts a second launcher, which then outlives it.
    """
    parent_pid, script_name = os.getppid(), Path(sys.argv[0]).name
    if "TORCHELASTIC_RUN_ID" in environ:
        # One killed before this rank began has left its place to a process that is not Python.
        was_alive_at_start = any(word in _command_line(parent_pid) for word in ("torch", "python", script_name))
        return [(parent_pid, lambda: was_alive_at_start and os.getppid() == parent_pid)]
    if "CROSS_SIZE" not in environ:
        return []
    import psutil

    try:
        grandparent_pid = psutil.Process(parent_pid).ppid()
    except psutil.Error:
        grandparent_pid = 0
    # A `deepspeed` killed before this rank began has left its place to a process that knows nothing of the script.
    was_alive_at_start = any(word in _command_line(grandparent_pid) for word in ("deepspeed", script_name))

    def is_attached() -> bool:
        try:
            return was_alive_at_start and psutil.Process(parent_pid).ppid() == grandparent_pid
        except psutil.Error:
            return False

    return [(parent_pid, lambda: os.getppid() == parent_pid), (grandparent_pid, is_attached)]


def _command_line(pid: int) -> str:
    """The command line of a process; "" where it is not to be seen."""
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


# --- the other ranks ---------------------------------------------------------------------------------------------


class Watchdog:
    """What the ranks tell one another beside the collectives: where each stands, and that one has failed.

    `store`: a torch TCPStore on rank 0, None where there is one rank. Threads write and read it every TICK_SECONDS,
    and end
    this process where its main thread cannot: when another rank has failed and, within `watch_for_hangs`, when all
    stand still.
    """

    def __init__(self, rank: int, world_size: int, store: Any) -> None:
        self.rank, self.world_size, self._store = rank, world_size, store
        self._heartbeats = self._ticks = 0
        self._closed = threading.Event()
        self._peer_failure_tick: int | None = None  # the tick at which another rank's failure was learnt of
        self._is_failure_reported = self._has_failed = (
            False  # whether that rank says why; whether this one failed itself
        )
        self._hang_timeout_seconds = 0.0  # seconds; 0: nobody is watched
        self._rank_states: list[tuple[int, int, bool, str]] = []
        self._last_progress_tick = self._last_exchange_tick = 0  # ticks
        self._last_heard_ticks = [0] * world_size  # the tick at which each rank last told anything
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._publish()
            self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._tick)]
            for thread in self._threads:
                thread.start()

    def heartbeat(self) -> None:
        """The main thread moves."""
        self._heartbeats += 1

    @contextlib.contextmanager
    def watch_for_hangs(self, hang_timeout_seconds: float) -> Iterator[None]:
        """Until the end of the block, end the run where no rank moves for `hang_timeout_seconds` seconds; one line
        names who hangs.

        Ticks of this process are counted, so a run that was suspended (Ctrl-Z, a sleeping laptop) is not ended.
        """
        self._last_progress_tick, self._hang_timeout_seconds = self._ticks, hang_timeout_seconds
        try:
            yield
        finally:
            self._hang_timeout_seconds = 0.0

    def claim_error_report(self) -> bool:
        """Whether this rank, which has failed, is the one to say why: the first of all to ask."""
        if self._store is None:
            return True
        if self._is_failure_reported:
            return False
        self._has_failed = True
        num_claims = call_with_timeout(2.0, lambda: self._store.add("failed", 1))
        # Rank 0 is gone without a word, and nobody can be asked: one rank speaks for all that were left.
        return num_claims == 1 if num_claims is not None else self.rank <= 1

    def close(self, *, has_failed: bool = False) -> None:
        """This rank leaves. Where the run has failed, rank 0 waits until all the others know, 3 s at most."""
        if has_failed:
            self._wait_until_all_know()
        self._closed.set()
        for thread in self._threads:  # one that is in the store when Python ends aborts the process
            thread.join(2.0)

    def _wait_until_all_know(self) -> None:
        if self.rank == 0 and self._store is not None:
            deadline = time.monotonic() + 3.0
            while (
                time.monotonic() < deadline
                and call_with_timeout(1.0, lambda: self._store.add("failed", 0)) != self.world_size
            ):
                time.sleep(0.05)

    def _publish(self) -> None:
        location, is_waiting = _main_thread_location()
        self._store.set(f"rank/{self.rank}", f"{self._ticks} {self._heartbeats} {int(is_waiting)} {location}")

    def _read_states(self) -> list[tuple[int, int, bool, str]]:
        """Of every rank (its ticks, beats, whether it waits in a collective, place)."""
        fields = [
            row.decode().split(" ", 3) for row in self._store.multi_get([f"rank/{r}" for r in range(self.world_size)])
        ]
        return [(int(ticks), int(beats), is_waiting == "1", location) for ticks, beats, is_waiting, location in fields]

    def _exchange(self) -> None:
        try:
            self._rank_states = self._read_states()  # waits for the last rank to begin
            while not self._closed.wait(TICK_SECONDS):
                self._publish()
                states, previous_states = self._read_states(), self._rank_states
                self._last_exchange_tick = self._ticks
                for rank, (state, previous_state) in enumerate(zip(states, previous_states, strict=True)):
                    if state[0] != previous_state[0]:
                        self._last_heard_ticks[rank] = self._ticks
                    if state[1] != previous_state[1]:
                        self._last_progress_tick = self._ticks
                self._rank_states = states
                if not self._has_failed and not self._is_failure_reported and self._store.add("failed", 0):
                    self._peer_failure_tick, self._is_failure_reported = self._ticks, True
                    self._store.add("failed", 1)  # this rank knows
        except Exception:  # rank 0 is gone, and the board with it
            self._peer_failure_tick = self._ticks

    def _tick(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            self._ticks += 1
            if self._peer_failure_tick is not None:
                if (self._ticks - self._peer_failure_tick) * TICK_SECONDS <= PEER_FAILURE_GRACE_SECONDS:
                    continue
                if not self._is_failure_reported and not self._has_failed and self.rank == 1:
                    print_error(PEER_LOST_MESSAGE)
                os._exit(1)  # the main thread waits for those who have left
            if (
                self._hang_timeout_seconds
                and self._rank_states
                and (self._ticks - self._last_progress_tick) * TICK_SECONDS > self._hang_timeout_seconds
            ):
                self._abort_hung_run()

    def _abort_hung_run(self) -> None:
        all_ranks = range(self.world_size)
        stale_tick = self._ticks - self._hang_timeout_seconds / TICK_SECONDS / 2
        is_store_frozen = self._last_exchange_tick < stale_tick  # the board, and with it rank 0, which keeps it
        silent_ranks = (
            [0] if is_store_frozen else [rank for rank in all_ranks if self._last_heard_ticks[rank] < stale_tick]
        )
        min_heartbeats = min(row[1] for row in self._rank_states)
        ranks_behind = [rank for rank in all_ranks if self._rank_states[rank][1] == min_heartbeats]
        computing_ranks = [rank for rank in all_ranks if not self._rank_states[rank][2]]
        # Who waits has done more than who is waited for; where all have done as much, who is not in a collective.
        hung_ranks = (
            silent_ranks
            or (ranks_behind if len(ranks_behind) < self.world_size else computing_ranks)
            or list(all_ranks)
        )
        waiting_ranks = [rank for rank in all_ranks if rank not in hung_ranks]
        if self.rank == min(waiting_ranks or hung_ranks):
            self._has_failed = True
            call_with_timeout(2.0, lambda: self._store.add("failed", 1))
            message = ", ".join(f"rank {rank} {self._describe_rank(rank, rank in silent_ranks)}" for rank in hung_ranks)
            if waiting_ranks and not is_store_frozen:
                message += (
                    f"; rank{'s' * (len(waiting_ranks) > 1)} {', '.join(map(str, waiting_ranks))} waiting at "
                    f"{self._rank_states[waiting_ranks[0]][3]}"
                )
            print_error(
                f"no rank has moved for {self._hang_timeout_seconds:g} s (--hang-timeout): {message}; {RESUME_HINT}"
            )
            self._wait_until_all_know()
        else:
            time.sleep(3 * TICK_SECONDS)  # the one who speaks goes first: a launcher ends all after one
        os._exit(1)

    def _describe_rank(self, rank: int, is_silent: bool) -> str:
        return "does not answer" if is_silent else f"hangs at {self._rank_states[rank][3]}"


def call_with_timeout(timeout_seconds: float, fn: Callable[[], Any]) -> Any:
    """What `fn` returns; None where it raises or takes longer (a store on a frozen rank answers never)."""
    results: list[Any] = []

    def target() -> None:
        with contextlib.suppress(Exception):
            results.append(fn())

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return results[0] if results else None


def _main_thread_location() -> tuple[str, bool]:
    """(file, line and function of ours that the main thread is in, whether it waits in a collective)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    package_dir, is_waiting = Path(__file__).parents[1], False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_waiting = is_waiting or str(frame.f_globals.get("__name__")).startswith("torch.distributed")
        if package_dir in path.parents:
            return f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}", is_waiting
        frame = frame.f_back
    return "an unknown place", is_waiting
