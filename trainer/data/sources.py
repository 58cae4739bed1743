"""What `--data` and its relatives name (files, folders, data sets of the hub, the demo) -> records."""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config.choices import DEMO_DATA, DEMO_MODEL
from trainer.config.errors import UserError
from trainer.config.files import name_val_sets, split_weights
from trainer.config.settings import DataSettings
from trainer.data import hf_hub
from trainer.data.formats import FORMATS, RecordFormat
from trainer.data.readers import Record, file_kind, read_file

#: The embedded events, and text that the embedded base was not trained on.
DEMO_FILES = {
    DEMO_DATA: Path(__file__).parent / "demo" / "acled-demo.csv",
    DEMO_MODEL: Path(__file__).parent / "demo" / "retained.jsonl",
}
ACCEPTED_FILES = "a CSV, TSV, JSONL, Parquet, Arrow or text file (.csv .tsv .jsonl .json .parquet .arrow .txt)"
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


@dataclass(frozen=True, kw_only=True)
class Source:
    """Records of one split, in files of one kind."""

    flag: str
    spec: str
    files: tuple[Path, ...]
    names_files: bool = True  #: whether its files are known to the user: of the demo and of data sets not
    split: str = "train"  #: "train", "val", "val-NAME", "test" or "retain"
    notices: tuple[str, ...] = ()  #: which files became what, and what was left out
    heartbeat: Callable[[], None] = lambda: None  #: called at each record, as the ranks that wait need to know
    # what `prepare` finds out of it:
    record_format: RecordFormat = FORMATS[-1]
    hashes: tuple[str, ...] = ()  #: of its files
    split_by: str | None = None
    share: float = 1.0  #: of the training examples
    max_records: int = -1  #: that are read, all where it is negative
    fractions: tuple[float, float] = (0.0, 0.0)  #: of validation and test that are split off the training source

    def locate(self, file: Path | None = None) -> str:
        """A file of it, or all of it, as a user would look it up."""
        if file is None or (not self.names_files and len(self.files) == 1):
            return self.spec
        return str(file) if self.names_files else f"{self.spec}, {file.name}"

    def where(self, file: Path | None = None) -> str:
        return f"{self.flag} {self.locate(file)}"

    def records(self, columns: Sequence[str] | None = None) -> Iterator[tuple[str, Record]]:
        """Every record in order, and where a user finds it; of a binary kind with these `columns` only. UserError names
        file and place of what cannot be read."""
        for file in self.files:
            for place, record in read_file(file, self.where(file), columns):
                self.heartbeat()
                yield f"{self.locate(file)}, {place}", record


def find_sources(settings: DataSettings) -> list[Source]:
    """The training sources, and those of the other splits that are named or stand beside them; UserError where there
    is no data. Files are taken for what they are named: nothing named test is trained on."""
    trains, others, given = [], [], name_others(settings)
    for part, share in split_weights(settings.data):
        splits = find_splits(part, "--data")
        train = choose_split(splits, part, "--data")
        uses = {name: "for training" for name, source in splits.items() if source is train}
        for split, name in (("val", "validation"), ("test", "test")):
            if split not in given and name in splits:
                others.append(replace(splits[name], split=split))
                uses[name] = f"for {name}"
        notice = ", ".join(f"{_describe(source, name)} {uses.get(name, 'left out')}" for name, source in splits.items())
        notices = () if set(splits) == {""} else (f"{part}: {notice}",)
        trains.append(replace(train, share=share, notices=notices))
    for split, (flag, spec) in given.items():
        others.append(replace(choose_split(find_splits(spec, flag), spec, flag), split=split))
    return [*trains, *others]


def refuse_missing_files(settings: DataSettings) -> None:
    """UserError for data that are neither here nor a hub id, without a look at the Hub."""
    for part, _ in split_weights(settings.data):
        _parse_hub_id(part, "--data")
    for flag, spec in name_others(settings).values():
        _parse_hub_id(spec, flag)


def name_others(settings: DataSettings) -> dict[str, tuple[str, str]]:
    """{split: flag and value} of what is given beside --data."""
    given = {**name_val_sets(settings.val_data), "test": settings.test_data, "retain": settings.retain_data}
    return {split: (f"--{split.partition('-')[0]}-data", spec) for split, spec in given.items() if spec is not None}


def choose_split(splits: Mapping[str, Source], spec: str, flag: str) -> Source:
    """The split that a flag stands for; UserError where there is none."""
    for name in SPLITS_BY_FLAG[flag]:
        if name in splits:
            return splits[name]
    names_files = all(source.names_files for source in splits.values())
    remedy = "name the file itself to train on it" if names_files else "save one to a file, and pass that"
    raise UserError(f"{flag} {spec}: holds no split `train`, only {', '.join(sorted(splits))}; {remedy}")


def _describe(source: Source, split: str) -> str:
    if not source.names_files:
        return f"split {split}"
    root = Path(source.spec)
    names = [str(file.relative_to(root) if root.is_dir() else file) for file in source.files[:3]]
    return ", ".join(names) + (" (and more)" if len(source.files) > 3 else "")


def find_splits(spec: str, flag: str) -> dict[str, Source]:
    """{split: its source} of what a flag names; "" for what is named for no split."""
    path = Path(spec)
    if spec == DEMO_DATA or (spec == DEMO_MODEL and flag == "--retain-data"):
        return {"": Source(flag=flag, spec=spec, files=(DEMO_FILES[spec],), names_files=False)}
    is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if names := [spec] if is_saved else _parse_hub_id(spec, flag):
        found = hf_hub.find_dataset_files(flag, *names, is_saved=is_saved)
        return {
            SPLIT_BY_WORD.get(name, name): Source(flag=flag, spec=spec, files=tuple(files), names_files=False)
            for name, files in found.items()
        }
    root = path
    if path.is_dir():
        paths = [p for p in path.rglob("*") if not any(n.startswith(".") for n in p.relative_to(path).parts)]
        _refuse_closed_folders([path, *paths], flag)
    elif path.exists():
        if not path.is_file():
            raise UserError(f"{flag} {spec}: not a regular file (a pipe or a device); write it to a file first")
        paths = [path]
    else:
        for n in range(1, len(path.parts) + (path.name == "**")):
            _refuse_closed_folders(map(Path, glob.iglob(str(Path(*path.parts[:n])), recursive=True)), flag)
        paths = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        root = Path(os.path.commonpath([p.parent for p in paths])) if paths else path
    by_split: dict[str, list[Path]] = {}
    for file in sorted(p for p in paths if file_kind(p) and p.is_file()):
        by_split.setdefault(split_of(file, root), []).append(file)
    if not by_split:
        raise UserError(f"{flag} {spec}: no file with a known ending; expected {ACCEPTED_FILES}")
    splits = {}
    for split, group in by_split.items():
        kinds = {str(file_kind(file)): file.name for file in reversed(group)}
        if len(kinds) > 1:
            listed = ", ".join(sorted(f"{kind} ({name})" for kind, name in kinds.items()))
            raise UserError(f"{flag} {spec}: holds several kinds of data: {listed}; name one kind, as by a glob")
        splits[split] = Source(flag=flag, spec=spec, files=tuple(group))
    return splits


def _parse_hub_id(spec: str, flag: str) -> Sequence[str]:
    """A hub id and its configuration; nothing for what is here. UserError for neither."""
    if Path(spec).exists() or glob.has_magic(spec):
        return ()
    hub_id = HUB_ID.fullmatch(spec)
    if hub_id is None or file_kind(Path(spec)) is not None:
        expected = f"{ACCEPTED_FILES}, a folder or glob of them, a hub id, or several with weights: A=0.7 B=0.3"
        raise UserError(f"{flag} {spec}: no such file or folder; expected {expected}")
    return hub_id.groups()


def _refuse_closed_folders(paths: Iterator[Path] | list[Path], flag: str) -> None:
    """UserError for a folder that this user may not look into: glob and rglob leave it out in silence."""
    for path in paths:
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{flag} {path}: permission denied; let this user read the folder, or name its files")


def split_of(file: Path, root: Path) -> str:
    """The split that a file's name, or a folder between `root` and it, stands for; "" where none does. A name with
    words of several (`train_test.csv`) stands for the one that is not trained on."""
    relative = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
    for part in reversed(relative.parts):
        splits = {SPLIT_BY_WORD[word] for word in re.split(r"[^a-z]+", part.lower()) if word in SPLIT_BY_WORD}
        for name in ("test", "validation", "train"):
            if name in splits:
                return name
    return ""
