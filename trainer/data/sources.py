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

from trainer.config.errors import UserError
from trainer.config.schema import DEMO_DATA
from trainer.data import demo, hf_hub, hf_readers

KINDS = {
    ".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".jsonl": "JSON", ".ndjson": "JSON",
    ".parquet": "Parquet", ".txt": "text", ".text": "text",
}  # fmt: skip
ACCEPTED = "a CSV, TSV, JSONL, Parquet or text file (.csv .tsv .jsonl .json .parquet .txt)"
LONGEST_LINE = 16 * 2**20  # bytes; a line is read as a whole, so this bounds memory
BATCH = 1000  # records read at a time
_BETWEEN = re.compile(r"[\s,]*")


class Located(NamedTuple):
    """A record, and where a user finds it: its number counts from 1 in the file."""

    file: Path | None
    number: int
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """What a flag names: its kind ("CSV" ... "text", "hub", "demo") and the files that hold it, in order."""

    flag: str
    typed: str
    kind: str
    files: tuple[Path, ...] = ()
    dataset: Any = None

    def place(self, file: Path | None, number: int) -> str:
        """Where a record stands, as a user would look it up."""
        if self.kind in ("hub", "demo"):
            return f"{self.typed}, row {number}"
        if self.kind == "text" or (self.kind == "JSON" and file and not is_list(file)):
            return f"{file}, line {number}"
        if self.kind in ("CSV", "TSV") and file and (line := _csv_line(file, self.kind, number)):
            return f"{file}, row {number} (line {line})"
        return f"{file}, row {number}"


def find(typed: str, flag: str = "--data") -> Source:
    """The source that a flag names. Local files first; UserError where there is nothing, or more than one kind."""
    if typed == DEMO_DATA:
        return Source(flag, typed, "demo")
    path = Path(typed).expanduser()
    if path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return _of_files(flag, typed, sorted(p for p in inside if p.is_file()), f"{flag} {typed}: the folder")
    if path.exists():
        if path.suffix.lower() not in KINDS:
            raise UserError(f"{flag} {typed}: the ending {path.suffix!r} is not known; expected {ACCEPTED}")
        return _of_files(flag, typed, [path], f"{flag} {typed}: it")
    if glob.has_magic(typed):
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"{flag} {typed}: no file matches; expected a pattern that matches {ACCEPTED}")
        return _of_files(flag, typed, [p for p in matches if p.is_file()], f"{flag} {typed}: the pattern")
    if path.suffix.lower() in KINDS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", typed):
        raise UserError(
            f"{flag} {typed}: no such file or folder; expected {ACCEPTED}, a folder or glob of them, or a hub id"
        )
    dataset, copies = hf_hub.data_set(flag, typed)
    return Source(flag, typed, "hub", copies, dataset)


def _of_files(flag: str, typed: str, files: Sequence[Path], what: str) -> Source:
    known = [(KINDS[file.suffix.lower()], file) for file in files if file.suffix.lower() in KINDS]
    if not known:
        raise UserError(f"{what} holds no data file; expected {ACCEPTED}")
    first = dict(reversed(known))  # kind -> its first file
    if len(first) > 1:
        named = ", ".join(f"{kind} ({first[kind].name})" for kind in sorted(first))
        raise UserError(f"{what} holds several kinds of data: {named}; give files of one kind, for instance by a glob")
    for _, file in known:
        try:
            with open(file, "rb") as opened:
                empty = not opened.read(1)
        except OSError as problem:
            raise UserError(f"{flag} {file}: cannot be read ({problem.strerror}); check its permissions") from None
        if empty:
            raise UserError(f"{flag} {file}: the file is empty; expected at least one record")
    return Source(flag, typed, known[0][0], tuple(file for _, file in known))


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
        if is_list(file):
            for located in _json_list(source, file):
                return tuple(located.record)
            raise UserError(f"{source.flag} {file}: the list is empty; expected at least one record")
        with open(file, encoding="utf-8-sig", errors="replace") as opened:
            for number, line in enumerate(iter(lambda: opened.readline(LONGEST_LINE), ""), start=1):
                if line.strip():
                    return tuple(_json_object(source, file, number, line))
        raise UserError(f"{source.flag} {file}: holds no record; expected one JSON object a line")
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
        header = next((row for row in csv.reader(opened, delimiter=delimiter(source.kind)) if row), [])
    names = tuple(name or f"column {place}" for place, name in enumerate(header, start=1))
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{source.flag} {file}, line 1: the header names column {twice[0]!r} twice; rename one")
    return names


def delimiter(kind: str) -> str:
    """What separates the fields of a CSV or TSV file."""
    return "\t" if kind == "TSV" else ","


def records(source: Source, wanted: Sequence[str] | None = None, *, cache: Path | None = None) -> Iterator[Located]:
    """Every record in order, a bounded number in memory; `wanted` columns only, where the format lets us choose."""
    if source.kind == "demo":
        for number, event in enumerate(demo.events(demo.DEMO_RECORDS, demo.DEMO_SEED), start=1):
            yield Located(None, number, event)
    elif source.kind == "hub":
        chosen = source.dataset.select_columns(list(wanted)) if wanted else source.dataset
        yield from _rows(source, None, chosen)
    else:
        for file in source.files:
            yield from _file_records(source, file, wanted, cache)


def _file_records(source: Source, file: Path, wanted: Sequence[str] | None, cache: Path | None) -> Iterator[Located]:
    if source.kind == "JSON" and is_list(file):
        yield from _json_list(source, file)
    elif source.kind == "JSON":
        # read as lines, because inferred types would turn dates into timestamps and differ from file to file
        for _, number, row in _rows(source, file, hf_readers.stream(file, "text", cache, encoding="utf-8-sig")):
            if row["text"].strip():
                yield Located(file, number, _json_object(source, file, number, row["text"]))
    elif source.kind == "text":
        yield from _rows(source, file, hf_readers.stream(file, "text", cache, encoding="utf-8-sig"))
    elif source.kind == "Parquet":
        names = [name for name in file_columns(source, file) if wanted is None or name in wanted]
        yield from _rows(source, file, hf_readers.stream(file, "parquet", cache, columns=names))
    else:
        names = list(file_columns(source, file))
        for _, number, row in _rows(source, file, hf_readers.stream_csv(file, names, delimiter(source.kind), cache)):
            yield Located(file, number, {name: value or None for name, value in row.items()})


def _rows(source: Source, file: Path | None, dataset: Any) -> Iterator[Located]:
    """The rows of a data set, numbered from 1; what its reader cannot read becomes one line."""
    number = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=BATCH):
            for record in table.to_pylist():
                number += 1
                yield Located(file, number, record)
    except (
        ValueError,
        OSError,
        TypeError,
        NotImplementedError,
    ) as problem:  # Arrow's and pandas' errors are ValueErrors
        first = str(problem).strip().splitlines()[0][:160] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"{source.flag} {file or source.typed}, after row {number}: cannot be read as {source.kind} ({first}); "
            "mend the file, or give it in another format"
        ) from problem


def open_parquet(source: Source, file: Path) -> Any:
    """The Parquet file, of which only the footer is read; UserError where it is not whole."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (ValueError, OSError) as problem:
        first = str(problem).splitlines()[0][:160]
        raise UserError(f"{source.flag} {file}: not a whole Parquet file ({first}); write it again") from None


def is_list(file: Path) -> bool:
    """Whether a JSON file is one list rather than one object a line."""
    with open(file, "rb") as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _json_object(source: Source, file: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{source.flag} {file}, line {number}"
    try:
        value = json.loads(line)
    except json.JSONDecodeError as problem:
        raise UserError(
            f"{where}, character {problem.pos + 1}: not JSON ({problem.msg}); expected one object a line"
        ) from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply; expected one flat object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: holds a {type(value).__name__}; expected one JSON object a line")
    return value


def _json_list(source: Source, file: Path) -> Iterator[Located]:
    """The objects of a file that is one JSON list, decoded one at a time so that the file need not fit in memory."""
    decoder, number = json.JSONDecoder(), 0
    with open(file, encoding="utf-8-sig", errors="replace") as opened:
        text = opened.read(2**20)
        at = text.index("[") + 1
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it also matches nothing
            problem = "the list is not closed"
            if text.startswith("]", at):
                return
            if text.startswith("{", at):
                try:
                    value, at = decoder.raw_decode(text, at)
                    number += 1
                    yield Located(file, number, value)
                    continue
                except json.JSONDecodeError as broken:
                    problem = broken.msg
            elif at < len(text):
                raise UserError(f"{source.flag} {file}, row {number + 1}: not an object; expected a list of objects")
            more = opened.read(max(2**20, len(text) - at)) if len(text) - at < LONGEST_LINE else ""
            if not more:
                raise UserError(
                    f"{source.flag} {file}, row {number + 1}: not JSON ({problem}); expected a list of objects"
                )
            text, at = text[at:] + more, 0


def _csv_line(file: Path, kind: str, number: int) -> int | None:
    """The line at which row `number` of a CSV file begins; None where it cannot be told any more."""
    with contextlib.suppress(OSError, ValueError, csv.Error), open(file, encoding="utf-8-sig", newline="") as opened:
        reader, row, begins = csv.reader(opened, delimiter=delimiter(kind)), -1, 1
        for cells in reader:
            row += bool(cells)
            if row == number:
                return begins
            begins = reader.line_num + 1
    return None
