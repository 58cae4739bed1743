"""What ends a run from outside of its main thread: signals, a lost launcher, ranks that fail and ranks that hang.

The main thread may sit in a collective for ever, where Python runs no signal handler, and a store on a frozen host
never answers. So signals, the store and the end of this process have a thread each.
"""

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from trainer.config.errors import first_line
from trainer.distributed.launch_environment import reporting_rank

TICK_SECONDS = 1.0  # between two looks at the launcher, and at the other ranks
PEER_FAILURE_GRACE_SECONDS = 5.0  # that a rank gets to end by itself when another has failed
EXIT_SECONDS = 15.0  # that a rank of a failed run gets to end by itself
SILENT_TICKS = 4  # ticks without a sign of life after which a rank counts as lost, once a collective has failed
MIN_CPU_SHARE = 0.02  # of one processor, for a rank that works; polling a lock takes under 0.005
RESUME_HINT = "--resume goes on from the newest checkpoint"


def print_error(line: str) -> None:
    """One line on stderr, even where nobody reads it any more."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {line}", file=sys.stderr, flush=True)


class SignalHandler:
    """SIGINT, SIGTERM and SIGUSR1 (the notice of SLURM's `--signal`) end the process at once; within `defer_signals`,
    after the current step. So does a lost launcher. A run that has not ended `grace_seconds` after the signal is ended,
    as it is by a second signal that comes more than REPEAT_GRACE_SECONDS after the first."""

    REPEAT_GRACE_SECONDS = 2.0  # a launcher passes Ctrl-C on to ranks that the terminal has already signalled
    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, *, grace_seconds: float) -> None:
        self.grace_seconds = grace_seconds
        self.signal_number = 0
        self._signal_time = 0.0
        self._is_deferred = self._is_launcher_lost = False
        self._lock = threading.Lock()
        # torchrun alone, or `deepspeed` and its second launcher, which outlives it
        num_launchers = 1 if "TORCHELASTIC_RUN_ID" in os.environ else 2 if "CROSS_SIZE" in os.environ else 0
        self._launchers = psutil.Process().parents()[:num_launchers]
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # readable at once, wherever the main thread is
        for signum in self.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        if self._launchers:  # the kernel sends SIGTERM when the launcher ends, also while this process imports
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
        return bool(self.signal_number)

    def check_launcher(self) -> bool:
        """Whether the launcher is found to be gone, for the first time: the run is then asked to end, and told why."""
        with self._lock:
            lost = next(filter(_is_gone, self._launchers), None)
            if self._is_launcher_lost or lost is None:
                return False
            self._is_launcher_lost = True
            if self.signal_number:  # one that went to all of them
                return False
            self.signal_number, self._signal_time = signal.SIGTERM, time.monotonic()
            if reporting_rank(os.environ) == 0:
                print_error(f"the launcher (process {lost.pid}) is gone; this run ends after the current step")
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
                if reporting_rank(os.environ) == 0:
                    limit = f"{self.grace_seconds:g} s (--grace) of {signal.Signals(self.signal_number).name}"
                    print_error(f"the run did not end within {limit}; {RESUME_HINT}")
                os._exit(128 + self.signal_number)


def _is_gone(launcher: psutil.Process) -> bool:
    """Also one that was gone when this process began: process 1, which has its place then, is the launcher only where
    it shares the session or runs the same Python, as in a container."""
    try:
        if launcher.pid == 1:
            return os.getsid(1) != os.getsid(0) and not os.path.samefile("/proc/1/exe", "/proc/self/exe")
        return not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):  # it ended in between, or process 1 is another user's
        return True


class Watchdog:
    """What the ranks know of one another while they wait. `store`: on rank 0, None where nobody is watched."""

    def __init__(self, rank: int, hosts: Sequence[str], store: Any) -> None:
        self.rank, self.world_size, self._store = rank, len(hosts), store
        suffixes = [f" on {host}" * (len(set(hosts)) > 1) for host in hosts]
        self._names = [f"rank {other}{suffix}" for other, suffix in enumerate(suffixes)]
        # Reports where rank 0, which keeps the store, is gone: on another host if there is one, as a host may go.
        self._deputy = next((other for other, host in enumerate(hosts) if host != hosts[0]), 1)
        self._ticks = self._heartbeats = self._step = 0  # of this rank; a suspended process counts no ticks
        self._states: list[dict[str, Any]] = []  # what each rank said last
        self._heard_ticks = [0] * self.world_size  # when each was last heard from
        self._progress_tick = 0  # when any of them last moved
        self._failure_tick: int | None = None  # when this rank learnt that another has failed
        self._is_reported = False  # whether that one reports it
        self._has_failed = self._is_store_lost = self._is_watching = self._counts_work = False
        self._hang_timeout_seconds = math.inf
        self._last_tick_time = time.monotonic()
        self._wake_tick: int | None = None  # after this process was frozen
        self._stacks_path: Path | None = None  # for this rank's, while hangs are watched for
        self._stacks_due_tick = math.inf  # after which they are written there
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._watch)]
            for thread in self._threads:
                thread.start()

    # --- of the main thread ---

    def heartbeat(self, step: int | None = None) -> None:
        """The main thread moves; `step`: the one that it begins."""
        self._heartbeats += 1
        self._step = self._step if step is None else step
        self._stacks_due_tick = self._ticks + self._hang_timeout_seconds / TICK_SECONDS

    @contextlib.contextmanager
    def watch_for_hangs(self, hang_timeout_seconds: float, folder: Path | None = None) -> Iterator[None]:
        """Until the end of the block, end the run where no rank moves for so long, but not one that was suspended; one
        line names who hangs, and the stacks go to `folder`/stacks/rank-N.txt where this host has the folder."""
        outer = self._is_watching, self._stacks_path
        self._hang_timeout_seconds, self._progress_tick, self._is_watching = hang_timeout_seconds, self._ticks, True
        self._stacks_due_tick = self._ticks + hang_timeout_seconds / TICK_SECONDS
        if folder is not None and folder.is_dir():
            self._stacks_path = folder / "stacks" / f"rank-{self.rank}.txt"
        try:
            self._delete_stacks()  # of an earlier part of the run
            yield
            self._delete_stacks()  # kept on an error: the end of a hung rank fails the collective of one that waits
        finally:
            self._is_watching, self._stacks_path = outer

    @contextlib.contextmanager
    def watch_work(self, hang_timeout_seconds: float) -> Iterator[None]:
        """The same around work that is a library's, before and after the steps: a rank also moves while it computes,
        reads or writes (`WorkMeter`). One collective in which all ranks are may take longer."""
        meter, has_ended, outer = WorkMeter(), threading.Event(), self._counts_work

        def follow() -> None:
            while not has_ended.wait(TICK_SECONDS):
                if meter.has_moved(TICK_SECONDS):
                    self.heartbeat()

        if self._store is not None:
            threading.Thread(target=follow, daemon=True).start()
        self._counts_work = True
        try:
            with self.watch_for_hangs(hang_timeout_seconds):
                yield
        finally:
            has_ended.set()
            self._counts_work = outer

    def _delete_stacks(self) -> None:
        if self._stacks_path is not None:
            with contextlib.suppress(OSError):
                self._stacks_path.unlink()
                self._stacks_path.parent.rmdir()  # once the last rank has

    def claim_error_report(self) -> bool:
        """Whether this rank, which has failed, reports why: the first to ask does."""
        if self._store is None:
            return True
        if self._is_reported or self._was_frozen():
            return False
        self._has_failed = True
        first_rank = call_with_timeout(2.0, self._announce_failure)
        self._is_store_lost = first_rank is None
        return self.rank == (self._deputy if first_rank is None else first_rank)

    def describe_lost_peer(self, error: BaseException) -> str:
        """One line for the rank that reports a collective which failed with `error`: which ranks are gone, and on which
        hosts; waits until those that are alive have been heard from."""
        lost_ranks = [0]
        if not self._is_store_lost:
            first_tick = self._ticks
            deadline = time.monotonic() + 2 * SILENT_TICKS * TICK_SECONDS
            while self._ticks < first_tick + SILENT_TICKS and time.monotonic() < deadline:
                time.sleep(TICK_SECONDS / 10)
            # What is heard for the first time at the next tick may have been said before.
            lost_ranks = [r for r, tick in enumerate(self._heard_ticks) if tick <= first_tick + 1 and r != self.rank]
            lost_ranks = [
                r for r in lost_ranks if not call_with_timeout(1.0, partial(self._store.check, [f"failed/{r}"]))
            ]
        if not lost_ranks:
            return f"a connection between ranks failed, and all of them still answer: {first_line(error)}"
        names = " and ".join(self._names[rank] for rank in lost_ranks)
        return f"{names} of this run ended without a word (killed, out of memory, or cut off?); {RESUME_HINT}"

    def close(self, *, has_failed: bool = False) -> None:
        """This rank leaves. Rank 0 takes the store with it: where the run has failed, once the others know."""
        if has_failed and self._store is not None:
            # Gloo may wait without end for a peer that is gone, with Python's lock held: a thread that is not Python's.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=nowhere)
            time.sleep(2 * TICK_SECONDS if self.rank == 0 else 0)
        self._closed.set()
        for thread in self._threads:
            thread.join(2.0)  # one that is in the store when Python ends aborts the process

    # --- of the threads ---

    def _announce_failure(self) -> int:
        self._store.set(f"failed/{self.rank}", "")
        return int(self._store.compare_set("failed", "", str(self.rank)))

    def _was_frozen(self) -> bool:
        """Whether this process stood still for so long (SIGSTOP, a host that hung) that the others may have named it;
        no more once all of them are heard again, as where the whole run was stopped."""
        if time.monotonic() - self._last_tick_time > self._hang_timeout_seconds:
            return True
        if self._wake_tick is None:
            return False
        # What is heard for the first time at the next tick may have been said before.
        others = (tick for rank, tick in enumerate(self._heard_ticks) if rank != self.rank)
        return min(others, default=math.inf) <= self._wake_tick + 1

    def _exchange(self) -> None:
        keys = [f"rank/{rank}" for rank in range(self.world_size)]
        try:
            while not self._closed.wait(TICK_SECONDS if self._states else 0):
                location, is_waiting = _main_thread_location()
                state = {
                    "ticks": self._ticks,
                    "heartbeats": self._heartbeats,  # in an evaluation a rank with more rows has more than others
                    "step": self._step,
                    "location": location,
                    "is_waiting": is_waiting,  # in a collective
                }
                self._store.set(keys[self.rank], json.dumps(state))
                states = [json.loads(row) for row in self._store.multi_get(keys)]  # at first: waits for the last rank
                for rank, (state, previous) in enumerate(zip(states, self._states or states, strict=True)):
                    if state["ticks"] != previous["ticks"]:
                        self._heard_ticks[rank] = self._ticks
                    if state["heartbeats"] != previous["heartbeats"]:
                        self._progress_tick = self._ticks
                self._states = states
                if self._failure_tick is None and not self._has_failed and self._store.check(["failed"]):
                    self._failure_tick, self._is_reported = self._ticks, True
        except Exception:  # rank 0 is gone, and the store with it
            self._failure_tick, self._is_store_lost = self._ticks, True

    def _watch(self) -> None:
        """End this process where its main thread cannot: another rank has failed, or all stand still."""
        while not self._closed.wait(TICK_SECONDS):
            self._ticks += 1
            if time.monotonic() - self._last_tick_time > self._hang_timeout_seconds:
                self._wake_tick = self._ticks
                self._stacks_due_tick = self._ticks + 2 * self._hang_timeout_seconds / TICK_SECONDS
            self._last_tick_time = time.monotonic()
            still_seconds = (self._ticks - self._progress_tick) * TICK_SECONDS
            is_still = self._is_watching and self._states and still_seconds > self._hang_timeout_seconds
            if is_still and self._stacks_due_tick < math.inf and not self._was_frozen():
                self._stacks_due_tick = 0.0  # this rank may have moved later than it was heard of, and is to end now
            if self._stacks_path is not None and self._ticks > self._stacks_due_tick:
                self._stacks_due_tick = math.inf
                call_with_timeout(2.0, partial(self._write_stacks, self._stacks_path))
            if self._failure_tick is not None:
                if (self._ticks - self._failure_tick) * TICK_SECONDS <= PEER_FAILURE_GRACE_SECONDS:
                    continue
                is_said = self._is_reported or self._has_failed or self._was_frozen()
                if not is_said and self.rank == self._deputy:
                    print_error(self.describe_lost_peer(ConnectionError()))
                os._exit(1)
            if is_still and self._report_hang():
                os._exit(1)

    def _write_stacks(self, path: Path) -> None:
        """`faulthandler.dump_traceback_later` would read them while Python runs on after SIGCONT, and crash there."""
        with open(os.memfd_create("stacks"), "r+", encoding="utf-8") as memory:  # no disk, for which Python would wait
            faulthandler.dump_traceback(memory)
            memory.seek(0)
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"Timeout: no progress for {self._hang_timeout_seconds:g} s\n{memory.read()}", "utf-8")

    def _report_hang(self) -> bool:
        """One rank names those that hang before the others end: a launcher then ends all. False where none hangs."""
        ranks, states = range(self.world_size), self._states
        stale_tick = self._ticks - self._hang_timeout_seconds / TICK_SECONDS / 2
        silent_ranks = [rank for rank in ranks if self._heard_ticks[rank] < stale_tick]
        if self.rank in silent_ranks:  # the store of a frozen rank 0 does not even give back what this rank has said
            silent_ranks = [0]
        if not silent_ranks and self._counts_work and all(state["is_waiting"] for state in states):
            return False
        hung_ranks = silent_ranks
        if not hung_ranks:  # those a step behind the others; where all are in one step, those outside of a collective
            first_step = min(state["step"] for state in states)
            hung_ranks = [rank for rank in ranks if states[rank]["step"] == first_step]
            if len(hung_ranks) == self.world_size:
                hung_ranks = [rank for rank in ranks if not states[rank]["is_waiting"]] or hung_ranks
        is_reporting_rank = self.rank == min(set(ranks) - set(hung_ranks) or hung_ranks) and not self._was_frozen()
        # None: of a frozen rank 0; another rank: it has failed meanwhile, and says why.
        if is_reporting_rank and call_with_timeout(2.0, self._announce_failure) in (None, self.rank):
            problem = "does not answer" if silent_ranks else "hangs at {location}"
            message = ", ".join(f"{self._names[rank]} {problem.format(**states[rank])}" for rank in hung_ranks)
            if self._stacks_path is not None:
                message += f"; the stacks are in {self._stacks_path.parent}"
            hint = f"; {RESUME_HINT}" * (not self._counts_work)
            print_error(f"no rank made progress for {self._hang_timeout_seconds:g} s (--hang-timeout): {message}{hint}")
        time.sleep(3 * TICK_SECONDS)
        return True


def call_with_timeout(timeout_seconds: float, fn: Callable[[], Any]) -> Any:
    """What `fn` returns; None where it raises or takes longer (a store on a frozen rank never answers)."""
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


class WorkMeter:
    """Whether this process moves while a library works for it and no loop of ours does: it computes, reads or writes.
    What waits for a lock, a server or a disk that does not answer does none of these.

    Looks at the main thread and at threads and processes begun since the meter was made: those before talk with other
    ranks, which goes on where a rank hangs.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._ignored_threads = {thread.id for thread in self._process.threads()} - {self._process.pid}
        self._ignored_children = self._children()
        self._previous: tuple[float, set[str]] = 0.0, set()

    def has_moved(self, seconds: float) -> bool:
        """Whether anything moved in the `seconds` since the last call, which another thread than the main one makes."""
        try:
            previous, self._previous = self._previous, self._measure()
        except (OSError, psutil.Error):  # something ended meanwhile
            return True
        return self._previous[1] != previous[1] or self._previous[0] - previous[0] >= MIN_CPU_SHARE * seconds

    def _children(self) -> set[int]:
        children = set[int]()
        for thread in os.listdir("/proc/self/task"):  # psutil would read all processes of the host
            with contextlib.suppress(OSError):  # it has ended
                text = Path(f"/proc/self/task/{thread}/children").read_text(encoding="ascii")
                children |= set(map(int, text.split()))
        return children

    def _measure(self) -> tuple[float, set[str]]:
        """(processor seconds, what each thread and process has read and written)."""
        ignored_threads = self._ignored_threads | {threading.get_native_id()}
        threads = [thread for thread in self._process.threads() if thread.id not in ignored_threads]
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
        return cpu_seconds, transfers
