"""Rows of token ids on disk: one flat run of ids, cut by offsets."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
TokenIds = NDArray[np.uint32]
SPLITS = ("train", "val", "test", "retain")  # the last: text of the base model's own kind, in blocks


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """The examples of one split (training, validation, test or retain); row i is ids[offsets[i]:offsets[i + 1]].

    ids: [tokens] uint16 or uint32, memory-mapped; offsets: int64 [n + 1]; first_target: int32 [n], the first position
    whose token may count in the loss, at least 1 because nothing stands before position 0 to predict it from.
    target_mask: uint8 [tokens], 1 for the tokens that count, 0 before first_target; None: all from first_target count.
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
        """Tokens that count in the loss of each of `rows`, all where it is None; int64 [rows]."""
        rows = np.arange(len(self), dtype=np.int64) if rows is None else rows
        if self.target_mask is not None:
            return self._num_masked_targets[rows]
        return self.offsets[rows + 1] - self.offsets[rows] - self.first_target[rows]

    @cached_property
    def _num_masked_targets(self) -> Int64:
        assert self.target_mask is not None
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(self.target_mask, self.offsets[:-1], dtype=np.int64)

    def row(self, i: int) -> Int64:
        """The token ids of row i, int64 [length]."""
        return np.asarray(self.ids[self.offsets[i] : self.offsets[i + 1]], dtype=np.int64)

    def is_target(self, i: int) -> NDArray[np.bool_]:
        """Whether each token of row i counts in the loss, bool [length]."""
        if self.target_mask is not None:
            return np.asarray(self.target_mask[self.offsets[i] : self.offsets[i + 1]], dtype=bool)
        return np.arange(self.offsets[i + 1] - self.offsets[i]) >= self.first_target[i]


def array_files(folder: Path, split: str) -> dict[str, Path]:
    """Where the arrays of `split` lie in a folder; `mask` is there for chat only."""
    return {name: folder / f"{split}.{name}.bin" for name in ("ids", "offsets", "first", "mask")}


def load_token_dataset(
    folder: Path, split: str, *, dtype: str, num_rows: int, num_tokens: int, has_mask: bool
) -> TokenDataset:
    """Map the rows that `packing.py` wrote; ValueError where a file is missing or not of the size it must have."""
    layout = {"ids": (dtype, num_tokens), "offsets": ("<i8", num_rows + 1), "first": ("<i4", num_rows)}
    if has_mask:
        layout["mask"] = ("|u1", num_tokens)
    arrays = {}
    for name, (array_dtype, length) in layout.items():
        path = array_files(folder, split)[name]
        expected_bytes = length * np.dtype(array_dtype).itemsize
        if not path.is_file() or path.stat().st_size != expected_bytes:
            raise ValueError(f"{path} is not a file of {expected_bytes} bytes")
        # an empty file cannot be mapped
        arrays[name] = np.memmap(path, dtype=array_dtype, mode="r") if length else np.empty(0, dtype=array_dtype)
    return TokenDataset(
        ids=arrays["ids"], offsets=arrays["offsets"], first_target=arrays["first"], target_mask=arrays.get("mask")
    )
