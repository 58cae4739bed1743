"""What `--data` and `--val-data` name: files, folders with splits, saved data sets, data sets of the hub, the demo."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.choices import DEMO_DATA, DEMO_MODEL
from trainer.config.errors import UserError
from trainer.data import hf_hub, hf_readers

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
#: The embedded events, and text that the embedded base was not trained on.
DEMO_FILES = {
    DEMO_DATA: Path(__file__).parent / "demo" / "acled-demo.csv",
    DEMO_MODEL: Path(__file__).parent / "demo" / "retained.jsonl",
}
COMPRESSIONS = (".gz", ".zst")  # of the kinds that are text
ACCEPTED_FILES = (
    "a CSV, TSV, JSONL, Parquet, Arrow or text file "
    "(.csv .tsv .jsonl .json .parquet .arrow .txt; text also .gz or .zst)"
)
HUB_ID = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::([\w.+-]+))?")  # NAMESPACE/NAME or NAME, and :CONFIGURATION
SPLIT_BY_WORD = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}  # the words that the hub's layout knows
#: The splits that a flag takes, the first that is there; "" stands for files that name none.
SPLITS_BY_FLAG = {
    "--data": ("train", ""),
    "--val-data": ("validation", "", "test", "train"),
    "--test-data": ("test", "", "validation", "train"),
    "--retain-data": ("test", "", "validation", "train"),
}


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


def find_sources(
    data: str, val_data: str | None, test_data: str | None, retain_data: str | None = None
) -> list[Source]:
    """The training source, where they are named or stand beside it those of validation and test, and that to retain.

    Files and splits are taken for what they are named: nothing named test is trained on. UserError where there is no
    data, or more than one kind.
    """
    splits = _find_splits(data, "--data")
    first_name, train = _choose_split(splits, data, "--data")
    split_sources, taken = [train], {first_name: "training"}
    for split, name, purpose, flag, spec in (
        ("val", "validation", "validation", "--val-data", val_data),
        ("test", "test", "the test", "--test-data", test_data),
    ):
        if spec is not None:
            split_sources.append(replace(_choose_split(_find_splits(spec, flag), spec, flag)[1], split=split))
        elif name in splits:
            split_sources.append(replace(splits[name], split=split))
            taken[name] = purpose
    notices = []
    if set(splits) != {""}:
        notices.append(f"{data}: " + ", ".join(f"{_what(splits[name], name)} for {taken[name]}" for name in taken))
    notices += [
        f"{data}: {_what(source, name)} left out: named for {name or 'no split'}"
        for name, source in splits.items()
        if name not in taken
    ]
    if retain_data is not None:
        split_sources.append(replace(find(retain_data, "--retain-data"), split="retain"))
    return [replace(train, notices=tuple(notices)), *split_sources[1:]]


def _what(source: Source, name: str) -> str:
    """The files of a split, or the split of a data set."""
    if source.dataset is not None:
        return f"split {name}"
    root = Path(source.spec).expanduser()
    names = [str(file.relative_to(root) if root.is_dir() else file) for file in source.files[:3]]
    return ", ".join(names) + (" (and more)" if len(source.files) > 3 else "")


def find(spec: str, flag: str = "--data") -> Source:
    """The source that one flag names by itself."""
    return _choose_split(_find_splits(spec, flag), spec, flag)[1]


def _choose_split(splits: Mapping[str, Source], spec: str, flag: str) -> tuple[str, Source]:
    """(the name of the split that a flag takes, its source)."""
    for name in SPLITS_BY_FLAG[flag]:
        if name in splits:
            return name, splits[name]
    raise UserError(
        f"{flag} {spec}: holds no split `train`, only {', '.join(sorted(splits))}; name the file itself to train on it"
    )


def _find_splits(spec: str, flag: str) -> dict[str, Source]:
    """{split: its source}; "" for what is named for none."""
    if spec == DEMO_DATA or (spec == DEMO_MODEL and flag == "--retain-data"):
        file = DEMO_FILES[spec]
        return {"": Source(flag=flag, spec=spec, kind=KIND_BY_SUFFIX[file.suffix], files=(file,))}
    path = Path(spec).expanduser()
    if path.is_dir():
        if hf_readers.is_saved_dataset(path):
            return _dataset_splits(hf_readers.load_saved_dataset(path, flag), spec, flag, "saved")
        visible_files = (
            p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)
        )
        return _file_splits(flag, spec, sorted(p for p in visible_files if p.is_file()), "folder", path)
    if path.exists():
        if not path.is_file():
            raise UserError(f"{flag} {spec}: not a regular file (a pipe or a device); write it to a file first")
        if file_kind(path) is None:
            raise UserError(f"{flag} {spec}: the ending {path.suffix!r} is not known; expected {ACCEPTED_FILES}")
        return {"": _source_from_files(flag, spec, [path], f"{flag} {spec}: it")}
    if glob.has_magic(spec):
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"{flag} {spec}: no file matches; expected a pattern that matches {ACCEPTED_FILES}")
        files = [p for p in matches if p.is_file()]
        root = Path(os.path.commonpath([p.parent for p in files])) if files else path
        return _file_splits(flag, spec, files, "pattern", root)
    hub_id = HUB_ID.fullmatch(spec)
    if file_kind(path) is not None or hub_id is None:
        raise UserError(
            f"{flag} {spec}: no such file or folder; expected {ACCEPTED_FILES}, a folder or glob of them, or a hub id"
        )
    return _dataset_splits(hf_hub.load_hub_dataset(flag, *hub_id.groups()), spec, flag, "hub")


def file_kind(file: Path) -> str | None:
    """The kind of a file by its ending, None where it is not known; only text may be compressed."""
    if file.suffix.lower() in COMPRESSIONS:
        kind = KIND_BY_SUFFIX.get(file.with_suffix("").suffix.lower())
        return None if kind in ("Parquet", "Arrow") else kind
    return KIND_BY_SUFFIX.get(file.suffix.lower())


def _dataset_splits(datasets: Mapping[str, Any], spec: str, flag: str, kind: str) -> dict[str, Source]:
    splits = {}
    for name, dataset in datasets.items():
        if not len(dataset):
            raise UserError(f"{flag} {spec}: the split {name!r} is empty; expected at least one record")
        files = tuple(sorted({Path(cache_file["filename"]) for cache_file in dataset.cache_files}))
        split = SPLIT_BY_WORD.get(name, name)
        splits[split] = Source(flag=flag, spec=spec, kind=kind, files=files, dataset=dataset)
    return splits


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


def _file_splits(flag: str, spec: str, files: Sequence[Path], noun: str, root: Path) -> dict[str, Source]:
    description = f"{flag} {spec}: the {noun}"
    data_files = [file for file in files if file_kind(file)]
    if not data_files:
        raise UserError(f"{description} holds no data file; expected {ACCEPTED_FILES}")
    by_split: dict[str, list[Path]] = {}
    for file in data_files:
        by_split.setdefault(split_of(file, root), []).append(file)
    return {name: _source_from_files(flag, spec, group, description) for name, group in by_split.items()}


def _source_from_files(flag: str, spec: str, files: Sequence[Path], description: str) -> Source:
    first_files = {file_kind(file): file for file in reversed(files)}  # kind -> its first file
    if len(first_files) > 1:
        kind_list = ", ".join(f"{kind} ({file.name})" for kind, file in sorted(first_files.items(), key=str))
        raise UserError(
            f"{description} holds several kinds of data: {kind_list}; give files of one kind, for instance by a glob"
        )
    for file in files:
        try:
            with open(file, "rb") as stream:
                is_empty = not stream.read(1)
        except OSError as error:
            raise UserError(f"{flag} {file}: cannot be read ({error.strerror}); check its permissions") from None
        if is_empty:
            raise UserError(f"{flag} {file}: the file is empty; expected at least one record")
    return Source(flag=flag, spec=spec, kind=str(file_kind(files[0])), files=tuple(files))
