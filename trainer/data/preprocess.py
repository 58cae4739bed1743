"""Two readings of the records: one that checks and counts, one that tokenises and writes the rows."""

import hashlib
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.config.errors import UserError
from trainer.config.schema import MOST_SAMPLES, DataSettings
from trainer.data import formats, sources, tokenizer
from trainer.data.acled import column_names, plain_date
from trainer.data.formats import BadRecord, Form
from trainer.data.packing import Packer
from trainer.data.sources import Source
from trainer.data.validate_files import FileFacts, changed

Say = Callable[[str], None]
BATCH_RECORDS, BATCH_CHARACTERS = 1000, 2**19  # what is tokenised at a time
SHOWN_CHARACTERS = 4000  # length of a validation pair that is kept for samples
SAY_EVERY = 5.0  # seconds


class Item(NamedTuple):
    """One record as text, or as ids where it came as ids; file and number say where it stands."""

    file: Path | None
    number: int
    prompt: str
    completion: str
    ids: list[int] | None = None


@dataclass
class Input:
    """One source with the form of its records, and what the first reading of it counted."""

    source: Source
    form: Form
    files: tuple[FileFacts, ...] = ()
    records: int = 0
    blank: int = 0
    largest: int = 0
    odd_dates: int = 0
    odd_date: str = ""
    counted: bool = False  # the second reading counts nothing again
    sides: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})


def in_validation(key: str | bytes, fraction: float) -> bool:
    """Whether a record is split off for validation: by its own content alone, whatever stands beside it."""
    content = key.encode() if isinstance(key, str) else key
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64 < fraction


@dataclass
class Maker:
    """Reads everything twice: once to check and count, once to tokenise and write."""

    settings: DataSettings
    inputs: list[Input]
    tokenizer: Any
    tokenizer_hash: str | None
    say: Say
    cache: Path
    shared: int = 0
    too_long: dict[str, str] = field(default_factory=dict)
    val_texts: list[tuple[str, str]] = field(default_factory=list)

    def fill(self, folder: Path) -> dict[str, Any]:
        """Write the rows of both sides into `folder` and return what facts.json holds of them.

        A record is given to its side by its own content; given validation data are a side of their own.
        """
        self._check()
        vocabulary = len(self.tokenizer) if self.tokenizer is not None else 1 + max(one.largest for one in self.inputs)
        dtype = "<u2" if vocabulary <= 65_536 else "<u4"
        shape = {"objective": self.settings.objective, "block_size": self.settings.block_size, "dtype": dtype}
        packers = {side: Packer(folder, side, **shape) for side in ("train", "val")}  # type: ignore[arg-type]
        for one in self.inputs:
            self._tokenise(one, packers)
        for one in self.inputs:
            if problem := changed(one.source, one.files):
                raise problem
        prints = {side: packer.close() for side, packer in packers.items()}
        facts = {
            "source": self.settings.data,
            "form": self.inputs[0].form.name,
            "fingerprint": hashlib.sha256(f"{prints['train']} {prints['val']}".encode()).hexdigest(),
            "train_fingerprint": prints["train"],
            "val_fingerprint": prints["val"],
            "split": "given" if len(self.inputs) > 1 else f"hash {self.settings.val_fraction:g}",
            "tokenizer": self.tokenizer_hash,
            "vocabulary": vocabulary,
            "objective": self.settings.objective,
            "block_size": self.settings.block_size,
            **{side: packer.counts() for side, packer in packers.items()},
            "notices": self._notices(packers),
        }
        pad_id = self.tokenizer.eos_token_id if self.tokenizer is not None else 0
        return {"dtype": dtype, "pad_id": pad_id, "val_texts": self.val_texts, "facts": facts}

    def _check(self) -> None:
        """Render every record once: a mistake in the last row is found before the first one is tokenised."""
        seen = np.empty(0, dtype=np.uint64)
        for one in reversed(self.inputs):  # validation first: its hashes are kept, those of training only compared
            hashes = array("Q")
            for item in self._items(one):
                if item is None:
                    one.blank += 1
                    continue
                one.records += 1
                one.sides["val" if self._is_val(one, item) else "train"] += 1
                if item.ids is not None:
                    one.largest = max(one.largest, *item.ids)
                if len(self.inputs) > 1:
                    hashes.append(_hash(item))
            one.counted = True
            if not one.records:
                raise UserError(
                    f"{one.source.flag} {one.source.typed}: holds blank lines only; expected at least one record"
                )
            if len(self.inputs) > 1:
                mine = np.frombuffer(hashes, dtype=np.uint64)
                self.shared = int(np.isin(seen, np.unique(mine)).sum())
                seen = mine
        self._early()

    def _early(self) -> None:
        """What is certain before tokenising: an empty side, for records; more is known when they are packed."""
        if len(self.inputs) == 1 and not all(self.inputs[0].sides.values()):
            empty = "validation" if not self.inputs[0].sides["val"] else "training"
            remedy = "raise --val-fraction" if empty == "validation" else "lower --val-fraction"
            raise UserError(
                f"--data {self.settings.data}: the split by hash leaves 0 of {self.inputs[0].records} records for "
                f"{empty} at --val-fraction {self.settings.val_fraction:g}; {remedy} or give --val-data"
            )

    def _items(self, one: Input) -> Iterator[Item | None]:
        """The records of a source as text, None for a blank one; UserError names file, row and column."""
        try:
            for file, number, record in sources.records(one.source, one.form.columns, cache=self.cache):
                try:
                    if one.form.name == "input_ids":
                        yield Item(file, number, "", "", formats.token_ids(record))
                        continue
                    prompt, completion = one.form.render(record)
                except BadRecord as problem:
                    raise UserError(f"{one.source.flag} {one.source.place(file, number)}: {problem}") from None
                if one.form.name == "acled" and not one.counted:
                    self._date(one, file, number, record)
                yield Item(file, number, prompt, completion) if completion.strip() else None
        except UserError as problem:
            raise changed(one.source, one.files) or problem from None  # a file that changes is the cause, not its rows

    def _date(self, one: Input, file: Path | None, number: int, record: Any) -> None:
        """Count a date of an ACLED export that is in none of its spellings."""
        column = column_names(tuple(record)).get("event_date", "")
        value = record.get(column)
        if not formats.missing(value) and plain_date(formats.plain_text(value, column).strip()) is None:
            one.odd_dates += 1
            one.odd_date = one.odd_date or f"{one.source.place(file, number)}: {value}"

    def _is_val(self, one: Input, item: Item) -> bool:
        if len(self.inputs) > 1:
            return one.source.flag == "--val-data"
        return in_validation(_split_key(one.form, item), self.settings.val_fraction)

    def _tokenise(self, one: Input, packers: dict[str, Packer]) -> None:
        batch: list[Item] = []
        done, size, said = 0, 0, time.monotonic()
        for item in self._items(one):
            if item is None:
                continue
            batch.append(item)
            done += 1
            size += len(item.prompt) + len(item.completion) + 4 * len(item.ids or ())
            if len(batch) >= BATCH_RECORDS or size >= BATCH_CHARACTERS:
                self._write(one, batch, packers)
                batch, size = [], 0
                if time.monotonic() - said > SAY_EVERY:
                    said = time.monotonic()
                    self.say(f"tokenising {one.source.typed}: {done:,} of {one.records:,} records")
        self._write(one, batch, packers)

    def _write(self, one: Input, batch: list[Item], packers: dict[str, Packer]) -> None:
        sides = ["val" if self._is_val(one, item) else "train" for item in batch]
        for item, side in zip(batch, sides, strict=True):
            shown = item.ids is None and len(item.prompt) + len(item.completion) <= SHOWN_CHARACTERS
            if side == "val" and shown and len(self.val_texts) < MOST_SAMPLES:
                self.val_texts.append((item.prompt, item.completion))
        if self.settings.objective == "completion":
            self._write_rows(one, batch, sides, packers)
            return
        if one.form.name == "input_ids":
            texts = [np.asarray(item.ids, dtype=np.uint32) for item in batch]
        else:
            end = np.asarray([self.tokenizer.eos_token_id], dtype=np.uint32)
            encoded = tokenizer.encode(self.tokenizer, [item.prompt + item.completion for item in batch])
            texts = [np.concatenate([ids, end]) for ids in encoded]
        for side, packer in packers.items():
            if mine := [ids for ids, its in zip(texts, sides, strict=True) if its == side]:
                packer.add_texts(mine)

    def _write_rows(self, one: Input, batch: list[Item], sides: list[str], packers: dict[str, Packer]) -> None:
        """One record a row; prompt and completion are encoded apart, so that the boundary is exact."""
        end = np.asarray([self.tokenizer.eos_token_id], dtype=np.uint32)
        prompts = tokenizer.encode(self.tokenizer, [item.prompt for item in batch])
        completions = tokenizer.encode(self.tokenizer, [item.completion for item in batch])
        for item, side, before, after in zip(batch, sides, prompts, completions, strict=True):
            ids = np.concatenate([before, after, end])
            if not packers[side].add_row(ids, len(before)):
                self.too_long.setdefault(side, f"{one.source.place(item.file, item.number)}, {len(ids)} tokens")

    def _notices(self, packers: dict[str, Packer]) -> list[str]:
        """One line for everything that was left out or that a user should know of the data."""
        lines = []
        for side, packer in packers.items():
            if self.settings.objective == "blocks" and packer.dropped:
                lines.append(f"{side}: the last {packer.dropped} tokens do not fill a block and are left out")
            elif packer.dropped:
                lines.append(
                    f"{side}: {packer.dropped} of {packer.records} records are longer than --block-size "
                    f"{self.settings.block_size} tokens and are left out (first: {self.too_long[side]})"
                )
                if packer.dropped == packer.records:
                    raise UserError(
                        f"--block-size {self.settings.block_size}: all {packer.records} {side} records are longer "
                        f"(first: {self.too_long[side]}); raise --block-size"
                    )
        for one in self.inputs:
            if one.blank:
                lines.append(f"{one.source.typed}: {one.blank} blank records are left out")
            if one.odd_dates:
                lines.append(
                    f"{one.source.typed}: {one.odd_dates} dates stand as they were written (first: {one.odd_date})"
                )
            if one.form.name == "input_ids" and "labels" in sources.columns(one.source):
                lines.append(f"{one.source.typed}: the column `labels` is not used, every token counts")
        if self.shared:
            lines.append(
                f"{self.shared} of {packers['val'].records} validation records also stand in the training data"
            )
        return lines


def _split_key(form: Form, item: Item) -> str | bytes:
    if item.ids is not None:
        return np.asarray(item.ids, dtype="<u4").tobytes()
    return item.prompt if form.keyed else item.prompt + item.completion


def _hash(item: Item) -> int:
    content = (
        np.asarray(item.ids, dtype="<u4").tobytes()
        if item.ids is not None
        else f"{item.prompt}\0{item.completion}".encode()
    )
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
