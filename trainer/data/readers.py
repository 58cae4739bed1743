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
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from trainer.config.errors import UserError

MAX_LINE_BYTES = 16 * 2**20  # a line is read as a whole, so this bounds memory
CHUNK_SIZE = 2**20  # characters of a JSON list that are read at a time
PlacedRecord = tuple[str, Mapping[str, Any]]
Table = tuple[list[str], Iterator[PlacedRecord]]  # the columns, and the records one by one
_SPACE = re.compile(r"\s*")


def open_bytes(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    if file.suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix.lower() == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd")))
    return open(file, "rb")


def _open_text(file: Path, newline: str = "\n") -> TextIO:
    """The text of a file, untranslated; `newline` is where a line ends, "" for every kind of line end (CSV)."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", newline=newline)


def _iter_lines(stream: TextIO, where: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), ""), start=1):
        if len(line) == MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES // 2**20} MB"
            raise UserError(f"{where}, line {number}: longer than {limit}, and read line by line: break it into lines")
        yield line


def read_text(file: Path, where: str) -> Iterator[PlacedRecord]:
    """A record a line, with the column `text`."""
    with _open_text(file) as stream:
        for number, line in enumerate(_iter_lines(stream, where), start=1):
            yield f"line {number}", {"text": line.rstrip("\r\n")}


def read_csv(file: Path, kind: str, where: str) -> Table:
    """Every cell as text (`NA` may be Namibia, `007` is no number), an empty one as None; a nameless column is called
    by its place."""
    rows = _iter_csv_rows(file, kind, where)
    _, header = next(rows, ("", []))
    names = [name or f"column {number}" for number, name in enumerate(header, start=1)]
    return names, ((place, dict(zip(names, (cell or None for cell in cells), strict=True))) for place, cells in rows)


def _iter_csv_rows(file: Path, kind: str, where: str) -> Iterator[tuple[str, list[str]]]:
    """(place, cells) of the header, which is row 0, and of every row that is not blank."""
    csv.field_size_limit(MAX_LINE_BYTES)
    row, line, width = 0, 1, 0
    with _open_text(file, newline="") as stream:
        delimiter = "\t" if kind == "TSV" else ","
        reader = csv.reader(_iter_lines(stream, where), delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells:
                    place, width = f"row {row} (line {line})", width or len(cells)
                    if len(cells) != width:
                        raise UserError(
                            f"{where}, {place}: {len(cells)} fields where the header has {width}; quote fields that "
                            "hold a separator or a line break"
                        )
                    yield place, cells
                    row += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{where}, row {row} (line {line}): not {kind} ({error}); look for a quotation mark that is never "
                "closed, or not doubled within quotation marks"
            ) from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.80} stands twice in an object")
    return value


def _make_number(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text:.40} is larger than any float")
    return value


#: Of one value without duplicate keys and infinite numbers; NaN is taken, by which pandas spells null.
JSON_DECODER = json.JSONDecoder(object_pairs_hook=_make_object, parse_float=_make_number, parse_constant=_make_number)


def read_json(file: Path, where: str) -> Table:
    """The objects of a file with one a line, or with one list of them; the columns are those of the first."""
    with open_bytes(file) as stream:
        is_list = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    records = _iter_json_list(file, where) if is_list else _iter_json_lines(file, where)
    first = next(records, None)
    return (list(first[1]), chain([first], records)) if first is not None else ([], records)


def _iter_json_lines(file: Path, where: str) -> Iterator[PlacedRecord]:
    with _open_text(file) as stream:
        for number, line in enumerate(_iter_lines(stream, where), start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                value = JSON_DECODER.decode(line)
            except (RecursionError, ValueError) as error:
                position = f", character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
                reason = explain_json(error)
                raise UserError(
                    f"{where}, {place}{position}: not JSON ({reason}); expected one object a line"
                ) from None
            if not isinstance(value, dict):
                raise UserError(f"{where}, {place}: holds a {type(value).__name__}; expected one JSON object a line")
            yield place, value


def _iter_json_list(file: Path, where: str) -> Iterator[PlacedRecord]:
    """The objects of one JSON list, decoded one at a time so that the file need not fit in memory."""
    with _open_text(file) as stream:
        text, number, expected = stream.read(CHUNK_SIZE), 0, "{]"
        position = text.index("[") + 1
        while True:
            position = cast(re.Match[str], _SPACE.match(text, position)).end()
            place, reason, is_cut_off = f"{where}, row {number + 1}", "the list is not closed", True
            character = text[position : position + 1]
            if character and character not in expected:
                problem = "not JSON (a comma is missing)" if "," in expected else "not an object"
                raise UserError(f"{place}: {problem}; expected a list of objects")
            if character == "]":
                rest = chain([text[position + 1 :]], iter(lambda: stream.read(CHUNK_SIZE), ""))
                if any(part.strip() for part in rest):
                    raise UserError(
                        f"{place}: not JSON (text follows the end of the list); expected one list of objects"
                    )
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
                except (RecursionError, ValueError) as error:  # more of the text helps where it is not JSON so far
                    reason, is_cut_off = explain_json(error), isinstance(error, json.JSONDecodeError)
            can_read_on = is_cut_off and len(text) - position < MAX_LINE_BYTES
            chunk = stream.read(max(CHUNK_SIZE, len(text) - position)) if can_read_on else ""
            if not chunk:
                raise UserError(f"{place}: not JSON ({reason}); expected a list of objects")
            text, position = text[position:] + chunk, 0


def explain_json(error: ValueError | RecursionError) -> str:
    """Why a text is not JSON as we read it."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return reason.partition("; use sys.")[0]  # Python's own advice on numbers of more than 4,300 digits
