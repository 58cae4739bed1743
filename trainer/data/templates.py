"""`--prompt` and `--completion`: templates with columns in braces, filled from a record."""

import datetime
import decimal
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError

Record = Mapping[str, Any]
Pair = tuple[str, str]  # prompt and completion
MAX_COLUMNS_NAMED = 40


class RecordError(Exception):
    """What is wrong with a record: its column and the remedy; who reads the file adds file and row."""


@dataclass(frozen=True)
class Piece:
    """A column of a record, or a text that stands as it is."""

    is_column: bool
    text: str


def list_columns(columns: Sequence[str]) -> str:
    """Column names for a message, on one line whatever they hold."""
    names = [name if name.isprintable() else repr(name) for name in columns[:MAX_COLUMNS_NAMED]]
    return ", ".join(names) + (f" and {len(columns) - len(names)} more" if len(columns) > len(names) else "")


def parse_template(template: str, flag: str) -> list[Piece]:
    """The parts of a template; `{{` and `}}` are literal braces; UserError for a stray one."""
    parts: list[Piece] = []
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+", template):
        piece = match[0]
        if match[1] is not None:
            parts.append(Piece(True, match[1]))
        elif piece in "{}":
            raise UserError(
                f"{flag} {template!r}: a brace stands alone at character {match.start() + 1}; "
                "write {column}, or double a brace that is meant literally"
            )
        else:
            parts.append(Piece(False, piece[0] if piece in ("{{", "}}") else piece))
    return parts


def compile_templates(
    columns: Sequence[str], prompt: str, completion: str, where: str
) -> tuple[tuple[str, ...], Callable[[Record], Pair]]:
    """(the columns that are read, record -> prompt and completion); UserError for a column that is not there.

    Every column of --completion must be filled. A line of --prompt whose columns are all empty is left out, so that an
    optional part leaves nothing behind; not all of them may be.
    """
    prompt_pieces, completion_pieces = parse_template(prompt, "--prompt"), parse_template(completion, "--completion")
    for flag, pieces in (("--prompt", prompt_pieces), ("--completion", completion_pieces)):
        for piece in pieces:
            if piece.is_column and piece.text not in columns:
                raise UserError(
                    f"{flag}: {where} has no column {piece.text!r}; its columns are {list_columns(columns)}"
                )
    if not any(piece.is_column for piece in completion_pieces):
        raise UserError(
            f"--completion {completion!r}: names no column; write one in braces, of {list_columns(columns)}"
        )
    prompt_lines, prompt_columns = _split_lines(prompt_pieces), _columns_of(prompt_pieces)

    def render(record: Record) -> Pair:
        completion_text = "".join(
            value_text(record, piece.text, "--completion") if piece.is_column else piece.text
            for piece in completion_pieces
        )
        if not completion_text.strip():
            raise RecordError("the text of --completion is empty: fill its columns or drop the row")
        if prompt_columns and all(is_missing(record.get(column)) for column in prompt_columns):
            value_text(record, prompt_columns[0], "--prompt")
        return "".join(_render_line(line, record) for line in prompt_lines), completion_text

    return tuple(dict.fromkeys(prompt_columns + _columns_of(completion_pieces))), render


def _columns_of(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.is_column]


def _split_lines(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces of each line, with its line break."""
    lines: list[list[Piece]] = [[]]
    for piece in pieces:
        for text in [piece.text] if piece.is_column else piece.text.splitlines(keepends=True):
            lines[-1].append(Piece(piece.is_column, text))
            if not piece.is_column and text.endswith("\n"):
                lines.append([])
    return lines


def _render_line(pieces: Sequence[Piece], record: Record) -> str:
    columns = _columns_of(pieces)
    if columns and all(is_missing(record.get(column)) for column in columns):
        return ""
    values = {column: "" if is_missing(record.get(column)) else to_text(record[column], column) for column in columns}
    return "".join(values[piece.text] if piece.is_column else piece.text for piece in pieces)


def value_text(record: Record, column: str, flag: str) -> str:
    """The value of a column as text; RecordError where it is missing, empty, or neither text, number nor date."""
    value = record.get(column)
    if is_missing(value):
        raise RecordError(
            f"column {column!r} is {'null or empty' if column in record else 'missing'}: fill it, drop the row, "
            f"or leave {{{column}}} out of {flag}"
        )
    return to_text(value, column)


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
    value = record.get(column)
    if is_missing(value):
        raise RecordError(f"column {column!r} is null or empty: fill it or drop the row")
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
