"""What the doctor finds: one line each, with the remedy."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from trainer.config.errors import UserError

OK, WARNING, ERROR = "ok", "warning", "error"
LEVELS = (OK, WARNING, ERROR)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at: how it stands, what was found, and what to do about it (empty where nothing)."""

    level: str
    what: str
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS, self.level


def fine(what: str, found: str) -> Check:
    """Nothing to do."""
    return Check(level=OK, what=what, found=found)


def judged(bad: bool, level: str, what: str, found: str, remedy: str) -> Check:
    """`level` with its remedy where it is bad, else ok without."""
    return Check(level=level, what=what, found=found, remedy=remedy) if bad else fine(what, found)


def guarded(what: str, make: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """The checks of `make`; a mistake of the user's that stops it becomes an error among them."""
    try:
        yield from make()
    except UserError as problem:
        said, _, remedy = str(problem).partition("; ")
        yield Check(level=ERROR, what=what, found=said, remedy=remedy)


def size(count: float) -> str:
    """Bytes for people: 812 MiB, 3.4 GiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names with commas, the first few of many."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")
