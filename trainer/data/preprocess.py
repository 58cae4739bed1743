"""Two readings of the records: one that checks and counts, one that tokenises and writes the rows."""

import hashlib
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.config.choices import MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import formats, sources, tokenizer
from trainer.data.acled import column_names, format_date
from trainer.data.formats import RecordError, RecordFormat
from trainer.data.packing import Packer
from trainer.data.row_info import RowInfo, block_ids, content_hash, count_target_bytes, hash_text, write_row_info
from trainer.data.sources import Source
from trainer.data.token_dataset import SPLITS, load_token_dataset
from trainer.data.validate_files import FileFingerprint, find_change

LogFn = Callable[[str], None]
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 2**19  # what is tokenised at a time
MAX_SAMPLE_CHARACTERS = 4000  # length of a validation pair that is kept for samples
LOG_INTERVAL_SECONDS = 5.0
MAX_SHARED_FRACTION = 0.05  # of validation and test records that may equal training records, where there is a test


class Example(NamedTuple):
    """One record as text, or as ids where it came as ids; file and record_number say where it stands."""

    file: Path | None
    record_number: int
    prompt: str
    completion: str
    ids: list[int] | None = None
    group: str | None = None  #: what stays in one split and is one unit of an interval


@dataclass
class DataInput:
    """One source with the form of its records, and what the first reading of it counted."""

    source: Source
    record_format: RecordFormat
    file_fingerprints: tuple[FileFingerprint, ...] = ()
    num_records: int = 0
    num_blank: int = 0
    max_token_id: int = 0
    num_unknown_dates: int = 0
    first_unknown_date: str = ""
    is_counted: bool = False  # the second reading counts nothing again
    split_sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))


def split_of(key: str | bytes, val_fraction: float, test_fraction: float = 0.0) -> str:
    """Which split a record belongs to: by its own content alone, whatever stands beside it.

    Validation is the lower end of the hashes and the test the upper one, so neither moves where the other grows.
    """
    share = content_hash(key) / 2**64
    return "val" if share < val_fraction else "test" if share >= 1 - test_fraction else "train"


@dataclass
class Preprocessor:
    """Reads everything twice: once to check and count, once to tokenise and write."""

    settings: DataSettings
    inputs: list[DataInput]
    tokenizer: Any
    tokenizer_hash: str | None
    log: LogFn
    cache_root: Path
    shared_hashes: set[int] = field(default_factory=set)  # of records of val and test that equal a training record
    num_shared: dict[str, int] = field(default_factory=dict)  # records of a split that equal a training record
    rows: dict[str, list[tuple[str, str | None, bool]]] = field(default_factory=lambda: {"val": [], "test": []})
    first_too_long: dict[str, str] = field(default_factory=dict)
    val_texts: list[tuple[str, str]] = field(default_factory=list)

    def write_dataset(self, folder: Path) -> dict[str, Any]:
        """Write the rows of both splits into `folder` and return what facts.json holds of them.

        A record is assigned to its split by its own content; --val-data is a split of its own.
        """
        self._check_records()
        vocab_size = (
            len(self.tokenizer)
            if self.tokenizer is not None
            else 1 + max(data_input.max_token_id for data_input in self.inputs)
        )
        dtype = "<u2" if vocab_size <= 65_536 else "<u4"
        packer_options = {"objective": self.settings.objective, "block_size": self.settings.block_size, "dtype": dtype}
        packers = {split: Packer(folder, split, **packer_options) for split in SPLITS}  # type: ignore[arg-type]
        for data_input in self.inputs:
            self._tokenize(data_input, packers)
        for data_input in self.inputs:
            if change_error := find_change(data_input.source, data_input.file_fingerprints):
                raise change_error
        fingerprints = {split: packer.close() for split, packer in packers.items()}
        row_infos = {split: self._row_info(folder, split, packers, dtype) for split in ("val", "test")}
        for split, row_info in row_infos.items():
            write_row_info(folder, split, row_info)
        metadata = {
            "source": self.settings.data,
            "form": self.inputs[0].record_format.name,
            "fingerprint": _combine_fingerprints(fingerprints, packers),
            "train_fingerprint": fingerprints["train"],
            "val_fingerprint": fingerprints["val"],
            "test_fingerprint": fingerprints["test"] if packers["test"].num_records else None,
            "split": "given" if self.settings.val_data is not None else f"hash {self.settings.val_fraction:g}",
            "split_by": self.settings.split_by,
            "equal_to_train": {split: self.num_shared.get(split, 0) for split in ("val", "test")},
            "tokenizer": self.tokenizer_hash,
            "vocabulary": vocab_size,
            "objective": self.settings.objective,
            "block_size": self.settings.block_size,
            "train": packers["train"].counts(),
            **{
                split: packers[split].counts() | {"target_bytes": sum(row_info.num_bytes)}
                for split, row_info in row_infos.items()
            },
            "notices": self._notices(packers),
        }
        pad_id = self.tokenizer.eos_token_id if self.tokenizer is not None else 0
        return {"dtype": dtype, "pad_id": pad_id, "val_texts": self.val_texts, "facts": metadata}

    def _check_records(self) -> None:
        """Render every record once: a mistake in the last row is found before the first one is tokenised."""
        hashes = {split: array("Q") for split in SPLITS}
        for data_input in self.inputs:
            for example in self._iter_examples(data_input):
                if example is None:
                    data_input.num_blank += 1
                    continue
                data_input.num_records += 1
                split = self._split(data_input, example)
                data_input.split_sizes[split] += 1
                if example.ids is not None:
                    data_input.max_token_id = max(data_input.max_token_id, *example.ids)
                hashes[split].append(content_hash(_content(example)))
            data_input.is_counted = True
            if not data_input.num_records:
                raise UserError(
                    f"{data_input.source.flag} {data_input.source.spec}: holds blank lines only; "
                    "expected at least one record"
                )
        self._check_split_sizes()
        self._check_shared({split: np.frombuffer(values, dtype=np.uint64) for split, values in hashes.items()})

    def _check_shared(self, hashes: dict[str, NDArray[np.uint64]]) -> None:
        """Count records of validation and test that equal a training record; where there is a test, refuse many."""
        for split in ("val", "test"):
            is_shared = np.isin(hashes[split], hashes["train"])
            self.num_shared[split] = int(is_shared.sum())
            self.shared_hashes |= set(hashes[split][is_shared].tolist())
            num_records, has_test = len(hashes[split]), len(hashes["test"]) > 0
            if has_test and self.num_shared[split] > MAX_SHARED_FRACTION * num_records:
                name = {"val": "validation", "test": "test"}[split]
                raise UserError(
                    f"--data {self.settings.data}: {self.num_shared[split]} of {num_records} {name} records also stand "
                    f"in the training data; expected at most {MAX_SHARED_FRACTION:.0%}, or a test says nothing of new "
                    "records: take them out, or split by a column that they share (--split-by)"
                )

    def _check_split_sizes(self) -> None:
        """What is certain before tokenising: an empty split, for records; more is known when they are packed."""
        settings, sizes = self.settings, self.inputs[0].split_sizes
        fractions = {"val": settings.val_fraction * (settings.val_data is None), "test": settings.test_fraction}
        wanted_splits = ["train", *(split for split, fraction in fractions.items() if fraction)]
        empty_split = next((split for split in wanted_splits if not sizes[split]), None)
        if len(wanted_splits) == 1 or empty_split is None:
            return
        if empty_split == "train":
            flag, remedy = next(split for split in wanted_splits[1:]), "lower"
        else:
            flag, remedy = empty_split, "raise"
        name = {"train": "training", "val": "validation", "test": "the test"}[empty_split]
        raise UserError(
            f"--data {settings.data}: the split by hash leaves 0 of {self.inputs[0].num_records} records for "
            f"{name} at --{flag}-fraction {fractions[flag]:g}; {remedy} --{flag}-fraction or give --{flag}-data"
        )

    def _iter_examples(self, data_input: DataInput) -> Iterator[Example | None]:
        """The records of a source as text, None for a blank one; UserError names file, row and column."""
        try:
            split_by, columns = self.settings.split_by, data_input.record_format.columns
            if split_by is not None and columns is not None:
                columns = tuple(dict.fromkeys((*columns, split_by)))
            for file, number, record in sources.records(data_input.source, columns, cache=self.cache_root):
                try:
                    group = formats.value_text(record, split_by, "--split-by") if split_by is not None else None
                    if data_input.record_format.name == "input_ids":
                        yield Example(file, number, "", "", formats.parse_token_ids(record), group)
                        continue
                    prompt, completion = data_input.record_format.render(record)
                    if group is None and data_input.record_format.is_keyed_by_prompt:
                        group = prompt
                except RecordError as error:
                    raise UserError(
                        f"{data_input.source.flag} {data_input.source.locate(file, number)}: {error}"
                    ) from None
                if data_input.record_format.name == "acled" and not data_input.is_counted:
                    self._count_unknown_date(data_input, file, number, record)
                yield Example(file, number, prompt, completion, None, group) if completion.strip() else None
        except UserError as error:
            raise (
                find_change(data_input.source, data_input.file_fingerprints) or error
            ) from None  # a changed file is the cause

    def _count_unknown_date(self, data_input: DataInput, file: Path | None, number: int, record: Any) -> None:
        """Count a date of an ACLED export that is in none of its spellings."""
        column = column_names(tuple(record)).get("event_date", "")
        value = record.get(column)
        if not formats.is_missing(value) and format_date(formats.to_text(value, column).strip()) is None:
            data_input.num_unknown_dates += 1
            data_input.first_unknown_date = (
                data_input.first_unknown_date or f"{data_input.source.locate(file, number)}: {value}"
            )

    def _split(self, data_input: DataInput, example: Example) -> str:
        if data_input.source.flag != "--data":
            return {"--val-data": "val", "--test-data": "test"}[data_input.source.flag]
        val_fraction = self.settings.val_fraction if self.settings.val_data is None else 0.0
        key = example.group if example.group is not None else _content(example, separator="")
        return split_of(key, val_fraction, self.settings.test_fraction)

    def _row_info(self, folder: Path, split: str, packers: dict[str, Packer], dtype: str) -> RowInfo:
        """Who the rows of a split are, read back from what was just written."""
        datasets = {
            name: load_token_dataset(
                folder, name, dtype=dtype, num_rows=packers[name].num_examples, num_tokens=packers[name].num_tokens
            )
            for name in (split, "train")
        }
        rows = self.rows[split]
        if self.settings.objective == "blocks":
            train_ids = set(block_ids(datasets["train"])) if len(datasets[split]) else set()
            rows = [(row_id, None, row_id in train_ids) for row_id in block_ids(datasets[split])]
        return RowInfo(
            ids=[row_id for row_id, _, _ in rows], groups=[group for _, group, _ in rows],
            targets=datasets[split].num_target_tokens().tolist(),
            num_bytes=count_target_bytes(datasets[split], self.tokenizer), in_train=[shared for _, _, shared in rows],
        )  # fmt: skip

    def _tokenize(self, data_input: DataInput, packers: dict[str, Packer]) -> None:
        batch: list[Example] = []
        num_tokenized, num_characters, last_log_seconds = 0, 0, time.monotonic()
        for example in self._iter_examples(data_input):
            if example is None:
                continue
            batch.append(example)
            num_tokenized += 1
            num_characters += len(example.prompt) + len(example.completion) + 4 * len(example.ids or ())
            if len(batch) >= BATCH_RECORDS or num_characters >= BATCH_CHARACTERS:
                self._write_batch(data_input, batch, packers)
                batch, num_characters = [], 0
                if time.monotonic() - last_log_seconds > LOG_INTERVAL_SECONDS:
                    last_log_seconds = time.monotonic()
                    self.log(
                        f"tokenising {data_input.source.spec}: {num_tokenized:,} of {data_input.num_records:,} records"
                    )
        self._write_batch(data_input, batch, packers)

    def _write_batch(self, data_input: DataInput, batch: list[Example], packers: dict[str, Packer]) -> None:
        splits = [self._split(data_input, example) for example in batch]
        for example, split in zip(batch, splits, strict=True):
            is_short_text = (
                example.ids is None and len(example.prompt) + len(example.completion) <= MAX_SAMPLE_CHARACTERS
            )
            if split == "val" and is_short_text and len(self.val_texts) < MAX_NUM_SAMPLES:
                self.val_texts.append((example.prompt, example.completion))
        if self.settings.objective == "completion":
            self._write_rows(data_input, batch, splits, packers)
            return
        if data_input.record_format.name == "input_ids":
            texts = [np.asarray(example.ids, dtype=np.uint32) for example in batch]
        else:
            eos = np.asarray([self.tokenizer.eos_token_id], dtype=np.uint32)
            encoded = tokenizer.encode(self.tokenizer, [example.prompt + example.completion for example in batch])
            texts = [np.concatenate([ids, eos]) for ids in encoded]
        for split, packer in packers.items():
            if split_ids := [ids for ids, example_split in zip(texts, splits, strict=True) if example_split == split]:
                packer.add_texts(split_ids)

    def _write_rows(
        self, data_input: DataInput, batch: list[Example], splits: list[str], packers: dict[str, Packer]
    ) -> None:
        """One record a row; prompt and completion are encoded apart, so that the boundary is exact."""
        eos = np.asarray([self.tokenizer.eos_token_id], dtype=np.uint32)
        prompts = tokenizer.encode(self.tokenizer, [example.prompt for example in batch])
        completions = tokenizer.encode(self.tokenizer, [example.completion for example in batch])
        for example, split, prompt_ids, completion_ids in zip(batch, splits, prompts, completions, strict=True):
            ids = np.concatenate([prompt_ids, completion_ids, eos])
            if packers[split].add_row(ids, len(prompt_ids)):
                if split != "train":
                    row_id = hash_text(_content(example))
                    group = None if example.group is None else hash_text(example.group)
                    self.rows[split].append((row_id, group, int(row_id, 16) in self.shared_hashes))
            else:
                self.first_too_long.setdefault(
                    split, f"{data_input.source.locate(example.file, example.record_number)}, {len(ids)} tokens"
                )

    def _notices(self, packers: dict[str, Packer]) -> list[str]:
        """One line for everything that was left out or that a user should know of the data."""
        lines = []
        for split, packer in packers.items():
            if self.settings.objective == "blocks" and packer.num_dropped:
                lines.append(f"{split}: the last {packer.num_dropped} tokens do not fill a block and are left out")
            elif packer.num_dropped:
                lines.append(
                    f"{split}: {packer.num_dropped} of {packer.num_records} records are longer than --block-size "
                    f"{self.settings.block_size} tokens and are left out (first: {self.first_too_long[split]})"
                )
                if packer.num_dropped == packer.num_records:
                    raise UserError(
                        f"--block-size {self.settings.block_size}: all {packer.num_records} {split} records are longer "
                        f"(first: {self.first_too_long[split]}); raise --block-size"
                    )
        for data_input in self.inputs:
            if data_input.num_blank:
                lines.append(f"{data_input.source.spec}: {data_input.num_blank} blank records are left out")
            if data_input.num_unknown_dates:
                lines.append(
                    f"{data_input.source.spec}: {data_input.num_unknown_dates} dates stand as they were "
                    f"written (first: {data_input.first_unknown_date})"
                )
            if data_input.record_format.name == "input_ids" and "labels" in sources.columns(data_input.source):
                lines.append(f"{data_input.source.spec}: the column `labels` is not used, every token counts")
        for split, name in (("val", "validation"), ("test", "test")):
            if self.num_shared[split]:
                lines.append(
                    f"{self.num_shared[split]} of {packers[split].num_records} {name} records also stand in the "
                    "training data"
                )
        return lines


def _content(example: Example, separator: str = "\0") -> str | bytes:
    """What makes a record equal to another."""
    if example.ids is not None:
        return np.asarray(example.ids, dtype="<u4").tobytes()
    return f"{example.prompt}{separator}{example.completion}"


def _combine_fingerprints(fingerprints: dict[str, str], packers: dict[str, Packer]) -> str:
    """One hash of all rows; without a test split that of training and validation."""
    parts = [fingerprints[split] for split in SPLITS if split != "test" or packers[split].num_records]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
