"""ACLED exports, old and new: which columns they have, and one event as a prompt and its notes.

Column names and inter codes as in ACLED's codebook; exports differ in case, in columns and in how dates are spelt.
"""

import contextlib
import functools
import re
from collections.abc import Iterable, Mapping
from datetime import datetime

from trainer.data.values import Record, RecordError, is_missing, to_text

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
#: Old exports hold the code, newer ones a text in one of several spellings.
INTER_NAMES = {
    "0": "",  # no actor
    "1": "State Forces",
    "2": "Rebel Groups",
    "3": "Political Militias",
    "4": "Identity Militias",
    "5": "Rioters",
    "6": "Protesters",
    "7": "Civilians",
    "8": "External/Other Forces",
}
_INTER_BY_TEXT = INTER_NAMES | {name.casefold().rstrip("s"): name for name in INTER_NAMES.values()}


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
    """`5 January 2022` for `2022-01-05`, `05-January-2022` or `5 Jan 2022`; None where it is no such date.

    This spelling, because most notes begin with it: a model can copy it.
    """
    words = re.sub(r"[\s.,-]+", " ", re.sub(r"^(\d{4}-\d{1,2}-\d{1,2})[T ].*", r"\1", text))
    for spelling in ("%Y %m %d", "%d %B %Y", "%d %b %Y"):
        with contextlib.suppress(ValueError):
            date = datetime.strptime(words, spelling)
            return f"{date.day} {date:%B} {date.year}"
    return None


def format_field(name: str, text: str) -> str:
    """The text of a field as the prompt shows it; a date that is not understood stands as it was written."""
    text = " ".join(text.split())
    if name == "event_date":
        return format_date(text) or text
    if name in ("inter1", "inter2", "fatalities"):  # a column with gaps comes out of many programs as floats
        text = re.sub(r"^(\d+)\.0$", r"\1", text)
    return _INTER_BY_TEXT.get(text.casefold().rstrip("s"), text) if name.startswith("inter") else text


def format_prompt(event: Mapping[str, str]) -> str:
    """The structured fields under ACLED's names as labelled lines; empty fields are left out."""
    lines = [(label, format_field(name, event[name])) for name, label in FIELDS.items() if event.get(name)]
    return "".join(f"{label}: {text}\n" for label, text in lines if text) + "Notes:"


def render(record: Record) -> tuple[str, str]:
    """An event as (prompt, notes); RecordError where there are no notes."""
    names = column_names(tuple(record))
    event = {name: to_text(record[column], column) for name, column in names.items() if not is_missing(record[column])}
    notes = event.pop(NOTES, "").strip()
    if not notes:
        raise RecordError(f"column {names.get(NOTES, NOTES)!r} is null or empty: fill it or drop the row")
    return format_prompt(event), f" {notes}"  # the blank begins a word for GPT-2's tokenizer
