"""How numbers and lists read in sentences and tables."""

from collections.abc import Sequence

from trainer.report.paired_interval import PairedInterval


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


def format_interval(interval: PairedInterval) -> str:
    """The estimate and its interval: +0.0290 [+0.0070, +0.0510]."""
    return f"{interval.estimate:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"


def join_words(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def capitalize(text: str) -> str:
    """The text with its first letter large and the others as they are."""
    return text[:1].upper() + text[1:]
