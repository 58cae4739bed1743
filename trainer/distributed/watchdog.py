"""What the ranks tell one another beside their collectives: where each stands, and that one has failed.

The main thread may sit in a collective for ever; so threads look after these.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.distributed.signals import RESUME_HINT, print_error

TICK_SECONDS = 1.0  # seconds between two looks
PEER_FAILURE_GRACE_SECONDS = 5.0  # seconds that a rank gets to end by itself when another has failed
SILENT_TICKS = 4  # ticks without a word after which a rank counts as lost, once a collective has failed


@dataclass(frozen=True, kw_only=True)
class RankState:
    """What a rank says of itself in the store, as JSON: its ticks and heartbeats so far, where its main thread is."""

    ticks: int
    heartbeats: int  #: of evaluations a rank with more rows has more than others
    step: int  #: the one that it began last
    is_waiting: bool  #: whether it is in a collective
    location: str


class Watchdog:
    """The board on which the ranks tell one another how they stand.

    `store`: a torch TCPStore on rank 0, None where there is one rank; `hosts`: of each rank the name of its host.
    Threads write and read it every TICK_SECONDS, and end this process where its main thread cannot: when another rank
    has failed and, within `watch_for_hangs`, when all stand still.
    """

    def __init__(self, rank: int, world_size: int, store: Any, hosts: Sequence[str] = ()) -> None:
        self.rank, self.world_size, self._store = rank, world_size, store
        self._hosts = tuple(hosts) if len(set(hosts)) > 1 else ()  # on one host nobody needs its name
        self._heartbeats = self._ticks = self._step = 0
        self._closed = threading.Event()
        self._peer_failure_tick: int | None = None  # the tick at which another rank's failure was learnt of
        self._is_failure_reported = False  # whether that rank says why
        self._has_failed = False  # whether this one failed itself
        self._is_store_lost = False
        self._hang_timeout_seconds = 0.0  # 0: nobody is watched
        self._freeze_limit_seconds = math.inf  # the time-out, also once the watching has ended
        self._last_tick_time = time.monotonic()
        self._stopped_tick: int | None = None  # the tick at which this process was found to have been frozen
        self._rank_states: list[RankState] = []
        self._last_progress_tick = self._last_exchange_tick = 0
        self._last_heard_ticks = [0] * world_size  # the tick at which each rank last told anything
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._publish()
            self._threads = [threading.Thread(target=target, daemon=True) for target in (self._exchange, self._tick)]
            for thread in self._threads:
                thread.start()

    def heartbeat(self, step: int | None = None) -> None:
        """The main thread moves; `step`: the one that it begins."""
        self._heartbeats += 1
        self._step = self._step if step is None else step

    @contextlib.contextmanager
    def watch_for_hangs(self, hang_timeout_seconds: float) -> Iterator[None]:
        """Until the end of the block, end the run where no rank moves for so long; one line names who hangs.

        Ticks of this process are counted, so a run that was suspended (Ctrl-Z, a sleeping laptop) is not ended.
        """
        self._last_progress_tick, self._hang_timeout_seconds = self._ticks, hang_timeout_seconds
        self._freeze_limit_seconds = hang_timeout_seconds or math.inf
        try:
            yield
        finally:
            self._hang_timeout_seconds = 0.0

    def claim_error_report(self) -> bool:
        """Whether this rank, which has failed, is the one to say why: the first of all to ask."""
        if self._store is None:
            return True
        if self._is_failure_reported or self._was_stopped():
            return False
        self._has_failed = True
        num_claims = call_with_timeout(2.0, self._announce_failure)
        if num_claims is not None:
            return num_claims == 1
        self._is_store_lost = True
        return self.rank == self._deputy_rank()

    def describe_lost_peer(self) -> str:
        """One line for the rank that reports a collective that failed: which ranks are gone, and on which hosts.

        Waits SILENT_TICKS, by which time those that are alive have been heard from or have said that they fail too.
        """
        lost_ranks = [0] if self._is_store_lost else self._wait_for_silent_ranks()
        name = " and ".join(self._name(rank) for rank in lost_ranks) or "another rank"
        return f"{name} of this run ended without a word (killed, out of memory, or cut off?); {RESUME_HINT}"

    def close(self, *, has_failed: bool = False) -> None:
        """This rank leaves. Where the run has failed, rank 0 waits until all the others know, 3 s at most."""
        if has_failed:
            self._wait_until_all_know()
        self._closed.set()
        for thread in self._threads:  # one that is in the store when Python ends aborts the process
            thread.join(2.0)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}" if self._hosts else f"rank {rank}"

    def _was_stopped(self) -> bool:
        """Whether this process was frozen for longer than the others wait for a rank (SIGSTOP, a host that hung): they
        have named it and are gone, which is no news when it wakes."""
        limit = self._freeze_limit_seconds
        if time.monotonic() - self._last_tick_time > limit:
            return True
        return self._stopped_tick is not None and (self._ticks - self._stopped_tick) * TICK_SECONDS <= 2 * limit

    def _deputy_rank(self) -> int:
        """Who speaks where rank 0, which keeps the store, is gone and nobody can be asked: one rank, on another host
        if there is one, since a host may go with all its ranks."""
        return next((rank for rank, host in enumerate(self._hosts) if host != self._hosts[0]), 1)

    def _announce_failure(self) -> int:
        self._store.set(f"failed/{self.rank}", "1")
        return int(self._store.add("failed", 1))

    def _wait_for_silent_ranks(self) -> list[int]:
        def read_failed_ranks() -> list[int]:
            return [rank for rank in range(self.world_size) if self._store.check([f"failed/{rank}"])]

        first_tick, failed_ranks = self._ticks, {self.rank}
        deadline = time.monotonic() + 2 * SILENT_TICKS * TICK_SECONDS
        while self._ticks < first_tick + SILENT_TICKS and time.monotonic() < deadline:
            # Asked all the time: rank 0 takes the store with it when it leaves.
            failed_ranks.update(call_with_timeout(1.0, read_failed_ranks) or ())
            time.sleep(TICK_SECONDS / 10)
        # What is heard for the first time at the next tick may have been said before.
        return [r for r, tick in enumerate(self._last_heard_ticks) if tick <= first_tick + 1 and r not in failed_ranks]

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
        state = RankState(
            ticks=self._ticks, heartbeats=self._heartbeats, step=self._step, is_waiting=is_waiting, location=location
        )
        self._store.set(f"rank/{self.rank}", json.dumps(asdict(state)))

    def _read_states(self) -> list[RankState]:
        rows = self._store.multi_get([f"rank/{rank}" for rank in range(self.world_size)])
        return [RankState(**json.loads(row)) for row in rows]

    def _exchange(self) -> None:
        try:
            self._rank_states = self._read_states()  # waits for the last rank to begin
            while not self._closed.wait(TICK_SECONDS):
                self._publish()
                states, previous_states = self._read_states(), self._rank_states
                self._last_exchange_tick = self._ticks
                for rank, (state, previous_state) in enumerate(zip(states, previous_states, strict=True)):
                    if state.ticks != previous_state.ticks:
                        self._last_heard_ticks[rank] = self._ticks
                    if state.heartbeats != previous_state.heartbeats:
                        self._last_progress_tick = self._ticks
                self._rank_states = states
                if not self._has_failed and not self._is_failure_reported and self._store.add("failed", 0):
                    self._peer_failure_tick, self._is_failure_reported = self._ticks, True
                    self._announce_failure()  # this rank knows
        except Exception:  # rank 0 is gone, and the store with it
            self._peer_failure_tick, self._is_store_lost = self._ticks, True

    def _tick(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            self._ticks += 1
            if time.monotonic() - self._last_tick_time > self._freeze_limit_seconds:
                self._stopped_tick = self._ticks
            self._last_tick_time = time.monotonic()
            if self._peer_failure_tick is not None:
                if (self._ticks - self._peer_failure_tick) * TICK_SECONDS <= PEER_FAILURE_GRACE_SECONDS:
                    continue
                is_told = self._is_failure_reported or self._has_failed or self._was_stopped()
                if not is_told and self.rank == self._deputy_rank():
                    print_error(self.describe_lost_peer())
                os._exit(1)  # the main thread waits for those who have left
            still_seconds = (self._ticks - self._last_progress_tick) * TICK_SECONDS
            if self._rank_states and 0 < self._hang_timeout_seconds < still_seconds:
                self._abort_hung_run()

    def _abort_hung_run(self) -> None:
        all_ranks = range(self.world_size)
        stale_tick = self._ticks - self._hang_timeout_seconds / TICK_SECONDS / 2
        is_store_frozen = self._last_exchange_tick < stale_tick  # and with it rank 0, which keeps it
        silent_ranks = [0] if is_store_frozen else [r for r in all_ranks if self._last_heard_ticks[r] < stale_tick]
        hung_ranks = silent_ranks or self._find_hung_ranks()
        waiting_ranks = [rank for rank in all_ranks if rank not in hung_ranks]
        if self.rank == min(waiting_ranks or hung_ranks) and not self._was_stopped():
            self._has_failed = True
            call_with_timeout(2.0, self._announce_failure)
            message = ", ".join(
                f"{self._name(rank)} "
                + ("does not answer" if silent_ranks else f"hangs at {self._rank_states[rank].location}")
                for rank in hung_ranks
            )
            if waiting_ranks and not is_store_frozen:
                plural, location = "s" * (len(waiting_ranks) > 1), self._rank_states[waiting_ranks[0]].location
                message += f"; rank{plural} {', '.join(map(str, waiting_ranks))} waiting at {location}"
            print_error(
                f"no rank has moved for {self._hang_timeout_seconds:g} s (--hang-timeout): {message}; {RESUME_HINT}"
            )
            self._wait_until_all_know()
        else:
            time.sleep(3 * TICK_SECONDS)  # the one who speaks goes first: a launcher ends all after one
        os._exit(1)

    def _find_hung_ranks(self) -> list[int]:
        """Who is waited for is a step behind who waits; where all are in one step, who is not in a collective."""
        all_ranks = range(self.world_size)
        min_step = min(state.step for state in self._rank_states)
        ranks_behind = [rank for rank in all_ranks if self._rank_states[rank].step == min_step]
        computing_ranks = [rank for rank in all_ranks if not self._rank_states[rank].is_waiting]
        return (ranks_behind if len(ranks_behind) < self.world_size else computing_ranks) or list(all_ranks)


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
