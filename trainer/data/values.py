"""The values of one record, checked: what is missing, what is a text, and what a number or a date is as text."""

import datetime
import decimal
import math
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
MAX_COLUMNS_NAMED = 40


class RecordError(Exception):
    """What is wrong with a record: its column and the remedy; who reads the file adds file and row."""


def list_columns(columns: Sequence[str]) -> str:
    """Column names for a message, on one line whatever they hold."""
    names = [name if name.isprintable() else repr(name) for name in columns[:MAX_COLUMNS_NAMED]]
    separator = next((mark for mark in ";|\t" if len(columns) == 1 and mark in columns[0]), None)
    hint = f" (separated by {separator!r}? save the file with commas, or as .tsv with tabs)" if separator else ""
    return ", ".join(names) + (f" and {len(columns) - len(names)} more" if len(columns) > len(names) else "") + hint


def is_missing(value: Any) -> bool:
    """Whether a value is null or empty, which a CSV file cannot tell apart; JSON and pandas also spell null NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def require(record: Record, column: str, remedy: str = "fill it or drop the row") -> Any:
    """The value of a column; RecordError where it is missing or empty."""
    value = record.get(column)
    if is_missing(value):
        raise RecordError(f"column {column!r} is {'null or empty' if column in record else 'missing'}: {remedy}")
    return value


def require_text(record: Record, column: str) -> str:
    """The text of a column; RecordError where it is missing, empty or of another type."""
    value = require(record, column)
    if not isinstance(value, str):
        raise RecordError(f"column {column!r} holds a {type(value).__name__}, expected text")
    return require_valid_unicode(value, column)


def to_text(value: Any, column: str) -> str:
    """A value as people would write it in a CSV file; RecordError where it is no single text, number or date."""
    if isinstance(value, str):
        return require_valid_unicode(value, column)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return value.date().isoformat()  # a day that a program stored as its midnight
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)):
        return str(value)
    raise RecordError(f"column {column!r} holds a {type(value).__name__}, expected text, a number or a date")


def value_text(record: Record, column: str, flag: str) -> str:
    """The value of a column that `flag` names, as text; RecordError where it is missing, empty or no text."""
    return to_text(require(record, column, f"fill it, drop the row, or leave {{{column}}} out of {flag}"), column)


def require_valid_unicode(value: str, column: str) -> str:
    """The text itself; RecordError for half a surrogate pair, which JSON can spell but no tokenizer can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise RecordError(f"column {column!r} holds half a character ({half!r}); write it as a whole one") from None
    return value
