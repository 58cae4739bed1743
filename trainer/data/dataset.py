"""Rows of token ids on disk, as they are written and mapped: flat arrays, cut by offsets; and who the rows are."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.config.choices import MAX_NUM_SAMPLES, UnusableRecords
from trainer.config.errors import UserError
from trainer.data.cache import read_manifest

Int64 = NDArray[np.int64]
TokenIds = NDArray[np.uint32]
MAX_SAMPLE_CHARACTERS = 4000  # length of a validation pair that is kept for samples
MAX_REFERENCES = 16  # of one prompt that are kept
SPLITS = ("train", "val", "test", "retain")  # the last: text of the base model's own kind, in blocks

#: What makes no whole row, and what is said of it.
PROBLEMS = {
    "too long": "records are longer than --block-size {} tokens and are left out",
    "cut": "conversations are cut at --block-size {} tokens",
    "tools": "conversations have tools, which the chat template does not write",
    "unusable": "conversations cannot be trained on and are left out",
}


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """The examples of one split (training, validation, test or retain); row i is ids[offsets[i]:offsets[i + 1]].

    ids: [tokens] uint16 or uint32, memory-mapped; offsets: int64 [n + 1]; first_target: int32 [n], the first position
    whose token may count in the loss, at least 1 because nothing stands before position 0 to predict it from.
    target_mask: uint8 [tokens], 1 for the target tokens, 0 before first_target; None: all from first_target count.
    """

    ids: NDArray[np.unsignedinteger]
    offsets: Int64
    first_target: NDArray[np.int32]
    target_mask: NDArray[np.uint8] | None = None

    @classmethod
    def empty(cls) -> "TokenDataset":
        """No row at all."""
        ids, first_target = np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int32)
        return cls(ids=ids, offsets=np.zeros(1, dtype=np.int64), first_target=first_target)

    def __len__(self) -> int:
        return len(self.first_target)

    def lengths(self) -> Int64:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    def num_target_tokens(self, rows: Int64 | None = None) -> Int64:
        """Target tokens of each of `rows`, all where it is None; int64 [rows]."""
        return self._num_targets if rows is None else self._num_targets[rows]

    @cached_property
    def _num_targets(self) -> Int64:
        if self.target_mask is None or not len(self):
            return self.lengths() - self.first_target
        return np.add.reduceat(self.target_mask, self.offsets[:-1], dtype=np.int64)

    def row(self, i: int) -> Int64:
        """The token ids of row i, int64 [length]."""
        return np.asarray(self.ids[self.offsets[i] : self.offsets[i + 1]], dtype=np.int64)

    def is_target(self, i: int) -> NDArray[np.bool_]:
        """Whether each token of row i counts in the loss, bool [length]."""
        if self.target_mask is not None:
            return np.asarray(self.target_mask[self.offsets[i] : self.offsets[i + 1]], dtype=bool)
        return np.arange(self.offsets[i + 1] - self.offsets[i]) >= self.first_target[i]


@dataclass(frozen=True, eq=False)
class Row:
    """One record as tokens; `prompt` and `completion` are the texts before and of its last target tokens."""

    ids: TokenIds  #: [length]
    is_target: NDArray[np.bool_]  #: [length]
    prompt: str
    completion: str


class SplitWriter:
    """Appends the rows of one split to its files and hashes what it appends; memory does not grow with them.

    counts: what run.json says of the split; problems: {what made no whole row: (how many records, where the first is)}.
    """

    def __init__(self, folder: Path, split: str, *, is_blocks: bool, block_size: int, dtype: str, has_mask: bool):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.is_blocks, self.block_size, self.has_mask = is_blocks, block_size, has_mask
        self.counts = {"records": 0, "examples": 0, "tokens": 0, "num_target_tokens": 0}
        self.problems: dict[str, tuple[int, str]] = {}
        self.example = ""  # the first row, with its target tokens marked
        self.texts: list[tuple[str, str]] = []  # the first validation records as (prompt, completion)
        self.num_references: Counter[str] = Counter()  # of each prompt in `texts`
        self.row_ids: list[tuple[str, str | None, bool]] = []  # (id, group, whether it equals a training record)
        self._files: dict[str, BinaryIO] = {
            name: open(folder / f"{split}.{name}.bin", "wb")  # noqa: SIM115
            for name in ("ids", "offsets", "first", "mask")[: 4 if has_mask else 3]
        }
        self._remainder: TokenIds = np.empty(0, dtype=np.uint32)  # the tail of the texts, which fills no block yet
        self._hash = hashlib.sha256(f"blocks {block_size}\n".encode() if is_blocks else b"completion \n")
        self._files["offsets"].write(bytes(8))

    def add_texts(self, texts: list[TokenIds]) -> None:
        """Append records to the stream that is cut into blocks; each must already end as it should."""
        self.counts["records"] += len(texts)
        stream = np.concatenate([self._remainder, *texts])
        full_length = len(stream) - len(stream) % self.block_size
        self._remainder = stream[full_length:].copy()
        self._append(stream[:full_length].reshape(-1, self.block_size), 1)

    def add_row(self, ids: TokenIds, is_target: NDArray[np.bool_]) -> None:
        """Append one record, of at most a block, as a row whose tokens count where `is_target` [length] says so."""
        mask = is_target.astype(np.uint8)
        mask[0] = 0  # nothing stands before position 0 to predict it from
        first_target = int(mask.argmax()) or 1
        # the lengths go into the hash, or rows cut elsewhere would have the same one
        if self.has_mask:
            self._hash.update(np.asarray([len(ids)], dtype="<u4").tobytes() + mask.tobytes())
            self._files["mask"].write(mask.tobytes())
            self.counts["num_target_tokens"] -= len(ids) - first_target - int(mask.sum())
        else:
            self._hash.update(np.asarray([len(ids), first_target], dtype="<u4").tobytes())
        self._append(ids[None], first_target)

    def add_problem(self, kind: str, where: str) -> None:
        """Count a record that made no whole row, and keep where the first of each kind stands."""
        number, first = self.problems.get(kind, (0, where))
        self.problems[kind] = (number + 1, first)

    def keep_text(self, prompt: str, completion: str) -> None:
        """Keep the first validation prompts for samples, each with all that follows it: references of one prompt."""
        if self.split != "val" or len(prompt) + len(completion) > MAX_SAMPLE_CHARACTERS:
            return
        num_prompts = len(self.num_references) + self.num_references[""] - ("" in self.num_references)
        is_known = prompt != "" and prompt in self.num_references
        if self.num_references[prompt] < MAX_REFERENCES if is_known else num_prompts < MAX_NUM_SAMPLES:
            self.texts.append((prompt, completion))
            self.num_references[prompt] += 1

    def _append(self, rows: TokenIds, first_target: int) -> None:
        num_rows, row_length = rows.shape
        self._hash.update(rows.astype("<u4").tobytes())
        self._files["ids"].write(rows.astype(self.dtype).tobytes())
        ends = self.counts["tokens"] + row_length * np.arange(1, num_rows + 1, dtype="<i8")
        self._files["offsets"].write(ends.tobytes())
        self._files["first"].write(np.full(num_rows, first_target, dtype="<i4").tobytes())
        self.counts["examples"] += num_rows
        self.counts["tokens"] += num_rows * row_length
        self.counts["num_target_tokens"] += num_rows * (row_length - first_target)

    def close(self) -> str:
        """Close the files, and return the fingerprint of the rows, in hex."""
        for file in self._files.values():
            file.close()
        return self._hash.hexdigest()

    def notices(self, unusable_records: UnusableRecords) -> list[str]:
        """One line for everything that was left out or cut; UserError where that is refused, or nothing is left."""
        lines, num_records = [], self.counts["records"] + self.problems.get("unusable", (0, ""))[0]
        if len(self._remainder):
            lines.append(f"{self.split}: the last {len(self._remainder)} tokens do not fill a block and are left out")
        for kind in [kind for kind in PROBLEMS if kind in self.problems]:
            number, first = self.problems[kind]
            problem = f"{number} of {num_records} {PROBLEMS[kind].format(self.block_size)} (first: {first})"
            lines.append(f"{self.split}: {problem}")
            if kind == "too long" and number == num_records:
                raise UserError(
                    f"--block-size {self.block_size}: all {number} {self.split} records are longer (first: {first}); "
                    "raise --block-size"
                )
            if kind == "unusable" and (unusable_records == "refuse" or number == num_records):
                is_some = number < num_records
                remedy = "leave them out with --unusable-records drop" if is_some else "pass another --chat-template"
                raise UserError(f"{lines[-1].replace(' and are left out', '')}; correct them, or {remedy}")
        return lines

    def read_back(self) -> TokenDataset:
        """The rows, once the writer is closed."""
        return _map_rows(self.folder, self.split, self.dtype, self.counts, self.has_mask)


@dataclass(frozen=True, kw_only=True, eq=False)
class RowInfo:
    """Who the rows of an evaluation split are, by which a comparison pairs the losses of two runs: an entry a row.

    ids: 16 hex digits, a hash of the record's text, of the token ids where rows are blocks; groups: hash of what keeps
    rows together (--split-by, else the prompt), None where a row is a unit by itself; targets: target tokens;
    num_bytes: UTF-8 bytes of their text, 0 where there is no tokenizer; in_train: whether the row equals a training
    record (or block).
    """

    ids: Sequence[str]
    groups: Sequence[str | None]
    targets: Sequence[int]
    num_bytes: Sequence[int]
    in_train: Sequence[bool]

    @property
    def occurrences(self) -> list[int]:
        """For each row the number of equal rows before it."""
        counts: Counter[str] = Counter()
        occurrences = []
        for row_id in self.ids:
            occurrences.append(counts[row_id])
            counts[row_id] += 1
        return occurrences

    def write(self, folder: Path, split: str) -> None:
        """Write the columns beside the rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {"ids": pa.string(), "groups": pa.string(), "targets": pa.int32(), "num_bytes": pa.int32()}
        table = pa.table(vars(self), schema=pa.schema({**types, "in_train": pa.bool_()}))
        pq.write_table(table, folder / f"{split}.rows.parquet", compression="zstd")


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """Data ready to train on. metadata: the `data` block of run.json; val_texts: the first validation records as
    (prompt, completion); pad_id: any id will do, since padding is masked by position; test, retain: without a row where
    there is no such split."""

    train: TokenDataset
    val: TokenDataset
    metadata: dict[str, Any]
    val_texts: tuple[tuple[str, str], ...]
    pad_id: int
    folder: Path
    test: TokenDataset = field(default_factory=TokenDataset.empty)
    retain: TokenDataset = field(default_factory=TokenDataset.empty)

    def row_info(self, split: str) -> RowInfo:
        """Who the rows of a split other than "train" are; read from the folder. ValueError where that is not whole."""
        import pyarrow.parquet as pq

        file = self.folder / f"{split}.rows.parquet"
        try:
            return RowInfo(**pq.read_table(file).to_pydict())
        except (OSError, TypeError) as error:
            raise ValueError(f"{file} is not whole ({error})") from error

    def num_target_bytes(self, split: str) -> int:
        """UTF-8 bytes of the targets of a split other than "train", 0 where the text is not known."""
        return int(self.metadata[split].get("target_bytes", 0))


def load(folder: Path, *, source: str | None = None) -> PreparedDataset:
    """What `prepare` left in `folder`, mapped, not read; ValueError where it is not whole.

    `source`: what the user typed this time; equal contents under another name share a folder.
    """
    manifest = read_manifest(folder)
    rows = {
        split: _map_rows(folder, split, manifest.dtype, manifest.facts[split], f"{split}.mask.bin" in manifest.sha256)
        for split in SPLITS
    }
    metadata = {**manifest.facts, **({"source": source} if source is not None else {})}
    return PreparedDataset(
        **rows, metadata=metadata, val_texts=tuple(manifest.val_texts), pad_id=manifest.pad_id, folder=folder
    )


def _map_rows(folder: Path, split: str, dtype: str, counts: dict[str, int], has_mask: bool) -> TokenDataset:
    """The arrays of a split; ValueError where a file is missing or not of the size it must have."""
    num_rows, num_tokens = counts["examples"], counts["tokens"]
    layout = {"ids": (dtype, num_tokens), "offsets": ("<i8", num_rows + 1), "first": ("<i4", num_rows)}
    if has_mask:
        layout["mask"] = ("|u1", num_tokens)
    arrays = {}
    for name, (array_dtype, length) in layout.items():
        path = folder / f"{split}.{name}.bin"
        num_bytes = length * np.dtype(array_dtype).itemsize
        if not path.is_file() or path.stat().st_size != num_bytes:
            raise ValueError(f"{path} is not a file of {num_bytes} bytes")
        # an empty file cannot be mapped
        arrays[name] = np.memmap(path, dtype=array_dtype, mode="r") if length else np.empty(0, dtype=array_dtype)
    return TokenDataset(
        ids=arrays["ids"], offsets=arrays["offsets"], first_target=arrays["first"], target_mask=arrays.get("mask")
    )
