"""Two readings of the records: one that checks and counts, one that tokenises and writes the rows."""

import hashlib
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.choices import MAX_SHARED_FRACTION, Objective
from trainer.config.errors import UserError
from trainer.config.schema import DataSettings
from trainer.data import tokenizer
from trainer.data.chat import ChatTemplate
from trainer.data.examples import DataInput, Example, content_of, iter_examples, split_of
from trainer.data.row_info import content_hash, write_row_info
from trainer.data.row_writer import RowWriter
from trainer.data.token_dataset import SPLITS
from trainer.data.validate_files import find_change

LogFn = Callable[[str], None]
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 2**19  # what is tokenised at a time
LOG_INTERVAL_SECONDS = 5.0
SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test", "retain": "retained"}


@dataclass
class Preprocessor:
    """Reads everything twice: once to check and count, once to tokenise and write."""

    settings: DataSettings
    objective: Objective
    inputs: list[DataInput]
    tokenizer: Any
    chat_template: str | None
    log: LogFn
    shared_hashes: set[int] = field(default_factory=set)  # of records of val and test that equal a training record
    num_shared: dict[str, int] = field(default_factory=dict)  # records of a split that equal a training record

    def write_dataset(self, folder: Path) -> dict[str, Any]:
        """Write the rows of all splits into `folder` and return what facts.json holds of them.

        A record is assigned to its split by its own content; validation and test data of their own are a split each.
        """
        self._check_records()
        if self.tokenizer is not None:
            vocab_size = len(self.tokenizer)
        else:
            vocab_size = 1 + max(data_input.max_token_id for data_input in self.inputs)
        writer = RowWriter(
            folder=folder,
            objective=self.objective,
            block_size=self.settings.block_size,
            tokenizer=self.tokenizer,
            chat=ChatTemplate(self.tokenizer, self.chat_template) if self._is_chat() else None,  # type: ignore[arg-type]
            dtype="<u2" if vocab_size <= 65_536 else "<u4",
            shared_hashes=self.shared_hashes,
        )
        try:
            for data_input in self.inputs:
                self._tokenize(data_input, writer)
        finally:
            for packer in writer.packers.values():
                packer.close()
        for data_input in self.inputs:
            if change_error := find_change(data_input.source, data_input.file_fingerprints):
                raise change_error
        return {
            "dtype": writer.dtype,
            "pad_id": self.tokenizer.eos_token_id if self.tokenizer is not None else 0,
            "facts": self._metadata(writer, vocab_size),
            "val_texts": writer.val_texts,
        }

    def _metadata(self, writer: RowWriter, vocab_size: int) -> dict[str, Any]:
        """The `data` block of run.json."""
        packers, settings, record_format = writer.packers, self.settings, self.inputs[0].record_format
        fingerprints = {split: packer.close() for split, packer in packers.items()}
        used_splits = [split for split in SPLITS if split in ("train", "val") or packers[split].num_records]
        row_infos = {split: writer.row_info(split) for split in SPLITS if split != "train"}
        trained_on = [fingerprints[split] for split in used_splits if split != "retain"]
        for split, row_info in row_infos.items():
            write_row_info(writer.folder, split, row_info)
        return {
            "source": settings.data,
            "form": record_format.name,
            "form_meaning": record_format.meaning,
            "example": writer.example,
            "chat_template": self.chat_template if self._is_chat() else None,
            "fingerprint": hashlib.sha256(" ".join(trained_on).encode()).hexdigest(),
            **{f"{split}_fingerprint": fingerprints[split] if split in used_splits else None for split in SPLITS},
            "split": f"hash {settings.val_fraction:g}" if self._val_fraction() else "given",
            "split_by": settings.split_by,
            "equal_to_train": {split: self.num_shared.get(split, 0) for split in row_infos},
            "tokenizer": tokenizer.tokenizer_fingerprint(self.tokenizer) if self.tokenizer is not None else None,
            "vocabulary": vocab_size,
            "objective": self.objective,
            "block_size": settings.block_size,
            "train": packers["train"].counts(),
            **{
                split: packers[split].counts() | {"target_bytes": sum(row_info.num_bytes), "units": row_info.num_units}
                for split, row_info in row_infos.items()
            },
            "notices": self._notices(writer),
        }

    def _is_chat(self) -> bool:
        return any(data_input.num_conversations for data_input in self.inputs)

    def _split_by(self, data_input: DataInput) -> str | None:
        return None if data_input.source.split == "retain" else self.settings.split_by

    def _val_fraction(self) -> float:
        """The share of the training source that is split off for validation."""
        has_val = any(data_input.source.split == "val" for data_input in self.inputs)
        return 0.0 if has_val else self.settings.val_fraction

    def _check_records(self) -> None:
        """Render every record once: a mistake in the last row is found before the first one is tokenised."""
        hashes = {split: array("Q") for split in (*SPLITS, "joined train")}
        for data_input in self.inputs:
            for example in iter_examples(data_input, self._split_by(data_input)):
                if example is None:
                    data_input.num_blank += 1
                    continue
                split = self._split(data_input, example)
                data_input.count(example, split)
                hashes[split].append(content_hash(content_of(example, "" if split == "retain" else "\0")))
                if split == "train" and self.settings.retain_data is not None:  # a text that is a pair's, joined
                    hashes["joined train"].append(content_hash(content_of(example, "")))
            data_input.is_counted = True
            source = data_input.source
            if not data_input.num_records:
                raise UserError(f"{source.flag} {source.spec}: holds blank lines only; expected at least one record")
            has_chat = data_input.num_conversations > 0
            if source.split == "retain" and has_chat:
                raise UserError(f"{source.flag} {source.spec}: holds conversations; expected text")
            if source.split != "retain" and has_chat != (self.inputs[0].num_conversations > 0):
                raise UserError(
                    f"{source.flag} {source.spec}: one of the splits holds conversations and another text; expected one"
                )
        self._check_split_sizes()
        self._check_shared({split: np.frombuffer(values, dtype=np.uint64) for split, values in hashes.items()})
        if self._is_chat() and self.objective == "blocks":
            raise UserError(
                "--objective blocks: conversations are learnt turn by turn; expected --objective completion"
            )

    def _check_shared(self, hashes: dict[str, NDArray[np.uint64]]) -> None:
        """Count records of validation and test that equal a training record; where there is a test, refuse many."""
        for split in ("val", "test", "retain"):
            is_shared = np.isin(hashes[split], hashes["joined train" if split == "retain" else "train"])
            self.num_shared[split] = int(is_shared.sum())
            self.shared_hashes |= set(hashes[split][is_shared].tolist())
            num_records, has_test = len(hashes[split]), len(hashes["test"]) > 0
            if (has_test or split == "retain") and self.num_shared[split] > MAX_SHARED_FRACTION * num_records:
                remedy = "take them out"
                if split != "retain":
                    remedy = f"or a test says nothing of new records: {remedy}, or split by a column that they share"
                raise UserError(
                    f"--data {self.settings.data}: {self.num_shared[split]} of {num_records} {SPLIT_NAMES[split]} "
                    f"records also stand in the training data; expected at most {MAX_SHARED_FRACTION:.0%}, {remedy}"
                    + (" (--split-by)" if split != "retain" else "")
                )

    def _check_split_sizes(self) -> None:
        """What is certain before tokenising: an empty split, for records; more is known when they are packed."""
        sizes = self.inputs[0].split_sizes
        fractions = {"val": self._val_fraction(), "test": self.settings.test_fraction}
        split_off = [split for split, fraction in fractions.items() if fraction]
        empty_split = next((split for split in ("train", *split_off) if not sizes[split]), None)
        if not split_off or empty_split is None:
            return
        flag, remedy = (split_off[0], "lower") if empty_split == "train" else (empty_split, "raise")
        name = {"train": "training", "val": "validation", "test": "the test"}[empty_split]
        raise UserError(
            f"--data {self.settings.data}: the split by hash leaves 0 of {self.inputs[0].num_records} records for "
            f"{name} at --{flag}-fraction {fractions[flag]:g}; {remedy} --{flag}-fraction or give --{flag}-data"
        )

    def _split(self, data_input: DataInput, example: Example) -> str:
        if data_input.source.split != "train":
            return data_input.source.split
        key = example.group if example.group is not None else content_of(example, separator="")
        return split_of(key, self._val_fraction(), self.settings.test_fraction)

    def _tokenize(self, data_input: DataInput, writer: RowWriter) -> None:
        batch: list[Example] = []
        num_tokenized, num_characters, last_log_seconds = 0, 0, time.monotonic()

        def write_batch() -> None:
            writer.write(data_input, batch, [self._split(data_input, example) for example in batch])

        for example in iter_examples(data_input, self._split_by(data_input)):
            if example is None:
                continue
            batch.append(example)
            num_tokenized += 1
            num_characters += len(example.prompt) + len(example.completion) + 4 * len(example.ids or ())
            if len(batch) >= BATCH_RECORDS or num_characters >= BATCH_CHARACTERS:
                write_batch()
                batch, num_characters = [], 0
                if time.monotonic() - last_log_seconds > LOG_INTERVAL_SECONDS:
                    last_log_seconds = time.monotonic()
                    spec, total = data_input.source.spec, data_input.num_records
                    self.log(f"tokenising {spec}: {num_tokenized:,} of {total:,} records")
        if batch:
            write_batch()

    def _notices(self, writer: RowWriter) -> list[str]:
        """One line for everything that was left out or that a user should know of the data."""
        lines = writer.notices(self.settings.unusable_records)
        for data_input in self.inputs:
            lines += data_input.notices()
        for split in ("val", "test", "retain"):
            if self.num_shared[split]:
                lines.append(
                    f"{self.num_shared[split]} of {writer.packers[split].num_records} {SPLIT_NAMES[split]} records "
                    "also stand in the training data"
                )
        return lines
