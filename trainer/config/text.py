"""Words, numbers and tables in messages, plans and Markdown."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any


def join_words(words: Sequence[str], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`; `last` is the word before the last one."""
    return f" {last} ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def list_some(names: Iterable[str], max_shown: int) -> str:
    """Names with commas, the first few of many: `a, b and 7 more`."""
    shown = list(names)
    more = f" and {len(shown) - max_shown} more" if len(shown) > max_shown else ""
    return ", ".join(shown[:max_shown]) + more


def flatten(
    values: Mapping[str, Any], separator: str, prefix: str = "", ignored: Container[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Nested values as (path, value), `separator` between the keys, without the paths in `ignored`."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if path in ignored:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, separator, path + separator, ignored)
        else:
            yield path, value


def format_clock(seconds: float) -> str:
    """0:07, 12:30 or 5:42:10."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def capitalize(text: str) -> str:
    """The text with its first letter large and the others as they are."""
    return text[:1].upper() + text[1:]


def shorten(text: str, max_chars: int) -> str:
    """The text on one line, cut where it is longer than `max_chars`."""
    line = " ".join(text.split())
    return line if len(line) <= max_chars else line[: max_chars - 1] + "…"


def format_percent(share: float) -> str:
    """A share with two significant digits: 0.95%, 12%, 100%."""
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def format_bytes(value: float | None) -> str:
    """Bytes, in MB or GB of ten; "-" where unknown."""
    if value is None:
        return "-"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def format_duration(seconds: float | None) -> str:
    """Seconds, in the units a person would use; "-" where unknown."""
    if seconds is None:
        return "-"
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{minutes:.1f} min" if minutes < 60 else f"{int(minutes // 60)} h {minutes % 60:02.0f} min"


def is_number(text: str) -> bool:
    """Whether a cell reads as a number, or has no value."""
    return re.match(r"^[-+]?[\d,.]+|^-?$", text) is not None


def escape_markdown(text: str) -> str:
    """Text that Markdown and GitHub's HTML leave as it is, on one line."""
    return re.sub(r"([\\`*_|<>\[\]#~$@&])", r"\\\1", " ".join(text.split()))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A pipe table of texts, each escaped; columns of numbers to the right."""
    from tabulate import tabulate

    alignment = ["right" if all(is_number(row[i]) for row in rows) else "left" for i in range(len(headings))]
    return tabulate(
        [[escape_markdown(cell) for cell in row] for row in rows],
        headers=[escape_markdown(heading) for heading in headings],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=alignment if rows else None,
    )
