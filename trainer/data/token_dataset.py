"""Rows of token ids on disk: one flat run of ids, cut by offsets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """The examples of one side (train or validation); row i is ids[offsets[i]:offsets[i + 1]].

    ids: [tokens] uint16 or uint32, memory-mapped; offsets: int64 [n + 1]; first: int32 [n], the first position
    whose token counts in the loss, at least 1 because nothing stands before position 0 to predict it from.
    """

    ids: NDArray[np.unsignedinteger]
    offsets: Int64
    first: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.first)

    def lengths(self) -> Int64:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    def counted(self) -> Int64:
        """Tokens of each row that count in the loss, int64 [n]."""
        return self.lengths() - self.first

    def row(self, i: int) -> Int64:
        """The token ids of row i, int64 [length]."""
        return np.asarray(self.ids[self.offsets[i] : self.offsets[i + 1]], dtype=np.int64)


FILES = {"ids": "", "offsets": "<i8", "first": "<i4"}  # the type of ids is the writer's choice


def row_files(folder: Path, side: str) -> dict[str, Path]:
    """Where the three arrays of `side` ("train" or "val") lie in a folder."""
    return {name: folder / f"{side}.{name}.bin" for name in FILES}


def read_rows(folder: Path, side: str, *, dtype: str, rows: int, tokens: int) -> Rows:
    """Map the rows that `pack.py` wrote; ValueError where a file is missing or not of the size it must have."""
    arrays = {}
    for name, path in row_files(folder, side).items():
        kind, length = {"ids": (dtype, tokens), "offsets": ("<i8", rows + 1), "first": ("<i4", rows)}[name]
        expected = length * np.dtype(kind).itemsize
        if not path.is_file() or path.stat().st_size != expected:
            raise ValueError(f"{path} is not a file of {expected} bytes")
        # an empty file cannot be mapped
        arrays[name] = np.memmap(path, dtype=kind, mode="r") if length else np.empty(0, dtype=kind)
    return Rows(ids=arrays["ids"], offsets=arrays["offsets"], first=arrays["first"])
