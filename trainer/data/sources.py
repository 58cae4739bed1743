"""What `--data` and its relatives name (files, folders, data sets of the hub or saved ones, the demo) -> records.

What cannot be read is one line with the flag, the file and the place in it.
"""

import codecs
import glob
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.choices import DEMO_DATA, DEMO_MODEL
from trainer.config.errors import UserError, first_line
from trainer.data import hf_hub, readers

#: The embedded events, and text that the embedded base was not trained on.
DEMO_FILES = {
    DEMO_DATA: Path(__file__).parent / "demo" / "acled-demo.csv",
    DEMO_MODEL: Path(__file__).parent / "demo" / "retained.jsonl",
}
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
COMPRESSIONS = (".gz", ".zst")  # of the kinds that are text
ACCEPTED_FILES = (
    "a CSV, TSV, JSONL, Parquet, Arrow or text file "
    "(.csv .tsv .jsonl .json .parquet .arrow .txt; text also .gz or .zst)"
)
HUB_ID = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::([\w.+-]+))?")  # NAMESPACE/NAME or NAME, and :CONFIGURATION
#: The words that the hub's layout knows.
SPLIT_BY_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
#: The splits that a flag takes, the first that is there; "" stands for files that name none.
SPLITS_BY_FLAG = {
    "--data": ("train", ""),
    "--val-data": ("validation", "", "test", "train"),
    "--test-data": ("test", "", "validation", "train"),
    "--retain-data": ("test", "", "validation", "train"),
}
BATCH_RECORDS = 1000  # records of an Arrow table that are in memory at a time
READ_ERRORS = (ValueError, OSError, EOFError, TypeError, NotImplementedError, zlib.error)  # Arrow's are ValueErrors


class SourcedRecord(NamedTuple):
    """A record, and where a user finds it: its file, and in it `line 3` or `row 2 (line 3)`, both from 1."""

    file: Path | None
    place: str
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Records of one split: their kind ("CSV" ... "text", "hub", "saved") and the files that hold them."""

    flag: str
    spec: str
    kind: str
    files: tuple[Path, ...] = ()
    dataset: Any = None  #: of `datasets`, for the hub's and saved ones
    split: str = "train"  #: "train", "val", "test" or "retain"
    notices: tuple[str, ...] = ()  #: which files became what, and what was left out

    def locate(self, file: Path | None, place: str) -> str:
        """Where a record stands, as a user would look it up."""
        return f"{self.spec if file in DEMO_FILES.values() else file or self.spec}, {place}"


# --- from a flag to sources ---


def find_sources(
    data: str, val_data: str | None, test_data: str | None, retain_data: str | None = None
) -> list[Source]:
    """The training source, where they are named or stand beside it those of validation and test, and that to retain.

    Files and splits are taken for what they are named: nothing named test is trained on. UserError where there is no
    data, or more than one kind.
    """
    splits = _find_splits(data, "--data")
    train = _choose(splits, data, "--data")
    found, uses = [], {next(name for name in SPLITS_BY_FLAG["--data"] if name in splits): "training"}
    for split, name, flag, spec in (
        ("val", "validation", "--val-data", val_data),
        ("test", "test", "--test-data", test_data),
        ("retain", None, "--retain-data", retain_data),
    ):
        if spec is not None:
            found.append(replace(find(spec, flag), split=split))
        elif name in splits:
            found.append(replace(splits[name], split=split))
            uses[name] = "the test" if name == "test" else name
    notices = []
    if set(splits) != {""}:
        notices.append(f"{data}: " + ", ".join(f"{_describe(splits[name], name)} for {uses[name]}" for name in uses))
    notices += [
        f"{data}: {_describe(source, name)} left out: named for {name or 'no split'}"
        for name, source in splits.items()
        if name not in uses
    ]
    return [replace(train, notices=tuple(notices)), *found]


def find(spec: str, flag: str = "--data") -> Source:
    """The source that one flag names by itself."""
    return _choose(_find_splits(spec, flag), spec, flag)


def _choose(splits: Mapping[str, Source], spec: str, flag: str) -> Source:
    name = next((name for name in SPLITS_BY_FLAG[flag] if name in splits), None)
    if name is None:
        raise UserError(
            f"{flag} {spec}: holds no split `train`, only {', '.join(sorted(splits))}; name the file itself to train "
            "on it"
        )
    return splits[name]


def _describe(source: Source, split: str) -> str:
    if source.dataset is not None:
        return f"split {split}"
    root = Path(source.spec).expanduser()
    names = [str(file.relative_to(root) if root.is_dir() else file) for file in source.files[:3]]
    return ", ".join(names) + (" (and more)" if len(source.files) > 3 else "")


def _find_splits(spec: str, flag: str) -> dict[str, Source]:
    """{split: its source}; "" for what is named for none."""
    path = Path(spec).expanduser()
    if spec == DEMO_DATA or (spec == DEMO_MODEL and flag == "--retain-data"):
        return _split_files(flag, spec, [DEMO_FILES[spec]], "file", DEMO_FILES[spec])
    if path.is_dir():
        if hf_hub.is_saved_dataset(path):
            return _split_dataset(hf_hub.load_saved_dataset(path, flag), spec, flag, "saved")
        files = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return _split_files(flag, spec, sorted(p for p in files if p.is_file()), "folder", path)
    if path.exists():
        if not path.is_file():
            raise UserError(f"{flag} {spec}: not a regular file (a pipe or a device); write it to a file first")
        if file_kind(path) is None:
            raise UserError(f"{flag} {spec}: the ending {path.suffix!r} is not known; expected {ACCEPTED_FILES}")
        return _split_files(flag, spec, [path], "file", path)
    if glob.has_magic(spec):
        matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        root = Path(os.path.commonpath([p.parent for p in matches])) if matches else path
        return _split_files(flag, spec, matches, "pattern", root)
    hub_id = HUB_ID.fullmatch(spec)
    if file_kind(path) is not None or hub_id is None:
        raise UserError(
            f"{flag} {spec}: no such file or folder; expected {ACCEPTED_FILES}, a folder or glob of them, or a hub id"
        )
    return _split_dataset(hf_hub.load_hub_dataset(flag, *hub_id.groups()), spec, flag, "hub")


def file_kind(file: Path) -> str | None:
    """The kind of a file by its ending, None where it is not known; only text may be compressed."""
    if file.suffix.lower() in COMPRESSIONS:
        kind = KIND_BY_SUFFIX.get(file.with_suffix("").suffix.lower())
        return None if kind in ("Parquet", "Arrow") else kind
    return KIND_BY_SUFFIX.get(file.suffix.lower())


def split_of(file: Path, root: Path) -> str:
    """The split that a file's name, or a folder between `root` and it, stands for; "" where none does.

    A name with words of several splits (`train_test.csv`) stands for the one that is not trained on.
    """
    relative = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
    for part in reversed(relative.parts):
        splits = {SPLIT_BY_WORD[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_BY_WORD}
        if splits:
            return next(name for name in ("test", "validation", "train") if name in splits)
    return ""


def _split_dataset(datasets: Mapping[str, Any], spec: str, flag: str, kind: str) -> dict[str, Source]:
    splits = {}
    for name, dataset in datasets.items():
        if not len(dataset):
            raise UserError(f"{flag} {spec}: the split {name!r} is empty; expected at least one record")
        files = tuple(sorted({Path(cache_file["filename"]) for cache_file in dataset.cache_files}))
        split = SPLIT_BY_WORD.get(name, name)
        splits[split] = Source(flag=flag, spec=spec, kind=kind, files=files, dataset=dataset)
    return splits


def _split_files(flag: str, spec: str, files: Sequence[Path], noun: str, root: Path) -> dict[str, Source]:
    by_split: dict[str, list[Path]] = {}
    for file in files:
        if file_kind(file):
            by_split.setdefault(split_of(file, root), []).append(file)
    if not by_split:
        raise UserError(f"{flag} {spec}: the {noun} holds no data file; expected {ACCEPTED_FILES}")
    splits = {}
    for split, group in by_split.items():
        first_files = {file_kind(file): file for file in reversed(group)}  # kind -> its first file
        if len(first_files) > 1:
            kind_list = ", ".join(f"{kind} ({file.name})" for kind, file in sorted(first_files.items(), key=str))
            raise UserError(
                f"{flag} {spec}: the {noun} holds several kinds of data: {kind_list}; give files of one kind, for "
                "instance by a glob"
            )
        splits[split] = Source(flag=flag, spec=spec, kind=str(file_kind(group[0])), files=tuple(group))
    return splits


# --- from a source to records ---


def columns(source: Source, file: Path | None = None) -> tuple[str, ...]:
    """The columns of a file of the source, by default the first, read from its beginning.

    UserError where it holds no record, or a name twice.
    """
    if source.dataset is not None:
        return tuple(source.dataset.column_names)
    file = file or source.files[0]
    try:
        names, placed_records = _open_table(source, file)
        if next(placed_records, None) is None:
            raise UserError(f"{source.flag} {file}: holds no record; expected at least one")
        return tuple(names)
    except READ_ERRORS as error:
        raise read_error(source, file, "the beginning", error) from None


def records(source: Source, column_names: Sequence[str] | None = None) -> Iterator[SourcedRecord]:
    """Every record in order, a bounded number in memory; `column_names` only, where the kind lets us choose."""
    for file in source.files if source.dataset is None else (None,):
        place = "the beginning"
        try:
            for place, record in _open_table(source, file, column_names)[1]:
                yield SourcedRecord(file, place, record)
                place = f"after {place}"
        except READ_ERRORS as error:
            raise read_error(source, file, place, error) from error


def _open_table(source: Source, file: Path | None, wanted: Sequence[str] | None = None) -> readers.Table:
    where = f"{source.flag} {file}"
    if file is None:
        dataset = source.dataset.select_columns(list(wanted)) if wanted else source.dataset
        batches = dataset.with_format("arrow").iter(batch_size=BATCH_RECORDS)
        names, placed_records = dataset.column_names, _iter_batches(batches)
    elif source.kind in ("Parquet", "Arrow"):
        names, placed_records = _open_arrow(file, source.kind, wanted)
    elif source.kind == "JSON":
        names, placed_records = readers.read_json(file, where)
    elif source.kind == "text":
        names, placed_records = ["text"], readers.read_text(file, where)
    else:
        names, placed_records = readers.read_csv(file, source.kind, where)
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: names column {duplicates[0]!r} twice; rename one")
    return names, placed_records


def read_error(source: Source, file: Path | None, place: str, error: Exception) -> UserError:
    """What a library says of a file that it cannot read, as one line with the remedy."""
    where, reason = f"{source.flag} {file or source.spec}", first_line(error)
    if isinstance(error, UnicodeDecodeError) and file is not None and source.kind not in ("Parquet", "Arrow"):
        line, byte = _find_bad_byte(file)
        return UserError(f"{where}, line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8")
    if isinstance(error, PermissionError):
        return UserError(f"{where}: cannot be read ({error.strerror}); check its permissions")
    if file is not None and (file.suffix.lower() in COMPRESSIONS or source.kind in ("Parquet", "Arrow")):
        kind = file.suffix if file.suffix.lower() in COMPRESSIONS else source.kind
        return UserError(f"{where}: not a whole {kind} file ({reason}); write it again")
    return UserError(
        f"{where}, {place}: cannot be read as {source.kind} ({reason}); correct the file, or give it in another format"
    )


def _find_bad_byte(file: Path) -> tuple[int, int]:
    """(the line of the first byte that is not UTF-8, that byte)."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with readers.open_bytes(file) as stream:
        while True:
            chunk = stream.readline(readers.CHUNK_SIZE)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return line, error.object[error.start]
            if not chunk:  # the file was changed since
                return line, 0
            line += chunk.endswith(b"\n")


def _open_arrow(file: Path, kind: str, wanted: Sequence[str] | None) -> readers.Table:
    import pyarrow.ipc
    import pyarrow.parquet

    if kind == "Parquet":
        parquet_file = pyarrow.parquet.ParquetFile(file)
        names = parquet_file.schema_arrow.names
        selected = [name for name in names if wanted is None or name in wanted]
        return names, _iter_batches(parquet_file.iter_batches(BATCH_RECORDS, columns=selected))
    try:  # Arrow's file format, which Feather is, or a stream, which `datasets` writes
        reader = pyarrow.ipc.open_file(pyarrow.OSFile(str(file)))
        batches = map(reader.get_batch, range(reader.num_record_batches))
    except pyarrow.ArrowInvalid:
        batches = reader = pyarrow.ipc.open_stream(pyarrow.OSFile(str(file)))
    names = reader.schema.names
    selected = [name for name in names if wanted is None or name in wanted]
    return names, _iter_batches(batch.select(selected) for batch in batches)


def _iter_batches(batches: Iterable[Any]) -> Iterator[readers.PlacedRecord]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_RECORDS):
            for record in batch.slice(start, BATCH_RECORDS).to_pylist():
                number += 1
                yield f"row {number}", record
