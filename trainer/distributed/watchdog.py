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

TICK = 1.0  # seconds between two looks
LAST = 30.0  # seconds that a run without a launcher gets to end its step and save; launchers kill after as many
RESUME = "--resume goes on from the newest checkpoint"
LOST = f"another rank of this run ended without a word (killed, or out of memory?); {RESUME}"
LEFT = 5.0  # seconds that a rank gets to end by itself when another has failed


def say(line: str) -> None:
    """One line on stderr, whatever became of it."""
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {line}", file=sys.stderr, flush=True)


# --- signals and the launcher ------------------------------------------------------------------------------------


class Stop:
    """SIGINT and SIGTERM end the process at once; while `deferred`, after the step in hand. So does a lost launcher.

    A second signal, after GRACE, ends the process at once in any case.
    """

    GRACE = 2.0  # seconds; a launcher passes Ctrl-C on to ranks that the terminal has already signalled
    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self.signal = 0
        self._when = 0.0
        self._deferred = False
        self._gone = 0.0  # when the launcher was found to be gone
        self._lock = threading.Lock()
        self._quiet = environ.get("RANK", "0") != "0"
        self._above = launchers(environ)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # told at once, wherever the main thread is
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_DFL)
        threading.Thread(target=self._look, args=(reader,), daemon=True).start()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Until the end of the block a signal is only asked for, with `asked`."""
        self._deferred = True
        for number in self.NUMBERS:
            signal.signal(number, lambda *_: None)
        try:
            yield
        finally:
            for number in self.NUMBERS:
                signal.signal(number, signal.SIG_DFL)
            self._deferred = False

    def asked(self) -> bool:
        """Whether a signal came, or the launcher is gone."""
        return bool(self.signal)

    def look_up(self) -> bool:
        """Whether the launcher is found to be gone, for the first time: the run is then asked to end, and told why."""
        with self._lock:
            lost = None if self._gone else next((pid for pid, there in self._above if not there()), None)
            if lost is None:
                return False
            self._gone = time.monotonic()
            if self.signal:  # one that went to all of them
                return False
            self.signal = signal.SIGTERM
            if not self._quiet:
                say(f"the launcher (process {lost}) is gone; this run ends with the step in hand")
            return True

    def _look(self, reader: int) -> None:
        while True:
            if select.select([reader], [], [], TICK)[0]:
                for number in os.read(reader, 64):
                    self._catch(number)
            if self.look_up() and not self._deferred:
                os._exit(128 + signal.SIGTERM)
            if self._gone and time.monotonic() - self._gone > LAST:
                os._exit(128 + signal.SIGTERM)

    def _catch(self, number: int) -> None:
        if number not in self.NUMBERS:
            return
        if self.signal and time.monotonic() - self._when > self.GRACE:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._when = number, time.monotonic()


def launchers(environ: Mapping[str, str]) -> list[tuple[int, Callable[[], bool]]]:
    """(process id, whether it still is above this process) of the launchers that started this rank; none: [].

    torchrun starts the ranks itself; `deepspeed` starts a second launcher, which then outlives it.
    """
    direct, script = os.getppid(), Path(sys.argv[0]).name
    if "TORCHELASTIC_RUN_ID" in environ:
        # One killed before this rank began has left its place to a process that is not Python.
        alive = any(word in _words(direct) for word in ("torch", "python", script))
        return [(direct, lambda: alive and os.getppid() == direct)]
    if "CROSS_SIZE" not in environ:
        return []
    import psutil

    try:
        first = psutil.Process(direct).ppid()
    except psutil.Error:
        first = 0
    # A `deepspeed` killed before this rank began has left its place to a process that knows nothing of the script.
    begun = any(word in _words(first) for word in ("deepspeed", script))

    def there() -> bool:
        try:
            return begun and psutil.Process(direct).ppid() == first
        except psutil.Error:
            return False

    return [(direct, lambda: os.getppid() == direct), (first, there)]


def _words(pid: int) -> str:
    """The command line of a process; "" where it is not to be seen."""
    import psutil

    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


# --- the other ranks ---------------------------------------------------------------------------------------------


class Board:
    """What the ranks tell one another beside the collectives: where each stands, and that one has failed.

    `store`: a torch TCPStore on rank 0, None where there is one rank. Threads write and read it every TICK, and end
    this process where its main thread cannot: when another rank has failed and, within `watched`, when all stand still.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._beats = self._ticks = 0
        self._closed = threading.Event()
        self._failed_at: int | None = None  # the tick at which another rank's failure was learnt of
        self._spoken = self._asked = False  # whether that rank says why; whether this one failed itself
        self._patience = 0.0  # seconds; 0: nobody is watched
        self._rows: list[tuple[int, int, bool, str]] = []
        self._moved = self._answered = 0  # ticks
        self._heard = [0] * size  # the tick at which each rank last told anything
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._tell()
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._count)]
            for thread in self._threads:
                thread.start()

    def beat(self) -> None:
        """The main thread moves."""
        self._beats += 1

    @contextlib.contextmanager
    def watched(self, patience: float) -> Iterator[None]:
        """Until the end of the block, end the run where no rank moves for `patience` seconds; one line names who hangs.

        Ticks of this process are counted, so a run that was suspended (Ctrl-Z, a sleeping laptop) is not ended.
        """
        self._moved, self._patience = self._ticks, patience
        try:
            yield
        finally:
            self._patience = 0.0

    def last_word(self) -> bool:
        """Whether this rank, which has failed, is the one to say why: the first of all to ask."""
        if self._store is None:
            return True
        if self._spoken:
            return False
        self._asked = True
        number = within(2.0, lambda: self._store.add("failed", 1))
        # Rank 0 is gone without a word, and nobody can be asked: one rank speaks for all that were left.
        return number == 1 if number is not None else self.rank <= 1

    def close(self, *, failed: bool = False) -> None:
        """This rank leaves. Where the run has failed, rank 0 waits until all the others know, 3 s at most."""
        if failed:
            self._until_known()
        self._closed.set()
        for thread in self._threads:  # one that is in the store when Python ends aborts the process
            thread.join(2.0)

    def _until_known(self) -> None:
        if self.rank == 0 and self._store is not None:
            end = time.monotonic() + 3.0
            while time.monotonic() < end and within(1.0, lambda: self._store.add("failed", 0)) != self.size:
                time.sleep(0.05)

    def _tell(self) -> None:
        place, waits = _standing()
        self._store.set(f"rank/{self.rank}", f"{self._ticks} {self._beats} {int(waits)} {place}")

    def _read(self) -> list[tuple[int, int, bool, str]]:
        """Of every rank (its ticks, beats, whether it waits in a collective, place)."""
        words = [row.decode().split(" ", 3) for row in self._store.multi_get([f"rank/{r}" for r in range(self.size)])]
        return [(int(ticks), int(beats), waits == "1", place) for ticks, beats, waits, place in words]

    def _exchange(self) -> None:
        try:
            self._rows = self._read()  # waits for the last rank to begin
            while not self._closed.wait(TICK):
                self._tell()
                rows, before = self._read(), self._rows
                self._answered = self._ticks
                for rank, (row, old) in enumerate(zip(rows, before, strict=True)):
                    if row[0] != old[0]:
                        self._heard[rank] = self._ticks
                    if row[1] != old[1]:
                        self._moved = self._ticks
                self._rows = rows
                if not self._asked and not self._spoken and self._store.add("failed", 0):
                    self._failed_at, self._spoken = self._ticks, True
                    self._store.add("failed", 1)  # this rank knows
        except Exception:  # rank 0 is gone, and the board with it
            self._failed_at = self._ticks

    def _count(self) -> None:
        while not self._closed.wait(TICK):
            self._ticks += 1
            if self._failed_at is not None:
                if (self._ticks - self._failed_at) * TICK <= LEFT:
                    continue
                if not self._spoken and not self._asked and self.rank == 1:
                    say(LOST)
                os._exit(1)  # the main thread waits for those who have left
            if self._patience and self._rows and (self._ticks - self._moved) * TICK > self._patience:
                self._give_up()

    def _give_up(self) -> None:
        everybody = range(self.size)
        late = self._ticks - self._patience / TICK / 2
        frozen = self._answered < late  # the board, and with it rank 0, which keeps it
        silent = [0] if frozen else [rank for rank in everybody if self._heard[rank] < late]
        least = min(row[1] for row in self._rows)
        behind = [rank for rank in everybody if self._rows[rank][1] == least]
        outside = [rank for rank in everybody if not self._rows[rank][2]]
        # Who waits has done more than who is waited for; where all have done as much, who is not in a collective.
        stuck = silent or (behind if len(behind) < self.size else outside) or list(everybody)
        rest = [rank for rank in everybody if rank not in stuck]
        if self.rank == min(rest or stuck):
            self._asked = True
            within(2.0, lambda: self._store.add("failed", 1))
            line = ", ".join(f"rank {rank} {self._standing(rank, rank in silent)}" for rank in stuck)
            if rest and not frozen:
                line += f"; rank{'s' * (len(rest) > 1)} {', '.join(map(str, rest))} waiting at {self._rows[rest[0]][3]}"
            say(f"no rank has moved for {self._patience:g} s (--hang-timeout): {line}; {RESUME}")
            self._until_known()
        else:
            time.sleep(3 * TICK)  # the one who speaks goes first: a launcher ends all after one
        os._exit(1)

    def _standing(self, rank: int, silent: bool) -> str:
        return "does not answer" if silent else f"hangs at {self._rows[rank][3]}"


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` returns; None where it raises or takes longer (a store on a frozen rank answers never)."""
    answer: list[Any] = []

    def work() -> None:
        with contextlib.suppress(Exception):
            answer.append(call())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def _standing() -> tuple[str, bool]:
    """(file, line and function of ours that the main thread is in, whether it waits in a collective)."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    here, waits = Path(__file__).parent, False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        waits = waits or str(frame.f_globals.get("__name__")).startswith("torch.distributed")
        if here in path.parents:
            return f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "an unknown place", waits
