"""What `--data` names -> records."""

import contextlib
import csv
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.choices import DEMO_DATA
from trainer.config.errors import UserError
from trainer.data import demo, hf_hub, hf_readers

KIND_BY_SUFFIX = {
    ".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".jsonl": "JSON", ".ndjson": "JSON",
    ".parquet": "Parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
ACCEPTED_FILES = "a CSV, TSV, JSONL, Parquet or text file (.csv .tsv .jsonl .json .parquet .txt)"
MAX_LINE_BYTES = 16 * 2**20  # bytes; a line is read as a whole, so this bounds memory
READ_BATCH_SIZE = 1000  # records read at a time
_SEPARATOR = re.compile(r"[\s,]*")


class SourcedRecord(NamedTuple):
    """A record, and where a user finds it: its number counts from 1 in the file."""

    file: Path | None
    record_number: int
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """What a flag names: its kind ("CSV" ... "text", "hub", "demo") and the files that hold it, in order."""

    flag: str
    spec: str
    kind: str
    files: tuple[Path, ...] = ()
    dataset: Any = None

    def locate(self, file: Path | None, record_number: int) -> str:
        """Where a record stands, as a user would look it up."""
        if self.kind in ("hub", "demo"):
            return f"{self.spec}, row {record_number}"
        if self.kind == "text" or (self.kind == "JSON" and file and not is_json_list(file)):
            return f"{file}, line {record_number}"
        if self.kind in ("CSV", "TSV") and file and (line := _csv_line(file, self.kind, record_number)):
            return f"{file}, row {record_number} (line {line})"
        return f"{file}, row {record_number}"


def find(spec: str, flag: str = "--data") -> Source:
    """The source that a flag names. Local files first; UserError where there is nothing, or more than one kind."""
    if spec == DEMO_DATA:
        return Source(flag, spec, "demo")
    path = Path(spec).expanduser()
    if path.is_dir():
        visible_files = (
            p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
        return _source_from_files(
            flag, spec, sorted(p for p in visible_files if p.is_file()), f"{flag} {spec}: the folder"
        )
    if path.exists():
        if path.suffix.lower() not in KIND_BY_SUFFIX:
            raise UserError(f"{flag} {spec}: the ending {path.suffix!r} is not known; expected {ACCEPTED_FILES}")
        return _source_from_files(flag, spec, [path], f"{flag} {spec}: it")
    if glob.has_magic(spec):
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"{flag} {spec}: no file matches; expected a pattern that matches {ACCEPTED_FILES}")
        return _source_from_files(flag, spec, [p for p in matches if p.is_file()], f"{flag} {spec}: the pattern")
    if path.suffix.lower() in KIND_BY_SUFFIX or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", spec):
        raise UserError(
            f"{flag} {spec}: no such file or folder; expected {ACCEPTED_FILES}, a folder or glob of them, or a hub id"
        )
    dataset, cache_files = hf_hub.load_hub_dataset(flag, spec)
    return Source(flag, spec, "hub", cache_files, dataset)


def _source_from_files(flag: str, spec: str, files: Sequence[Path], description: str) -> Source:
    data_files = [
        (KIND_BY_SUFFIX[file.suffix.lower()], file) for file in files if file.suffix.lower() in KIND_BY_SUFFIX
    ]
    if not data_files:
        raise UserError(f"{description} holds no data file; expected {ACCEPTED_FILES}")
    first_files = dict(reversed(data_files))  # kind -> its first file
    if len(first_files) > 1:
        kind_list = ", ".join(f"{kind} ({first_files[kind].name})" for kind in sorted(first_files))
        raise UserError(
            f"{description} holds several kinds of data: {kind_list}; give files of one kind, for instance by a glob"
        )
    for _, file in data_files:
        try:
            with open(file, "rb") as stream:
                is_empty = not stream.read(1)
        except OSError as error:
            raise UserError(f"{flag} {file}: cannot be read ({error.strerror}); check its permissions") from None
        if is_empty:
            raise UserError(f"{flag} {file}: the file is empty; expected at least one record")
    return Source(flag, spec, data_files[0][0], tuple(file for _, file in data_files))


def columns(source: Source) -> tuple[str, ...]:
    """The columns of a source, from the beginning of its first file."""
    if source.kind == "demo":
        return tuple(next(records(source)).record)
    if source.kind == "hub":
        return tuple(source.dataset.column_names)
    return file_columns(source, source.files[0])


def file_columns(source: Source, file: Path) -> tuple[str, ...]:
    """The columns of one file, read from its beginning; a nameless CSV column is called by its place."""
    if source.kind == "text":
        return ("text",)
    if source.kind == "Parquet":
        return tuple(open_parquet(source, file).schema_arrow.names)
    if source.kind == "JSON":
        if is_json_list(file):
            for sourced_record in _iter_json_list(source, file):
                return tuple(sourced_record.record)
            raise UserError(f"{source.flag} {file}: the list is empty; expected at least one record")
        with open(file, encoding="utf-8-sig", errors="replace") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES), ""), start=1):
                if line.strip():
                    return tuple(_parse_json_object(source, file, number, line))
        raise UserError(f"{source.flag} {file}: holds no record; expected one JSON object a line")
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as stream:
        header = next((row for row in csv.reader(stream, delimiter=delimiter(source.kind)) if row), [])
    names = tuple(name or f"column {column_number}" for column_number, name in enumerate(header, start=1))
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{source.flag} {file}, line 1: the header names column {duplicates[0]!r} twice; rename one")
    return names


def delimiter(kind: str) -> str:
    """What separates the fields of a CSV or TSV file."""
    return "\t" if kind == "TSV" else ","


def records(
    source: Source, column_names: Sequence[str] | None = None, *, cache: Path | None = None
) -> Iterator[SourcedRecord]:
    """Every record in order, a bounded number in memory; `column_names` only, where the format lets us choose."""
    if source.kind == "demo":
        for number, event in enumerate(demo.events(demo.DEMO_RECORDS, demo.DEMO_SEED), start=1):
            yield SourcedRecord(None, number, event)
    elif source.kind == "hub":
        dataset = source.dataset.select_columns(list(column_names)) if column_names else source.dataset
        yield from _iter_records(source, None, dataset)
    else:
        for file in source.files:
            yield from _file_records(source, file, column_names, cache)


def _file_records(
    source: Source, file: Path, column_names: Sequence[str] | None, cache: Path | None
) -> Iterator[SourcedRecord]:
    if source.kind == "JSON" and is_json_list(file):
        yield from _iter_json_list(source, file)
    elif source.kind == "JSON":
        # read as lines, because inferred types would turn dates into timestamps and differ from file to file
        for _, number, row in _iter_records(
            source, file, hf_readers.stream_file(file, "text", cache, encoding="utf-8-sig")
        ):
            if row["text"].strip():
                yield SourcedRecord(file, number, _parse_json_object(source, file, number, row["text"]))
    elif source.kind == "text":
        yield from _iter_records(source, file, hf_readers.stream_file(file, "text", cache, encoding="utf-8-sig"))
    elif source.kind == "Parquet":
        names = [name for name in file_columns(source, file) if column_names is None or name in column_names]
        yield from _iter_records(source, file, hf_readers.stream_file(file, "parquet", cache, columns=names))
    else:
        names = list(file_columns(source, file))
        for _, number, row in _iter_records(
            source, file, hf_readers.stream_csv(file, names, delimiter(source.kind), cache)
        ):
            yield SourcedRecord(file, number, {name: value or None for name, value in row.items()})


def _iter_records(source: Source, file: Path | None, dataset: Any) -> Iterator[SourcedRecord]:
    """The rows of a data set, numbered from 1; what its reader cannot read becomes one line."""
    number = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=READ_BATCH_SIZE):
            for record in table.to_pylist():
                number += 1
                yield SourcedRecord(file, number, record)
    except (
        ValueError,
        OSError,
        TypeError,
        NotImplementedError,
    ) as error:  # Arrow's and pandas' errors are ValueErrors
        first_line = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source.flag} {file or source.spec}, after row {number}: cannot be read as {source.kind} ({first_line}); "
            "mend the file, or give it in another format"
        ) from error


def open_parquet(source: Source, file: Path) -> Any:
    """The Parquet file, of which only the footer is read; UserError where it is not whole."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (ValueError, OSError) as error:
        first_line = str(error).splitlines()[0][:160]
        raise UserError(f"{source.flag} {file}: not a whole Parquet file ({first_line}); write it again") from None


def is_json_list(file: Path) -> bool:
    """Whether a JSON file is one list rather than one object a line."""
    with open(file, "rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _parse_json_object(source: Source, file: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{source.flag} {file}, line {number}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}, character {error.pos + 1}: not JSON ({error.msg}); expected one object a line"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply; expected one flat object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds a {type(value).__name__}; expected one JSON object a line")
    return value


def _iter_json_list(source: Source, file: Path) -> Iterator[SourcedRecord]:
    """The objects of a file that is one JSON list, decoded one at a time so that the file need not fit in memory."""
    decoder, number = json.JSONDecoder(), 0
    with open(file, encoding="utf-8-sig", errors="replace") as stream:
        text = stream.read(2**20)
        position = text.index("[") + 1
        while True:
            position = _SEPARATOR.match(text, position).end()  # type: ignore[union-attr]  # it also matches nothing
            reason = "the list is not closed"
            if text.startswith("]", position):
                return
            if text.startswith("{", position):
                try:
                    value, position = decoder.raw_decode(text, position)
                    number += 1
                    yield SourcedRecord(file, number, value)
                    continue
                except json.JSONDecodeError as error:
                    reason = error.msg
            elif position < len(text):
                raise UserError(f"{source.flag} {file}, row {number + 1}: not an object; expected a list of objects")
            chunk = stream.read(max(2**20, len(text) - position)) if len(text) - position < MAX_LINE_BYTES else ""
            if not chunk:
                raise UserError(
                    f"{source.flag} {file}, row {number + 1}: not JSON ({reason}); expected a list of objects"
                )
            text, position = text[position:] + chunk, 0


def _csv_line(file: Path, kind: str, row_number: int) -> int | None:
    """The line at which row `row_number` of a CSV file begins; None where it cannot be told any more."""
    with contextlib.suppress(OSError, ValueError, csv.Error), open(file, encoding="utf-8-sig", newline="") as stream:
        reader, row, line = csv.reader(stream, delimiter=delimiter(kind)), -1, 1
        for cells in reader:
            row += bool(cells)
            if row == row_number:
                return line
            line = reader.line_num + 1
    return None
