"""ACLED exports, old and new: which columns they have, and one event as a prompt and its notes.

Column names and inter codes as in ACLED's codebook; exports differ in case, in columns and in how dates are spelt.
"""

import datetime
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trainer.data.templates import is_missing, to_text

#: The fields of a prompt in their order, and the label each one gets.
FIELDS = {
    "event_date": "Date",
    "event_type": "Type",
    "sub_event_type": "Sub-type",
    "actor1": "Actor 1",
    "inter1": "Inter 1",
    "actor2": "Actor 2",
    "inter2": "Inter 2",
    "country": "Country",
    "admin1": "Admin 1",
    "location": "Location",
    "fatalities": "Fatalities",
    "source": "Source",
}
NOTES = "notes"

MONTHS = "January February March April May June July August September October November December".split()  # noqa: SIM905

#: Old exports hold the code, newer ones a text in one of several spellings.
INTER_NAMES = {
    1: "State Forces",
    2: "Rebel Groups",
    3: "Political Militias",
    4: "Identity Militias",
    5: "Rioters",
    6: "Protesters",
    7: "Civilians",
    8: "External/Other Forces",
}
_INTER_BY_TEXT = {name.casefold().rstrip("s"): name for name in INTER_NAMES.values()}

_MONTH_NUMBERS = {name[:length].casefold(): n for n, name in enumerate(MONTHS, 1) for length in (3, len(name))}


@functools.lru_cache(maxsize=4096)
def column_names(columns: tuple[str, ...]) -> Mapping[str, str]:
    """{ACLED's name: the name in this export} of the columns we use; of two spellings of one name the first."""
    columns_by_name: dict[str, str] = {}
    for column in columns:
        name = re.sub(r"[\s_]+", "_", column.strip().lower())
        if name in FIELDS or name == NOTES:
            columns_by_name.setdefault(name, column)
    return columns_by_name


def is_acled(columns: Iterable[str]) -> bool:
    """Whether a table looks like an export: it has notes, and at least two of the columns that only events have."""
    columns_by_name = column_names(tuple(columns))
    event_columns = ("event_date", "event_type", "sub_event_type", "actor1", "inter1", "fatalities")
    return NOTES in columns_by_name and sum(name in columns_by_name for name in event_columns) >= 2


@functools.lru_cache(maxsize=8192)
def format_date(text: str) -> str | None:
    """`5 January 2022` for `2022-01-05`, `05-January-2022` or `5 January 2022`; None where it is no such date.

    This spelling, because most notes begin with it: a model can copy it.
    """
    if match := re.fullmatch(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ].*)?", text):
        year, month, day = (int(part) for part in match.groups())
    elif match := re.fullmatch(r"(\d{1,2})[-\s]+([A-Za-z]+)\.?[-\s,]+(\d{4})", text):
        year, month, day = int(match[3]), _MONTH_NUMBERS.get(match[2].casefold(), 0), int(match[1])
    else:
        return None
    try:
        date = datetime.date(year, month, day)
    except ValueError:
        return None
    return f"{date.day} {MONTHS[date.month - 1]} {date.year}"


def find_unknown_date(record: Mapping[str, Any]) -> str | None:
    """The date of a record where it is in no known spelling."""
    value = record.get(column_names(tuple(record)).get("event_date", ""))
    is_known = is_missing(value) or format_date(to_text(value, "event_date").strip()) is not None
    return None if is_known else str(value)


def _strip_decimal(text: str) -> str:
    """`3` for `3.0`: a column with gaps comes out of many programs as floats."""
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text


def inter_name(text: str) -> str:
    """The name of an inter code or of its newer spellings; empty for 0, which means that there is no actor."""
    code = _strip_decimal(text)
    if code.isdigit():
        return "" if int(code) == 0 else INTER_NAMES.get(int(code), code)
    return _INTER_BY_TEXT.get(text.casefold().rstrip("s"), text)


def format_field(name: str, text: str) -> str:
    """The text of a field as the prompt shows it; a date that is not understood stands as it was written."""
    text = " ".join(text.split())
    if name == "event_date":
        return format_date(text) or text
    if name in ("inter1", "inter2"):
        return inter_name(text)
    return _strip_decimal(text) if name == "fatalities" else text


def format_prompt(event: Mapping[str, Any]) -> str:
    """The structured fields under ACLED's names (values are text) as labelled lines; empty fields are left out."""
    lines = [(label, format_field(name, event[name])) for name, label in FIELDS.items() if event.get(name)]
    return "".join(f"{label}: {text}\n" for label, text in lines if text) + "Notes:"


def format_completion(notes: str) -> str:
    """The notes as what follows the prompt: with the blank that begins a word for GPT-2's tokenizer."""
    return " " + notes.strip()
