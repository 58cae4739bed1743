"""One record -> prompt and completion: templates, ACLED exports, a `text` column, or token ids as they are."""

import datetime
import decimal
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import acled

Record = Mapping[str, Any]
MAX_ID = 2**31 - 1


class BadRecord(Exception):
    """What is wrong with a record: its column and the remedy; who reads the file adds file and row."""


@dataclass(frozen=True)
class Form:
    """How the records of a source become text.

    name: "template", "acled", "text" or "input_ids". columns: the ones that are read, None for all.
    render: record -> (prompt, completion), raises BadRecord; a text without a prompt is all completion.
    keyed: whether the prompt tells records apart, so that the validation split goes by it.
    """

    name: str
    columns: tuple[str, ...] | None
    render: Callable[[Record], tuple[str, str]]
    keyed: bool


def choose_form(columns: Sequence[str], settings: DataSettings, where: str) -> Form:
    """The form of a table with these columns; UserError, naming `where`, when there is none or it does not fit."""
    if settings.completion is not None:
        return _template_form(columns, settings.prompt or "", settings.completion, where)
    alone = settings.objective == "blocks"
    if "input_ids" in columns and alone:
        return Form("input_ids", ("input_ids",), _no_text, keyed=False)
    if acled.is_acled(columns):
        return Form("acled", None, _acled, keyed=True)
    if "text" in columns and alone:
        return Form("text", ("text",), _text, keyed=False)
    listed = ", ".join(columns)
    if not alone:
        raise UserError(
            f"{where}: --objective completion needs a text to be learnt: pass --prompt and --completion with "
            f"columns in braces (columns: {listed}), or --objective blocks"
        )
    raise UserError(
        f"{where}: no column `text` or `input_ids` and not an ACLED export: pass --prompt and --completion with "
        f"columns in braces (columns: {listed})"
    )


def parse_template(template: str, flag: str) -> list[tuple[bool, str]]:
    """The parts of a template as (is a column, text); `{{` and `}}` are literal braces; UserError for a stray one."""
    parts: list[tuple[bool, str]] = []
    for found in re.finditer(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+", template):
        piece = found[0]
        if found[1] is not None:
            parts.append((True, found[1]))
        elif piece in "{}":
            raise UserError(
                f"{flag} {template!r}: a brace stands alone at character {found.start() + 1}; "
                "write {column}, or double a brace that is meant literally"
            )
        else:
            parts.append((False, piece[0] if piece in ("{{", "}}") else piece))
    return parts


def _template_form(columns: Sequence[str], prompt: str, completion: str, where: str) -> Form:
    before, after = parse_template(prompt, "--prompt"), parse_template(completion, "--completion")
    for flag, parts in (("--prompt", before), ("--completion", after)):
        for name in (text for is_column, text in parts if is_column):
            if name not in columns:
                raise UserError(f"{flag}: {where} has no column {name!r}; its columns are {', '.join(columns)}")
    if not any(is_column for is_column, _ in after):
        raise UserError(f"--completion {completion!r}: names no column; write one in braces, of {', '.join(columns)}")

    def render(record: Record) -> tuple[str, str]:
        target = "".join(value_text(record, text, "--completion") if is_column else text for is_column, text in after)
        if not target.strip():
            raise BadRecord("the text of --completion is empty: fill its columns or drop the row")
        source = (value_text(record, text, "--prompt") if is_column else text for is_column, text in before)
        return "".join(source), target

    needed = dict.fromkeys(text for is_column, text in before + after if is_column)
    return Form("template", tuple(needed), render, keyed=any(is_column for is_column, _ in before))


def value_text(record: Record, column: str, flag: str) -> str:
    """The value of a column as text; BadRecord where it is missing, null, or neither text, number nor date."""
    value = record.get(column)
    if missing(value):
        raise BadRecord(
            f"column {column!r} is {'null or empty' if column in record else 'missing'}: fill it, drop the row, "
            f"or leave {{{column}}} out of {flag}"
        )
    return plain_text(value, column)


def missing(value: Any) -> bool:
    """Whether a value is null; JSON and pandas also spell it NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain_text(value: Any, column: str) -> str:
    """A value as people would write it in a CSV file; BadRecord where it is no single text, number or date."""
    if isinstance(value, str):
        return _characters(value, column)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return value.date().isoformat()  # a day that a program stored as its midnight
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)):
        return str(value)
    raise BadRecord(f"column {column!r} holds a {type(value).__name__}, expected text, a number or a date")


def _text(record: Record) -> tuple[str, str]:
    value = record.get("text")
    if missing(value):
        raise BadRecord("column 'text' is null or empty: fill it or drop the row")
    if not isinstance(value, str):
        raise BadRecord(f"column 'text' holds a {type(value).__name__}, expected text")
    return "", _characters(value, "text")


def _characters(value: str, column: str) -> str:
    """The text itself; BadRecord for half a surrogate pair, which JSON can spell but no file or tokenizer can hold."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as problem:
            raise BadRecord(
                f"column {column!r} holds half a character ({value[problem.start]!r}); write it as a whole one"
            ) from None
    return value


def _acled(record: Record) -> tuple[str, str]:
    names = acled.column_names(tuple(record))
    event = {name: plain_text(record[column], column) for name, column in names.items() if not missing(record[column])}
    notes = event.pop(acled.NOTES, "")
    if not notes.strip():
        raise BadRecord(f"column {names.get(acled.NOTES, acled.NOTES)!r} is null or empty: fill it or drop the row")
    return acled.prompt_of(event), acled.completion_of(notes)


def _no_text(record: Record) -> tuple[str, str]:
    raise AssertionError("token ids are not rendered")


def token_ids(record: Record) -> list[int]:
    """The `input_ids` of a record; BadRecord where they are not a list of whole numbers from 0."""
    ids = record.get("input_ids")
    if missing(ids):
        raise BadRecord("column 'input_ids' is null: fill it or drop the row")
    if not isinstance(ids, list):
        raise BadRecord(f"column 'input_ids' holds a {type(ids).__name__}, expected a list of whole numbers")
    if not ids:
        raise BadRecord("column 'input_ids' is empty: drop the row")
    for place, value in enumerate(ids):
        if type(value) is not int or not 0 <= value <= MAX_ID:
            raise BadRecord(f"column 'input_ids' holds {value!r} at place {place}, expected a whole number from 0")
    return ids
