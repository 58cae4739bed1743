"""Token ids -> rows on disk, written as they come: blocks of one length, or one record a row."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.data.token_dataset import TokenIds, array_files


class Packer:
    """Appends the rows of one split to its files and hashes what it appends; memory does not grow.

    Counts: `num_records` read, `num_examples` (rows) written, their `num_tokens` and `num_target_tokens`, and
    `num_dropped`: tokens left over at the end (blocks), or records that were too long (completion).
    """

    def __init__(
        self, folder: Path, split: str, *, objective: str, block_size: int, dtype: str, has_mask: bool = False
    ) -> None:
        self.objective, self.block_size, self.dtype = objective, block_size, np.dtype(dtype)
        self.num_records = self.num_examples = self.num_tokens = self.num_target_tokens = self.num_dropped = 0
        self._files: dict[str, BinaryIO] = {
            name: open(path, "wb")  # noqa: SIM115
            for name, path in array_files(folder, split).items()
            if name != "mask" or has_mask
        }
        self._remainder: TokenIds = np.empty(0, dtype=np.uint32)
        self._hash = hashlib.sha256(f"{objective} {block_size if objective == 'blocks' else ''}\n".encode())
        self._write("offsets", np.zeros(1, dtype="<i8"))

    def add_texts(self, texts: list[TokenIds]) -> None:
        """Append records to the stream that is cut into blocks; each must already end as it should."""
        self.num_records += len(texts)
        stream = np.concatenate([self._remainder, *texts])
        full_length = len(stream) - len(stream) % self.block_size
        self._remainder = stream[full_length:].copy()
        self._append(stream[:full_length].reshape(-1, self.block_size), 1)

    def add_row(self, ids: TokenIds, first_target: int) -> bool:
        """Append one record as a row of its own; False, and nothing written, where it is longer than a block."""
        self.num_records += 1
        if len(ids) > self.block_size:
            self.num_dropped += 1
            return False
        first_target = max(first_target, 1)  # nothing stands before position 0 to predict it from
        # the lengths go into the hash, or rows cut elsewhere would have the same one
        self._hash.update(np.asarray([len(ids), first_target], dtype="<u4").tobytes())
        self._append(ids[None], first_target)
        return True

    def add_masked_row(self, ids: TokenIds, is_target: NDArray[np.bool_]) -> None:
        """Append one record, of at most a block, whose tokens count where `is_target` [length] says so."""
        self.num_records += 1
        mask = is_target.astype(np.uint8)
        mask[0] = 0  # nothing stands before position 0 to predict it from
        self._hash.update(np.asarray([len(ids)], dtype="<u4").tobytes() + mask.tobytes())
        self._write("mask", mask)
        first_target = int(mask.argmax())
        self._append(ids[None], first_target)
        self.num_target_tokens -= len(ids) - first_target - int(mask.sum())

    def _append(self, rows: TokenIds, first_target: int) -> None:
        num_rows, row_length = rows.shape
        self._hash.update(rows.astype("<u4").tobytes())
        self._write("ids", rows.astype(self.dtype))
        self._write("offsets", self.num_tokens + row_length * np.arange(1, num_rows + 1, dtype="<i8"))
        self._write("first", np.full(num_rows, first_target, dtype="<i4"))
        self.num_examples += num_rows
        self.num_tokens += num_rows * row_length
        self.num_target_tokens += num_rows * (row_length - first_target)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        self._files[name].write(values.tobytes())

    def close(self) -> str:
        """Leave the tail out, close the files, and return the fingerprint of the rows, in hex."""
        if self.objective == "blocks":
            self.num_dropped = len(self._remainder)
        for file in self._files.values():
            file.close()
        return self._hash.hexdigest()

    def counts(self) -> dict[str, int]:
        """What run.json says of this split."""
        return {
            "records": self.num_records,
            "examples": self.num_examples,
            "tokens": self.num_tokens,
            "counted_tokens": self.num_target_tokens,
        }
