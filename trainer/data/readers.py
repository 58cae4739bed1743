"""Files -> records, as strictly as their formats are defined, and the values of one record, checked. In text files
every cell is text. A record comes with its place, `line 3` or `row 2 (line 3)`; a UserError names file and place."""

import codecs
import csv
import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config.errors import UserError, first_line
from trainer.config.files import open_plain_file, parse_json
from trainer.config.text import list_some

Record = Mapping[str, Any]
PlacedRecord = tuple[str, Record]
KIND_BY_SUFFIX = {
    ".csv": "CSV",
    ".tsv": "TSV",
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "JSON"),
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    **dict.fromkeys((".txt", ".text"), "text"),
}
MAX_LINE_BYTES = 16 * 2**20  # a line is read as a whole, so this bounds memory
BATCH_RECORDS = 1000  # records of an Arrow table that are Python objects at a time


def file_kind(file: Path) -> str | None:
    """The kind of a file by its ending, None where it is not known."""
    return KIND_BY_SUFFIX.get(file.suffix.lower())


def read_file(file: Path, where: str, columns: Sequence[str] | None = None) -> Iterator[PlacedRecord]:
    """The records of a file, a bounded number in memory, of Parquet and Arrow files with these `columns` only."""
    kind = file_kind(file)
    try:
        if kind in ("Parquet", "Arrow"):
            yield from _read_arrow(file, str(kind), where, columns)
            return
        with open_plain_file(file) as stream:
            if kind == "JSON":
                is_list = stream.read(2**16).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
                stream.seek(0)
                yield from _read_json(stream, where, is_list=is_list)
            elif kind == "text":
                for number, line in enumerate(_iter_lines(stream, where), start=1):
                    yield f"line {number}", {"text": line.rstrip("\r\n")}
            else:
                yield from _read_csv(stream, str(kind), where)
    except UserError:
        raise
    except Exception as error:  # Arrow raises many kinds, OverflowError for a date beyond Python's years
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{where}: cannot be read ({error.strerror})") from error
        raise UserError(f"{where}: not a whole {kind} file ({first_line(error)}); write it again") from error


def _decode(content: bytes, where: str, line: int = 1) -> str:
    if b"\0" in content:  # UTF-16 has one in every letter of English
        raise UserError(f"{where}, line {line}: holds a NUL byte (UTF-16?); save the file as UTF-8")
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        byte = error.object[error.start]
        raise UserError(f"{where}, line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from None


def _iter_lines(stream: BinaryIO, where: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), b""), start=1):
        if len(line) == MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES // 2**20} MB"
            raise UserError(f"{where}, line {number}: longer than {limit}, and read line by line: break it into lines")
        yield _decode(line, where, number)


def _refuse_doubled_columns(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        [(name, _)] = Counter(names).most_common(1)
        raise UserError(f"{where}: names column {name!r} twice; rename one")


def _read_csv(stream: BinaryIO, kind: str, where: str) -> Iterator[PlacedRecord]:
    """`NA` may be Namibia and `007` is no number; an empty cell is None, a nameless column is called by its place."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(_iter_lines(stream, where), delimiter="\t" if kind == "TSV" else ",", strict=True)
    names: list[str] = []
    row, line = 0, 1  # of the row that is read next; the header is row 0
    try:
        for cells in reader:
            place, line = f"row {row} (line {line})", reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = [name or f"column {number}" for number, name in enumerate(cells, start=1)]
                _refuse_doubled_columns(names, where)
            elif len(cells) != len(names):
                fields = f"{len(cells)} fields where the header has {len(names)}"
                raise UserError(f"{where}, {place}: {fields}; quote those with a separator or a line break")
            else:
                yield place, dict(zip(names, (cell or None for cell in cells), strict=True))
            row += 1
    except csv.Error as error:
        reason = str(error).partition(" - ")[0]  # behind it is advice for programmers
        remedy = "look for a quotation mark that is never closed or not doubled, or save the file with Unix line breaks"
        raise UserError(f"{where}, row {row} (line {line}): not {kind} ({reason}); {remedy}") from None


def _read_json(stream: BinaryIO, where: str, *, is_list: bool) -> Iterator[PlacedRecord]:
    """One object a line, or one list of objects, which is read as a whole."""
    texts: Iterable[str] = [_decode(stream.read(), where)] if is_list else _iter_lines(stream, where)
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            value = parse_json(text, with_nan=True)
        except ValueError as error:
            place, reason = "" if is_list else f", line {number}", str(error)
            if isinstance(error, json.JSONDecodeError):
                place, reason = f", line {number + error.lineno - 1}, character {error.colno}", error.msg
            expected = "expected one object a line, or one list of objects"
            raise UserError(f"{where}{place}: not JSON ({reason}); {expected}") from None
        for row, record in enumerate(value if is_list else [value], start=1):
            place = f"row {row}" if is_list else f"line {number}"
            if not isinstance(record, dict):
                raise UserError(f"{where}, {place}: holds a {type(record).__name__}; expected a JSON object")
            yield place, record


def _read_arrow(file: Path, kind: str, where: str, columns: Sequence[str] | None) -> Iterator[PlacedRecord]:
    import pyarrow.ipc
    import pyarrow.parquet

    if kind == "Parquet":
        parquet_file = pyarrow.parquet.ParquetFile(file)
        names, batches = parquet_file.schema_arrow.names, parquet_file.iter_batches(BATCH_RECORDS)
    else:
        try:  # Arrow's file format, which Feather is, or a stream, which `datasets` writes
            reader = pyarrow.ipc.open_file(pyarrow.OSFile(str(file)))
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            batches = reader = pyarrow.ipc.open_stream(pyarrow.OSFile(str(file)))
        names = reader.schema.names
    _refuse_doubled_columns(names, where)
    number = 0
    for batch in batches:
        if columns is not None:
            batch = batch.select([name for name in batch.schema.names if name in columns])
        for start in range(0, batch.num_rows, BATCH_RECORDS):
            for record in batch.slice(start, BATCH_RECORDS).to_pylist():
                number += 1
                yield f"row {number}", record


class RecordError(Exception):
    """What is wrong with a record: its column and the remedy; who reads the file adds file and row."""


def list_columns(columns: Sequence[str]) -> str:
    separator = next((mark for mark in ";|\t" if len(columns) == 1 and mark in columns[0]), None)
    hint = f" (separated by {separator!r}? save the file with commas, or as .tsv with tabs)" if separator else ""
    return list_some(columns, 40) + hint


def is_missing(value: Any) -> bool:
    """Whether a value is null or empty, which a CSV file cannot tell apart; JSON and pandas also spell null NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def require(record: Record, column: str) -> Any:
    value = record.get(column)
    if is_missing(value):
        state = "null or empty" if column in record else "missing"
        raise RecordError(f"column {column!r} is {state}: fill it, drop the row, or name another column")
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


def require_valid_unicode(value: str, column: str) -> str:
    """The text itself; RecordError for half a surrogate pair, which JSON can spell but no tokenizer can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise RecordError(f"column {column!r} holds half a character ({half!r}); write it as a whole one") from None
    return value
