"""Files of every kind -> records, one after the other; what cannot be read is one line with file and place."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from trainer.config.errors import UserError, first_line
from trainer.data import hf_readers
from trainer.data.sources import Source

MAX_LINE_BYTES = 16 * 2**20  # bytes; a line is read as a whole, so this bounds memory
MAX_JSON_DEPTH = 500  # levels named in messages; Python's reader gives up at about twice as many
READ_BATCH_SIZE = 1000  # records read at a time
READ_ERRORS = (ValueError, OSError, EOFError, TypeError, NotImplementedError, zlib.error)  # Arrow's are ValueErrors
_SEPARATOR = re.compile(r"[\s,]*")
_JSON_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[\[{]|[\]}]|\d+')


class SourcedRecord(NamedTuple):
    """A record, and where a user finds it: its file, and in it `line 3` or `row 2 (line 3)`, both from 1."""

    file: Path | None
    place: str
    record: Mapping[str, Any]


def open_bytes(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix.lower() == ".zst":
        return hf_readers.open_zstd(file)
    return open(file, "rb")


def open_text(file: Path, errors: str = "strict", newline: str = "\n") -> TextIO:
    """The text of a file, untranslated; `newline` is where a line ends, "" for every kind of line end (CSV)."""
    return io.TextIOWrapper(open_bytes(file), encoding="utf-8-sig", errors=errors, newline=newline)


def columns(source: Source) -> tuple[str, ...]:
    """The columns of a source, from the beginning of its first file."""
    if source.dataset is not None:
        return tuple(source.dataset.column_names)
    return file_columns(source, source.files[0])


def file_columns(source: Source, file: Path) -> tuple[str, ...]:
    """The columns of one file, read from its beginning; a nameless CSV column is called by its place."""
    if source.kind == "text":
        return ("text",)
    if source.kind in ("Parquet", "Arrow"):
        return hf_readers.arrow_columns(file, source.kind, f"{source.flag} {file}")
    try:
        if source.kind == "JSON":
            return tuple(next(_iter_json(source, file, errors="replace")).record)
        with open_text(file, errors="replace", newline="") as stream:
            lines = iter(lambda: stream.readline(MAX_LINE_BYTES), "")
            header: list[str] = next((row for row in _csv_reader(lines, source.kind) if row), [])
    except StopIteration:
        raise UserError(f"{source.flag} {file}: holds no record; expected one JSON object a line") from None
    except (*READ_ERRORS, csv.Error) as error:
        raise _read_error(source, file, "line 1", error) from None
    names = tuple(name or f"column {column_number}" for column_number, name in enumerate(header, start=1))
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{source.flag} {file}, line 1: the header names column {duplicates[0]!r} twice; rename one")
    return names


def records(source: Source, column_names: Sequence[str] | None = None) -> Iterator[SourcedRecord]:
    """Every record in order, a bounded number in memory; `column_names` only, where the kind lets us choose."""
    if source.dataset is not None:
        dataset = source.dataset.select_columns(list(column_names)) if column_names else source.dataset
        tables = dataset.with_format("arrow").iter(batch_size=READ_BATCH_SIZE)
        yield from _iter_checked(source, None, _iter_tables(None, tables))
    else:
        for file in source.files:
            if source.kind in ("Parquet", "Arrow"):
                names = [name for name in file_columns(source, file) if column_names is None or name in column_names]
                file_records = _iter_tables(file, hf_readers.iter_arrow(file, source.kind, names, READ_BATCH_SIZE))
            else:
                file_records = {"JSON": _iter_json, "text": _iter_text}.get(source.kind, _iter_csv)(source, file)
            yield from _iter_checked(source, file, file_records)


def _iter_checked(source: Source, file: Path | None, file_records: Iterator[SourcedRecord]) -> Iterator[SourcedRecord]:
    """The same records; what the reader cannot read becomes one line."""
    place = "the beginning"
    try:
        for sourced_record in file_records:
            place = f"after {sourced_record.place}"
            yield sourced_record
    except READ_ERRORS as error:
        raise _read_error(source, file, place, error) from error


def _iter_tables(file: Path | None, tables: Iterator[Any]) -> Iterator[SourcedRecord]:
    """The rows of Arrow tables, numbered from 1."""
    rows = (record for table in tables for record in table.to_pylist())
    for number, record in enumerate(rows, start=1):
        yield SourcedRecord(file, f"row {number}", record)


def _read_error(source: Source, file: Path | None, place: str, error: Exception) -> UserError:
    return UserError(
        f"{source.flag} {file or source.spec}, {place}: cannot be read as {source.kind} ({first_line(error)}); "
        "mend the file, or give it in another format"
    )


def _iter_text(source: Source, file: Path) -> Iterator[SourcedRecord]:
    with open_text(file) as stream:
        for number, line in enumerate(stream, start=1):
            yield SourcedRecord(file, f"line {number}", {"text": line.rstrip("\r\n")})


def _csv_reader(lines: Iterator[str], kind: str) -> Any:
    csv.field_size_limit(MAX_LINE_BYTES)
    return csv.reader(lines, delimiter="\t" if kind == "TSV" else ",")


def _iter_csv(source: Source, file: Path) -> Iterator[SourcedRecord]:
    """Every cell as text (`NA` may be Namibia, `007` is no number), an empty one as None."""
    names = file_columns(source, file)
    row, line, has_ended = -1, 1, False

    def lines() -> Iterator[str]:
        nonlocal has_ended
        yield from stream
        has_ended = True

    try:
        with open_text(file, newline="") as stream:
            for cells in (reader := _csv_reader(lines(), source.kind)):
                if has_ended:  # the reader asked for another line in the middle of a row
                    raise csv.Error("the file ends within quotation marks")
                if cells:
                    row += 1
                    place = f"row {row} (line {line})"
                    if len(cells) != len(names):
                        raise UserError(
                            f"{source.flag} {file}, {place}: {len(cells)} fields where the header has {len(names)}; "
                            "quote fields that hold a separator or a line break"
                        )
                    if row:
                        yield SourcedRecord(file, place, {n: c or None for n, c in zip(names, cells, strict=True)})
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{source.flag} {file}, row {row + 1} (line {line}): not {source.kind} ({error}); look for a quotation "
            "mark that is never closed"
        ) from None
    if row < 1:
        raise UserError(f"{source.flag} {file}: has a header but no row; expected at least one record")


def is_json_list(file: Path) -> bool:
    """Whether a JSON file is one list rather than one object a line."""
    with open_bytes(file) as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _iter_json(source: Source, file: Path, errors: str = "strict") -> Iterator[SourcedRecord]:
    if is_json_list(file):
        yield from _iter_json_list(source, file)
        return
    with open_text(file, errors) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), ""), start=1):
            if line.strip():
                yield SourcedRecord(file, f"line {number}", _parse_json_object(source, file, number, line))


def _parse_json_object(source: Source, file: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{source.flag} {file}, line {number}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}, character {error.pos + 1}: not JSON ({error.msg}); expected one object a line"
        ) from None
    except (RecursionError, ValueError):
        raise UserError(f"{where}{_oversized_json(line)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds a {type(value).__name__}; expected one JSON object a line")
    return value


def _oversized_json(text: str) -> str:
    """What of a JSON text is too long or too deep to be read, and in which column of its first object."""
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


def _iter_json_list(source: Source, file: Path) -> Iterator[SourcedRecord]:
    """The objects of a file that is one JSON list, decoded one at a time so that the file need not fit in memory."""
    decoder, number = json.JSONDecoder(), 0
    with open_text(file, errors="replace") as stream:
        text = stream.read(2**20)
        position = text.index("[") + 1
        while True:
            position = _SEPARATOR.match(text, position).end()  # type: ignore[union-attr]  # it also matches nothing
            where, reason = f"{source.flag} {file}, row {number + 1}", "the list is not closed"
            if text.startswith("]", position):
                if not number:
                    raise UserError(f"{source.flag} {file}: the list is empty; expected at least one record")
                return
            if text.startswith("{", position):
                try:
                    value, position = decoder.raw_decode(text, position)
                    number += 1
                    yield SourcedRecord(file, f"row {number}", value)
                    continue
                except json.JSONDecodeError as error:
                    reason = error.msg
                except (RecursionError, ValueError):
                    raise UserError(f"{where}{_oversized_json(text[position:])}") from None
            elif position < len(text):
                raise UserError(f"{where}: not an object; expected a list of objects")
            chunk = stream.read(max(2**20, len(text) - position)) if len(text) - position < MAX_LINE_BYTES else ""
            if not chunk:
                raise UserError(f"{where}: not JSON ({reason}); expected a list of objects")
            text, position = text[position:] + chunk, 0
