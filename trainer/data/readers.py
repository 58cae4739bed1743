"""CSV, TSV, JSON and text files -> records, as strictly as the formats are defined and with every cell as text.

Each record comes with its place: `line 3`, or `row 2 (line 3)`, both from 1. What a format does not allow is one line
with file, row and column; `where` is how it names the file.
"""

import csv
import gzip
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from trainer.config.errors import UserError

MAX_LINE_BYTES = 16 * 2**20  # a line is read as a whole, so this bounds memory
MAX_JSON_DEPTH = 500  # levels named in messages; Python's reader gives up at about twice as many
CHUNK_SIZE = 2**20  # characters of a JSON list that are read at a time
PlacedRecord = tuple[str, Mapping[str, Any]]
_SPACE = re.compile(r"\s*")
_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[\[{]|[\]}]|\d+')


def open_bytes(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    if file.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    return open(file, "rb")


def open_text(file: Path, newline: str = "\n") -> TextIO:
    """The text of a file, untranslated; `newline` is where a line ends, "" for every kind of line end (CSV)."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline=newline)


def _iter_lines(stream: TextIO, where: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), ""), start=1):
        if len(line) == MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES // 2**20} MB"
            raise UserError(f"{where}, line {number}: longer than {limit}, and read line by line: break it into lines")
        yield line


def iter_text(file: Path, where: str) -> Iterator[PlacedRecord]:
    with open_text(file) as stream:
        for number, line in enumerate(_iter_lines(stream, where), start=1):
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def iter_csv_rows(file: Path, kind: str, where: str) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of the header, which is row 0, and of every row that is not blank."""
    csv.field_size_limit(MAX_LINE_BYTES)
    row, line = 0, 1
    with open_text(file, newline="") as stream:
        delimiter = "\t" if kind == "TSV" else ","
        reader = csv.reader(_iter_lines(stream, where), delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield f"row {row} (line {line})", cells
                    row += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{where}, row {row} (line {line}): not {kind} ({error}); look for a quotation mark that is never "
                "closed, or not doubled within quotation marks"
            ) from None


def csv_columns(file: Path, kind: str, where: str) -> list[str]:
    """The names in the header, a nameless column called by its place; empty where there is no line."""
    _, header = next(iter_csv_rows(file, kind, where), ("", []))
    return [name or f"column {number}" for number, name in enumerate(header, start=1)]


def iter_csv(file: Path, kind: str, where: str, names: list[str]) -> Iterator[PlacedRecord]:
    """Every cell as text (`NA` may be Namibia, `007` is no number), an empty one as None."""
    num_rows = -1
    for num_rows, (place, cells) in enumerate(iter_csv_rows(file, kind, where)):
        if len(cells) != len(names):
            raise UserError(
                f"{where}, {place}: {len(cells)} fields where the header has {len(names)}; quote fields that hold a "
                "separator or a line break"
            )
        if num_rows:
            yield place, {name: cell or None for name, cell in zip(names, cells, strict=True)}
    if num_rows < 1:
        raise UserError(f"{where}: has a header but no row; expected at least one record")


class _StrictnessError(ValueError):
    """What Python's reader would pass over."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _StrictnessError(f"the key {key!r:.80} stands twice in an object")
    return value


def _make_number(text: str) -> float:
    if math.isinf(value := float(text)):
        raise _StrictnessError(f"the number {text:.40} is larger than any float")
    return value


#: Of one value without duplicate keys and infinite numbers; NaN is taken, by which pandas spells null.
JSON_DECODER = json.JSONDecoder(object_pairs_hook=_make_object, parse_float=_make_number, parse_constant=_make_number)


def iter_json(file: Path, where: str) -> Iterator[PlacedRecord]:
    """The objects of a file with one a line, or with one list of them."""
    with open_bytes(file) as stream:
        is_list = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    with open_text(file) as stream:
        if is_list:
            yield from _iter_json_list(stream, where)
            return
        for number, line in enumerate(_iter_lines(stream, where), start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                value = JSON_DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}, {place}, character {error.pos + 1}: not JSON ({error.msg}); expected one object a line"
                ) from None
            except (RecursionError, ValueError) as error:
                raise UserError(f"{where}, {place}{_describe_json(line, error)}") from None
            if not isinstance(value, dict):
                raise UserError(f"{where}, {place}: holds a {type(value).__name__}; expected one JSON object a line")
            yield place, value


def _iter_json_list(stream: TextIO, where: str) -> Iterator[PlacedRecord]:
    """The objects of one JSON list, decoded one at a time so that the file need not fit in memory."""
    text, number, expected = stream.read(CHUNK_SIZE), 0, "{]"
    position = text.index("[") + 1
    while True:
        position = cast(re.Match[str], _SPACE.match(text, position)).end()
        place, reason = f"{where}, row {number + 1}", "the list is not closed"
        character = text[position : position + 1]
        if character and character not in expected:
            problem = "not JSON (a comma is missing)" if "," in expected else "not an object"
            raise UserError(f"{place}: {problem}; expected a list of objects")
        if character == "]":
            if not number:
                raise UserError(f"{where}: the list is empty; expected at least one record")
            if text[position + 1 :].strip() or any(rest.strip() for rest in iter(lambda: stream.read(CHUNK_SIZE), "")):
                raise UserError(f"{place}: not JSON (text follows the end of the list); expected one list of objects")
            return
        if character == ",":
            position, expected = position + 1, "{"
            continue
        if character == "{":
            try:
                value, position = JSON_DECODER.raw_decode(text, position)
                number, expected = number + 1, ",]"
                yield f"row {number}", value
                continue
            except json.JSONDecodeError as error:
                reason = error.msg
            except (RecursionError, ValueError) as error:
                raise UserError(place + _describe_json(text[position:], error)) from None
        chunk = stream.read(max(CHUNK_SIZE, len(text) - position)) if len(text) - position < MAX_LINE_BYTES else ""
        if not chunk:
            raise UserError(f"{place}: not JSON ({reason}); expected a list of objects")
        text, position = text[position:] + chunk, 0


def _describe_json(text: str, error: Exception) -> str:
    """What is wrong with JSON that can be parsed in principle; too long or too deep is said with its column."""
    if isinstance(error, _StrictnessError):
        return f": {error}; expected each key once, and numbers that a float can hold"
    depth, column, max_digits = 0, "", sys.get_int_max_str_digits()
    for match in _JSON_TOKEN.finditer(text):
        token = match[0]
        if match[2] and depth == 1:
            column = f", column {match[1][1:-1][:80]!r}"
        elif token in ("{", "["):
            depth += 1
            if depth > MAX_JSON_DEPTH:
                return f"{column}: JSON nested more than {MAX_JSON_DEPTH} deep; expected one flat object"
        elif token in ("}", "]"):
            depth -= 1
        elif token.isdigit() and len(token) > max_digits:
            return f"{column}: a number of {len(token):,} digits; expected at most {max_digits:,}, or text in quotes"
    return ": JSON too deep or too long to be read; expected one flat object"
