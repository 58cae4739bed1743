"""Rows of token ids on disk: one flat run of ids, cut by offsets."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """The examples of one split (training, validation or test); row i is ids[offsets[i]:offsets[i + 1]].

    ids: [tokens] uint16 or uint32, memory-mapped; offsets: int64 [n + 1]; first_target: int32 [n], the first position
    whose token counts in the loss, at least 1 because nothing stands before position 0 to predict it from.
    """

    ids: NDArray[np.unsignedinteger]
    offsets: Int64
    first_target: NDArray[np.int32]

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

    def num_target_tokens(self) -> Int64:
        """Tokens of each row that count in the loss, int64 [n]."""
        return self.lengths() - self.first_target

    def row(self, i: int) -> Int64:
        """The token ids of row i, int64 [length]."""
        return np.asarray(self.ids[self.offsets[i] : self.offsets[i + 1]], dtype=np.int64)


SPLITS = ("train", "val", "test")
ARRAY_DTYPES = {"ids": "", "offsets": "<i8", "first": "<i4"}  # the type of ids is the writer's choice


def array_files(folder: Path, split: str) -> dict[str, Path]:
    """Where the three arrays of `split` ("train", "val" or "test") lie in a folder."""
    return {name: folder / f"{split}.{name}.bin" for name in ARRAY_DTYPES}


def load_token_dataset(folder: Path, split: str, *, dtype: str, num_rows: int, num_tokens: int) -> TokenDataset:
    """Map the rows that `packing.py` wrote; ValueError where a file is missing or not of the size it must have."""
    arrays = {}
    for name, path in array_files(folder, split).items():
        array_dtype, length = {
            "ids": (dtype, num_tokens),
            "offsets": ("<i8", num_rows + 1),
            "first": ("<i4", num_rows),
        }[name]
        expected_bytes = length * np.dtype(array_dtype).itemsize
        if not path.is_file() or path.stat().st_size != expected_bytes:
            raise ValueError(f"{path} is not a file of {expected_bytes} bytes")
        # an empty file cannot be mapped
        arrays[name] = np.memmap(path, dtype=array_dtype, mode="r") if length else np.empty(0, dtype=array_dtype)
    return TokenDataset(ids=arrays["ids"], offsets=arrays["offsets"], first_target=arrays["first"])
