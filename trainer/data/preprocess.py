"""Two readings of the records: one that checks and counts, one that tokenises and writes the rows."""

import hashlib
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config.choices import MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import formats, sources, tokenizer
from trainer.data.acled import column_names, format_date
from trainer.data.formats import RecordError, RecordFormat
from trainer.data.packing import Packer
from trainer.data.sources import Source
from trainer.data.validate_files import FileFingerprint, find_change

LogFn = Callable[[str], None]
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 2**19  # what is tokenised at a time
MAX_SAMPLE_CHARACTERS = 4000  # length of a validation pair that is kept for samples
LOG_INTERVAL_SECONDS = 5.0


class Example(NamedTuple):
    """One record as text, or as ids where it came as ids; file and record_number say where it stands."""

    file: Path | None
    record_number: int
    prompt: str
    completion: str
    ids: list[int] | None = None


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
    split_sizes: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})


def is_in_validation(key: str | bytes, fraction: float) -> bool:
    """Whether a record is split off for validation: by its own content alone, whatever stands beside it."""
    content = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64 < fraction


@dataclass
class Preprocessor:
    """Reads everything twice: once to check and count, once to tokenise and write."""

    settings: DataSettings
    inputs: list[DataInput]
    tokenizer: Any
    tokenizer_hash: str | None
    log: LogFn
    cache_root: Path
    num_shared: int = 0
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
        packers = {split: Packer(folder, split, **packer_options) for split in ("train", "val")}  # type: ignore[arg-type]
        for data_input in self.inputs:
            self._tokenize(data_input, packers)
        for data_input in self.inputs:
            if change_error := find_change(data_input.source, data_input.file_fingerprints):
                raise change_error
        fingerprints = {split: packer.close() for split, packer in packers.items()}
        metadata = {
            "source": self.settings.data,
            "form": self.inputs[0].record_format.name,
            "fingerprint": hashlib.sha256(f"{fingerprints['train']} {fingerprints['val']}".encode()).hexdigest(),
            "train_fingerprint": fingerprints["train"],
            "val_fingerprint": fingerprints["val"],
            "split": "given" if len(self.inputs) > 1 else f"hash {self.settings.val_fraction:g}",
            "tokenizer": self.tokenizer_hash,
            "vocabulary": vocab_size,
            "objective": self.settings.objective,
            "block_size": self.settings.block_size,
            **{split: packer.counts() for split, packer in packers.items()},
            "notices": self._notices(packers),
        }
        pad_id = self.tokenizer.eos_token_id if self.tokenizer is not None else 0
        return {"dtype": dtype, "pad_id": pad_id, "val_texts": self.val_texts, "facts": metadata}

    def _check_records(self) -> None:
        """Render every record once: a mistake in the last row is found before the first one is tokenised."""
        seen_hashes = np.empty(0, dtype=np.uint64)
        for data_input in reversed(self.inputs):  # validation first: its hashes are kept
            hashes = array("Q")
            for example in self._iter_examples(data_input):
                if example is None:
                    data_input.num_blank += 1
                    continue
                data_input.num_records += 1
                data_input.split_sizes["val" if self._is_val(data_input, example) else "train"] += 1
                if example.ids is not None:
                    data_input.max_token_id = max(data_input.max_token_id, *example.ids)
                if len(self.inputs) > 1:
                    hashes.append(_content_hash(example))
            data_input.is_counted = True
            if not data_input.num_records:
                raise UserError(
                    f"{data_input.source.flag} {data_input.source.spec}: holds blank lines only; "
                    "expected at least one record"
                )
            if len(self.inputs) > 1:
                input_hashes = np.frombuffer(hashes, dtype=np.uint64)
                self.num_shared = int(np.isin(seen_hashes, np.unique(input_hashes)).sum())
                seen_hashes = input_hashes
        self._check_split_sizes()

    def _check_split_sizes(self) -> None:
        """What is certain before tokenising: an empty split, for records; more is known when they are packed."""
        if len(self.inputs) == 1 and not all(self.inputs[0].split_sizes.values()):
            empty_split = "validation" if not self.inputs[0].split_sizes["val"] else "training"
            remedy = "raise --val-fraction" if empty_split == "validation" else "lower --val-fraction"
            raise UserError(
                f"--data {self.settings.data}: the split by hash leaves 0 of {self.inputs[0].num_records} records for "
                f"{empty_split} at --val-fraction {self.settings.val_fraction:g}; {remedy} or give --val-data"
            )

    def _iter_examples(self, data_input: DataInput) -> Iterator[Example | None]:
        """The records of a source as text, None for a blank one; UserError names file, row and column."""
        try:
            for file, number, record in sources.records(
                data_input.source, data_input.record_format.columns, cache=self.cache_root
            ):
                try:
                    if data_input.record_format.name == "input_ids":
                        yield Example(file, number, "", "", formats.parse_token_ids(record))
                        continue
                    prompt, completion = data_input.record_format.render(record)
                except RecordError as error:
                    raise UserError(
                        f"{data_input.source.flag} {data_input.source.locate(file, number)}: {error}"
                    ) from None
                if data_input.record_format.name == "acled" and not data_input.is_counted:
                    self._count_unknown_date(data_input, file, number, record)
                yield Example(file, number, prompt, completion) if completion.strip() else None
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

    def _is_val(self, data_input: DataInput, example: Example) -> bool:
        if len(self.inputs) > 1:
            return data_input.source.flag == "--val-data"
        return is_in_validation(_split_key(data_input.record_format, example), self.settings.val_fraction)

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
        splits = ["val" if self._is_val(data_input, example) else "train" for example in batch]
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
            if not packers[split].add_row(ids, len(prompt_ids)):
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
        if self.num_shared:
            lines.append(
                f"{self.num_shared} of {packers['val'].num_records} validation records also stand in the training data"
            )
        return lines


def _split_key(record_format: RecordFormat, example: Example) -> str | bytes:
    if example.ids is not None:
        return np.asarray(example.ids, dtype="<u4").tobytes()
    return example.prompt if record_format.is_keyed_by_prompt else example.prompt + example.completion


def _content_hash(example: Example) -> int:
    content = (
        np.asarray(example.ids, dtype="<u4").tobytes()
        if example.ids is not None
        else f"{example.prompt}\0{example.completion}".encode()
    )
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
