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
MAX_TOKEN_ID = 2**31 - 1


class RecordError(Exception):
    """What is wrong with a record: its column and the remedy; who reads the file adds file and row."""


@dataclass(frozen=True)
class RecordFormat:
    """How the records of a source become text.

    name: "template", "acled", "text" or "input_ids". columns: the ones that are read, None for all.
    render: record -> (prompt, completion), raises RecordError; a text without a prompt is all completion.
    is_keyed_by_prompt: whether the prompt tells records apart, so that the validation split goes by it.
    """

    name: str
    columns: tuple[str, ...] | None
    render: Callable[[Record], tuple[str, str]]
    is_keyed_by_prompt: bool


def choose_format(columns: Sequence[str], settings: DataSettings, where: str) -> RecordFormat:
    """The form of a table with these columns; UserError, naming `where`, when there is none or it does not fit."""
    if settings.completion is not None:
        return _template_format(columns, settings.prompt or "", settings.completion, where)
    is_blocks_objective = settings.objective == "blocks"
    if "input_ids" in columns and is_blocks_objective:
        return RecordFormat("input_ids", ("input_ids",), _render_token_ids, is_keyed_by_prompt=False)
    if acled.is_acled(columns):
        return RecordFormat("acled", None, _render_acled, is_keyed_by_prompt=True)
    if "text" in columns and is_blocks_objective:
        return RecordFormat("text", ("text",), _render_text, is_keyed_by_prompt=False)
    column_list = ", ".join(columns)
    if not is_blocks_objective:
        raise UserError(
            f"{where}: --objective completion needs a text to be learnt: pass --prompt and --completion with "
            f"columns in braces (columns: {column_list}), or --objective blocks"
        )
    raise UserError(
        f"{where}: no column `text` or `input_ids` and not an ACLED export: pass --prompt and --completion with "
        f"columns in braces (columns: {column_list})"
    )


def parse_template(template: str, flag: str) -> list[tuple[bool, str]]:
    """The parts of a template as (is a column, text); `{{` and `}}` are literal braces; UserError for a stray one."""
    parts: list[tuple[bool, str]] = []
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+", template):
        piece = match[0]
        if match[1] is not None:
            parts.append((True, match[1]))
        elif piece in "{}":
            raise UserError(
                f"{flag} {template!r}: a brace stands alone at character {match.start() + 1}; "
                "write {column}, or double a brace that is meant literally"
            )
        else:
            parts.append((False, piece[0] if piece in ("{{", "}}") else piece))
    return parts


def _template_format(columns: Sequence[str], prompt: str, completion: str, where: str) -> RecordFormat:
    prompt_parts, completion_parts = parse_template(prompt, "--prompt"), parse_template(completion, "--completion")
    for flag, parts in (("--prompt", prompt_parts), ("--completion", completion_parts)):
        for name in (text for is_column, text in parts if is_column):
            if name not in columns:
                raise UserError(f"{flag}: {where} has no column {name!r}; its columns are {', '.join(columns)}")
    if not any(is_column for is_column, _ in completion_parts):
        raise UserError(f"--completion {completion!r}: names no column; write one in braces, of {', '.join(columns)}")

    def render(record: Record) -> tuple[str, str]:
        completion_text = "".join(
            value_text(record, text, "--completion") if is_column else text for is_column, text in completion_parts
        )
        if not completion_text.strip():
            raise RecordError("the text of --completion is empty: fill its columns or drop the row")
        prompt_texts = (value_text(record, text, "--prompt") if is_column else text for is_column, text in prompt_parts)
        return "".join(prompt_texts), completion_text

    used_columns = dict.fromkeys(text for is_column, text in prompt_parts + completion_parts if is_column)
    return RecordFormat(
        "template", tuple(used_columns), render, is_keyed_by_prompt=any(is_column for is_column, _ in prompt_parts)
    )


def value_text(record: Record, column: str, flag: str) -> str:
    """The value of a column as text; RecordError where it is missing, null, or neither text, number nor date."""
    value = record.get(column)
    if is_missing(value):
        raise RecordError(
            f"column {column!r} is {'null or empty' if column in record else 'missing'}: fill it, drop the row, "
            f"or leave {{{column}}} out of {flag}"
        )
    return to_text(value, column)


def is_missing(value: Any) -> bool:
    """Whether a value is null; JSON and pandas also spell it NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def to_text(value: Any, column: str) -> str:
    """A value as people would write it in a CSV file; RecordError where it is no single text, number or date."""
    if isinstance(value, str):
        return _require_valid_unicode(value, column)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return value.date().isoformat()  # a day that a program stored as its midnight
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)):
        return str(value)
    raise RecordError(f"column {column!r} holds a {type(value).__name__}, expected text, a number or a date")


def _render_text(record: Record) -> tuple[str, str]:
    value = record.get("text")
    if is_missing(value):
        raise RecordError("column 'text' is null or empty: fill it or drop the row")
    if not isinstance(value, str):
        raise RecordError(f"column 'text' holds a {type(value).__name__}, expected text")
    return "", _require_valid_unicode(value, "text")


def _require_valid_unicode(value: str, column: str) -> str:
    """The text itself; RecordError for half a surrogate pair, which JSON can spell but no tokenizer can hold."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"column {column!r} holds half a character ({value[error.start]!r}); write it as a whole one"
            ) from None
    return value


def _render_acled(record: Record) -> tuple[str, str]:
    names = acled.column_names(tuple(record))
    event = {name: to_text(record[column], column) for name, column in names.items() if not is_missing(record[column])}
    notes = event.pop(acled.NOTES, "")
    if not notes.strip():
        raise RecordError(f"column {names.get(acled.NOTES, acled.NOTES)!r} is null or empty: fill it or drop the row")
    return acled.format_prompt(event), acled.format_completion(notes)


def _render_token_ids(record: Record) -> tuple[str, str]:
    raise AssertionError("token ids are not rendered")


def parse_token_ids(record: Record) -> list[int]:
    """The `input_ids` of a record; RecordError where they are not a list of whole numbers from 0."""
    ids = record.get("input_ids")
    if is_missing(ids):
        raise RecordError("column 'input_ids' is null: fill it or drop the row")
    if not isinstance(ids, list):
        raise RecordError(f"column 'input_ids' holds a {type(ids).__name__}, expected a list of whole numbers")
    if not ids:
        raise RecordError("column 'input_ids' is empty: drop the row")
    for position, value in enumerate(ids):
        if type(value) is not int or not 0 <= value <= MAX_TOKEN_ID:
            raise RecordError(f"column 'input_ids' holds {value!r} at place {position}, expected a whole number from 0")
    return ids
