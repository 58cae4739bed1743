"""What to answer to a flag that does not exist here: ours for the spelling of another trainer, or for a typo."""

import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

_NEGATIVE = ("false", "no", "0", "off", "none")


@functools.cache
def read_suggestions() -> tuple[dict[str, str], dict[str, str]]:
    """({spelling elsewhere: our answer}, {value elsewhere: ours}), from the table beside this file."""
    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    values = table.pop("values")
    return {spelling: answer for answer, spellings in table.items() for spelling in spellings.split()}, values


def suggest_flag(flag: str, value: str | None, takes_value: Mapping[str, bool]) -> str:
    """One line that answers an unknown flag, the value carried over.

    `takes_value`: the flags that exist, and whether each is followed by a value; only those are suggested.
    """
    suggestions, values = read_suggestions()
    shown = " ".join(part if part.isprintable() else repr(part) for part in (flag, value) if part)
    name = flag.lstrip("-").lower().replace("-", "_")
    answer = f"--{name.replace('_', '-')}"
    if answer not in takes_value:
        answer = (
            suggestions.get(name)
            or _closest(answer, takes_value, cutoff=0.75)
            or suggestions.get(_closest(name, suggestions, cutoff=0.85), "")
        )
    if answer and not answer.startswith("--"):
        return f"{shown}: {answer}"
    suggested, _, fixed_value = answer.partition(" ")
    if suggested not in takes_value:
        return f"{shown}: unknown flag (--help lists the flags)"
    if fixed_value or not takes_value[suggested]:
        if (value or "").lower() in _NEGATIVE:
            return f"{shown}: leave it out; {answer} would turn it on"
        return f"{shown}: did you mean {answer}?"
    new_value = values.get(value, value) if value else value
    return f"{shown}: did you mean {suggested}{f' {new_value}' if new_value else ''}?"


def _closest(text: str, known: Iterable[str], cutoff: float) -> str:
    """What a typo most likely meant; empty where none is near."""
    return next(iter(difflib.get_close_matches(text, list(known), n=1, cutoff=cutoff)), "")
