"""The file of an offline W&B run, read without wandb's own reader, which takes twice as long and flattens configs."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.report.run_data import Unreadable

_BLOCK = 32_768
_HEADER = b":W&B"
_CHUNK = struct.Struct("<IHB")  # checksum, length, kind
_FIRST, _LAST = (1, 2), (1, 4)  # kinds of chunk that begin and end a record: 1 whole, 2 first, 3 middle, 4 last


class RecordReader:
    """The records of a .wandb file in order: leveldb's log format around protobuf messages.

    `torn` is True after a file that ends within a record, as a killed process leaves it.
    """

    def __init__(self, file: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        from wandb.proto.wandb_internal_pb2 import Record

        self._record = Record
        try:
            self._content = file.read_bytes()
        except OSError as problem:
            raise Unreadable(f"cannot read {file.name} ({problem.strerror})") from problem
        if not self._content.startswith(_HEADER):
            raise Unreadable(f"{file.name} is not a W&B run file")
        self.torn = False

    def __iter__(self) -> Iterator[Any]:
        parts: list[bytes] = []
        at = 7  # 4 bytes name, 2 magic number, 1 version
        while at + _CHUNK.size <= len(self._content):
            left = _BLOCK - at % _BLOCK
            if left < _CHUNK.size:  # too little room for a chunk: the rest of the block is padding
                at += left
                continue
            _, length, kind = _CHUNK.unpack_from(self._content, at)
            at += _CHUNK.size
            if kind == 0 or kind > 4 or at + length > len(self._content):
                break
            if kind in _FIRST:
                parts = []
            parts.append(self._content[at : at + length])
            at += length
            if kind in _LAST:
                record = self._record()
                try:
                    record.ParseFromString(b"".join(parts))
                except Exception:  # protobuf's DecodeError, without importing protobuf for its name
                    break
                parts = []
                yield record
        self.torn = bool(parts) or at < len(self._content)
