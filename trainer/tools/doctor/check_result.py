"""What the doctor finds: one line each, with the remedy."""

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, ERROR = LEVELS = ("ok", "warning", "error")


@dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at: how it stands, what was found, and what to do about it (empty where nothing)."""

    level: str
    name: str
    message: str
    remedy: str = ""


def ok_result(name: str, message: str) -> CheckResult:
    """Nothing to do."""
    return CheckResult(OK, name, message)


def make_result(is_bad: bool, level: str, name: str, message: str, remedy: str) -> CheckResult:
    """`level` with its remedy where it is bad, else ok without."""
    return CheckResult(level, name, message, remedy) if is_bad else ok_result(name, message)


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: 812 MiB, 3.4 GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def join_names(names: Iterable[str], max_shown: int = 6) -> str:
    """Names with commas, the first few of many."""
    shown = list(names)
    more = f" and {len(shown) - max_shown} more" if len(shown) > max_shown else ""
    return ", ".join(shown[:max_shown]) + more
