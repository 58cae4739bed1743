"""Words and numbers in messages, plans and tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def join_words(words: Sequence[str], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`; `last` is the word before the last one."""
    return f" {last} ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def flatten(values: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as (a/b/c, value) pairs, with `separator` between the keys."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, separator, f"{prefix}{name}{separator}")
        else:
            yield prefix + name, value


def format_clock(seconds: float) -> str:
    """0:07, 12:30 or 5:42:10."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"
