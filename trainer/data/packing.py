"""Token ids -> rows on disk, written as they come: blocks of one length, or one record a row."""

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.data.token_dataset import row_files

Ids = NDArray[np.uint32]


class Packer:
    """Appends the rows of one side to its three files and hashes what it appends; memory does not grow.

    Counts: `records` given, `examples` (rows) written, their `tokens` and `counted` tokens, and `dropped`: tokens
    left over at the end (blocks), or records that were too long (completion).
    """

    def __init__(self, folder: Path, side: str, *, objective: str, block_size: int, dtype: str) -> None:
        self.objective, self.block_size, self.dtype = objective, block_size, np.dtype(dtype)
        self.records = self.examples = self.tokens = self.counted = self.dropped = 0
        self._files: dict[str, BinaryIO] = {name: open(path, "wb") for name, path in row_files(folder, side).items()}  # noqa: SIM115
        self._carry: Ids = np.empty(0, dtype=np.uint32)
        self._hash = hashlib.sha256(f"{objective} {block_size if objective == 'blocks' else ''}\n".encode())
        self._write("offsets", np.zeros(1, dtype="<i8"))

    def add_texts(self, texts: list[Ids]) -> None:
        """Append records to the stream that is cut into blocks; each must already end as it should."""
        self.records += len(texts)
        stream = np.concatenate([self._carry, *texts])
        whole = len(stream) - len(stream) % self.block_size
        self._carry = stream[whole:].copy()
        self._append(stream[:whole].reshape(-1, self.block_size))

    def add_row(self, ids: Ids, first: int) -> bool:
        """Append one record as a row of its own; False, and nothing written, where it is longer than a block."""
        self.records += 1
        if len(ids) > self.block_size:
            self.dropped += 1
            return False
        first = max(first, 1)  # nothing stands before position 0 to predict it from
        # the lengths go into the hash, or rows cut elsewhere would have the same one
        self._hash.update(np.asarray([len(ids), first], dtype="<u4").tobytes())
        self._append(ids[None], first)
        return True

    def _append(self, rows: Ids, first: int = 1) -> None:
        count, length = rows.shape
        self._hash.update(rows.astype("<u4").tobytes())
        self._write("ids", rows.astype(self.dtype))
        self._write("offsets", self.tokens + length * np.arange(1, count + 1, dtype="<i8"))
        self._write("first", np.full(count, first, dtype="<i4"))
        self.examples += count
        self.tokens += count * length
        self.counted += count * (length - first)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        self._files[name].write(values.tobytes())

    def close(self) -> str:
        """Leave the tail out, close the files, and return the fingerprint of the rows, in hex."""
        if self.objective == "blocks":
            self.dropped = len(self._carry)
        for file in self._files.values():
            file.close()
        return self._hash.hexdigest()

    def counts(self) -> dict[str, int]:
        """What run.json says of this side."""
        return {
            "records": self.records,
            "examples": self.examples,
            "tokens": self.tokens,
            "counted_tokens": self.counted,
        }
