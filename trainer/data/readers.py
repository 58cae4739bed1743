"""Files -> records, as strictly as their formats are defined; in text files every cell is text.

Each record comes with its place, `line 3` or `row 2 (line 3)`, both from 1. What a format does not allow is a UserError
with file, place and remedy; `where` is how it names the file.
"""

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from trainer.config.errors import UserError, first_line
from trainer.config.files import open_plain_file, parse_json
from trainer.data.values import Record

PlacedRecord = tuple[str, Record]
KIND_BY_SUFFIX = {
    ".csv": "CSV",
    ".tsv": "TSV",
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".txt": "text",
    ".text": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of the kinds that are text
MAX_LINE_BYTES = 16 * 2**20  # a line is read as a whole, so this bounds memory
BATCH_RECORDS = 1000  # records of an Arrow table that are Python objects at a time


def file_kind(file: Path) -> str | None:
    """The kind of a file by its ending, None where it is not known; only text may be compressed."""
    if file.suffix.lower() in COMPRESSIONS:
        kind = KIND_BY_SUFFIX.get(file.with_suffix("").suffix.lower())
        return None if kind in ("Parquet", "Arrow") else kind
    return KIND_BY_SUFFIX.get(file.suffix.lower())


def open_bytes(file: Path) -> BinaryIO:
    """The bytes of a file, decompressed where its name says that it is compressed."""
    if file.suffix.lower() not in COMPRESSIONS:
        return open_plain_file(file)
    import pyarrow

    compression = COMPRESSIONS[file.suffix.lower()]
    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(open_plain_file(file), compression=compression)))


def read_error(file: Path, where: str, error: Exception) -> UserError:
    """What a library says of a file that it cannot read or decompress, in one line with the remedy."""
    if isinstance(error, OSError) and error.errno:
        remedy = "; check its permissions" if isinstance(error, PermissionError) else ""
        return UserError(f"{where}: cannot be read ({error.strerror}){remedy}")
    kind = file.suffix if file.suffix.lower() in COMPRESSIONS else file_kind(file)
    return UserError(f"{where}: not a whole {kind} file ({first_line(error)}); write it again")


def read_file(file: Path, where: str, columns: Sequence[str] | None = None) -> Iterator[PlacedRecord]:
    """The records of a file, a bounded number in memory, of Parquet and Arrow files with these `columns` only."""
    kind = file_kind(file)
    try:
        if kind in ("Parquet", "Arrow"):
            yield from _read_arrow(file, str(kind), where, columns)
            return
        with open_bytes(file) as stream:
            if kind == "JSON":
                yield from _read_json(stream, where, is_list=_holds_list(file))
            elif kind == "text":
                for number, line in enumerate(_iter_lines(stream, where), start=1):
                    yield f"line {number}", {"text": line.rstrip("\r\n")}
            else:
                yield from _read_csv(stream, str(kind), where)
    except UserError:
        raise
    except Exception as error:  # Arrow raises many kinds, OverflowError for a date beyond Python's years
        raise read_error(file, where, error) from error


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
                raise UserError(
                    f"{where}, {place}: {len(cells)} fields where the header has {len(names)}; quote fields that hold "
                    "a separator or a line break"
                )
            else:
                yield place, dict(zip(names, (cell or None for cell in cells), strict=True))
            row += 1
    except csv.Error as error:
        reason = str(error)
        remedy = "look for a quotation mark that is never closed, or not doubled within quotation marks"
        if reason.startswith("new-line"):  # csv's own advice is for programmers
            reason, remedy = "a carriage return alone", "save the file with line breaks as Unix or Windows has them"
        raise UserError(f"{where}, row {row} (line {line}): not {kind} ({reason}); {remedy}") from None


def explain_json(error: ValueError) -> str:
    """Why a text is not JSON as we read it."""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return reason.partition("; use sys.")[0]  # Python's own advice on numbers of more than 4,300 digits


def _holds_list(file: Path) -> bool:
    """Whether `[` is the first thing in a file that is no blank."""
    with open_bytes(file) as stream:
        while chunk := stream.read(2**16):
            if content := chunk.removeprefix(codecs.BOM_UTF8).lstrip():
                return content.startswith(b"[")
    return False


def _read_json(stream: BinaryIO, where: str, *, is_list: bool) -> Iterator[PlacedRecord]:
    """One object a line, or one list of objects, which is read as a whole."""
    texts: Iterable[str] = [_decode(stream.read(), where)] if is_list else _iter_lines(stream, where)
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            value = parse_json(text, with_nan=True)
        except ValueError as error:
            place = "" if is_list else f", line {number}"
            if isinstance(error, json.JSONDecodeError):
                place = f", line {number + error.lineno - 1}, character {error.colno}"
            raise UserError(
                f"{where}{place}: not JSON ({explain_json(error)}); expected one object a line, or one list of objects"
            ) from None
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
    yield from iter_batches(batches, columns)


def iter_batches(batches: Iterable[Any], columns: Sequence[str] | None = None) -> Iterator[PlacedRecord]:
    """The rows of Arrow's tables or batches, with these `columns` only, as Python objects."""
    number = 0
    for batch in batches:
        if columns is not None:
            batch = batch.select([name for name in batch.schema.names if name in columns])
        for start in range(0, batch.num_rows, BATCH_RECORDS):
            for record in batch.slice(start, BATCH_RECORDS).to_pylist():
                number += 1
                yield f"row {number}", record
