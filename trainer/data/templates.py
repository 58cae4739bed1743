"""`--prompt` and `--completion`: templates with columns in braces, filled from a record."""

import datetime
import decimal
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.config.errors import UserError

Record = Mapping[str, Any]
Pair = tuple[str, str]  # prompt and completion
Piece = tuple[bool, str]  # (whether it is a column of the record, its name or the text that stands as it is)
MAX_COLUMNS_NAMED = 40


class RecordError(Exception):
    """What is wrong with a record: its column and the remedy; who reads the file adds file and row."""


def list_columns(columns: Sequence[str]) -> str:
    """Column names for a message, on one line whatever they hold."""
    names = [name if name.isprintable() else repr(name) for name in columns[:MAX_COLUMNS_NAMED]]
    return ", ".join(names) + (f" and {len(columns) - len(names)} more" if len(columns) > len(names) else "")


def parse_template(template: str, flag: str) -> list[Piece]:
    """The parts of a template; `{{` and `}}` are literal braces; UserError for a stray one."""
    pieces = []
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+", template):
        text = match[0]
        if text in ("{", "}"):
            raise UserError(
                f"{flag} {template!r}: a brace stands alone at character {match.start() + 1}; "
                "write {column}, or double a brace that is meant literally"
            )
        pieces.append((True, match[1]) if match[1] else (False, text[0] if text in ("{{", "}}") else text))
    return pieces


def compile_templates(
    columns: Sequence[str], prompt: str, completion: str, where: str
) -> tuple[tuple[str, ...], Callable[[Record], Pair]]:
    """(the columns that are read, record -> prompt and completion); UserError for a column that is not there.

    Every column of --completion must be filled. A line of --prompt whose columns are all empty is left out, so that an
    optional part leaves nothing behind; not all of them may be.
    """
    prompt_pieces, completion_pieces = parse_template(prompt, "--prompt"), parse_template(completion, "--completion")
    prompt_columns = [text for is_column, text in prompt_pieces if is_column]
    completion_columns = [text for is_column, text in completion_pieces if is_column]
    for flag, names in (("--prompt", prompt_columns), ("--completion", completion_columns)):
        if unknown := next((name for name in names if name not in columns), None):
            raise UserError(f"{flag}: {where} has no column {unknown!r}; its columns are {list_columns(columns)}")
    if not completion_columns:
        raise UserError(
            f"--completion {completion!r}: names no column; write one in braces, of {list_columns(columns)}"
        )
    lines: list[list[Piece]] = [[]]  # the pieces of each line of the prompt, with its line break
    for is_column, text in prompt_pieces:
        for part in [text] if is_column else text.splitlines(keepends=True):
            lines[-1].append((is_column, part))
            if not is_column and part.endswith("\n"):
                lines.append([])

    def render(record: Record) -> Pair:
        completion_text = "".join(
            value_text(record, text, "--completion") if is_column else text for is_column, text in completion_pieces
        )
        if not completion_text.strip():
            raise RecordError("the text of --completion is empty: fill its columns or drop the row")
        values = {name: "" if is_missing(record.get(name)) else to_text(record[name], name) for name in prompt_columns}
        if values and not any(values.values()):
            value_text(record, prompt_columns[0], "--prompt")  # which raises
        prompt_text = ""
        for line in lines:
            line_columns = [text for is_column, text in line if is_column]
            if not line_columns or any(values[name] for name in line_columns):
                prompt_text += "".join(values[text] if is_column else text for is_column, text in line)
        return prompt_text, completion_text

    return tuple(dict.fromkeys(prompt_columns + completion_columns)), render


def value_text(record: Record, column: str, flag: str) -> str:
    """The value of a column as text; RecordError where it is missing, empty, or neither text, number nor date."""
    return to_text(require(record, column, f"fill it, drop the row, or leave {{{column}}} out of {flag}"), column)


def require(record: Record, column: str, remedy: str = "fill it or drop the row") -> Any:
    """The value of a column; RecordError where it is missing or empty."""
    value = record.get(column)
    if is_missing(value):
        raise RecordError(f"column {column!r} is {'null or empty' if column in record else 'missing'}: {remedy}")
    return value


def is_missing(value: Any) -> bool:
    """Whether a value is null or empty, which a CSV file cannot tell apart; JSON and pandas also spell null NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def to_text(value: Any, column: str) -> str:
    """A value as people would write it in a CSV file; RecordError where it is no single text, number or date."""
    if isinstance(value, str):
        return require_valid_unicode(value, column)
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return value.date().isoformat()  # a day that a program stored as its midnight
    if isinstance(value, (int, float, decimal.Decimal, datetime.date, datetime.time)):
        return str(value)
    raise RecordError(f"column {column!r} holds a {type(value).__name__}, expected text, a number or a date")


def require_text(record: Record, column: str) -> str:
    """The text of a column; RecordError where it is missing, empty or of another type."""
    value = require(record, column)
    if not isinstance(value, str):
        raise RecordError(f"column {column!r} holds a {type(value).__name__}, expected text")
    return require_valid_unicode(value, column)


def require_valid_unicode(value: str, column: str) -> str:
    """The text itself; RecordError for half a surrogate pair, which JSON can spell but no tokenizer can hold."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                f"column {column!r} holds half a character ({value[error.start]!r}); write it as a whole one"
            ) from None
    return value


def shorten(value: Any) -> str:
    """A value in a message: on one line, and not longer than one."""
    return reprlib.repr(value)
