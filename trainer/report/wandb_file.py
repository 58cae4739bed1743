"""The file of an offline W&B run, read without wandb's own reader, which takes twice as long and flattens configs."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.report.run_data import RunReadError

_BLOCK_BYTES = 32_768
_MAGIC = b":W&B"
_CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_RECORD_START_KINDS, _RECORD_END_KINDS = (
    (1, 2),
    (1, 4),
)  # kinds of chunk that begin and end a record: 1 whole, 2 first, 3 middle, 4 last


class RecordReader:
    """The records of a .wandb file in order: leveldb's log format around protobuf messages.

    `is_truncated` is True after a file that ends within a record, as a killed process leaves it.
    """

    def __init__(self, file: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        from wandb.proto.wandb_internal_pb2 import Record

        self._record_class = Record
        try:
            self._content = file.read_bytes()
        except OSError as error:
            raise RunReadError(f"cannot read {file.name} ({error.strerror})") from error
        if not self._content.startswith(_MAGIC):
            raise RunReadError(f"{file.name} is not a W&B run file")
        self.is_truncated = False

    def __iter__(self) -> Iterator[Any]:
        parts: list[bytes] = []
        offset = 7  # 4 bytes name, 2 magic number, 1 version
        while offset + _CHUNK_HEADER.size <= len(self._content):
            bytes_left = _BLOCK_BYTES - offset % _BLOCK_BYTES
            if bytes_left < _CHUNK_HEADER.size:  # too little room for a chunk: the rest of the block is padding
                offset += bytes_left
                continue
            _, length, kind = _CHUNK_HEADER.unpack_from(self._content, offset)
            offset += _CHUNK_HEADER.size
            if kind == 0 or kind > 4 or offset + length > len(self._content):
                break
            if kind in _RECORD_START_KINDS:
                parts = []
            parts.append(self._content[offset : offset + length])
            offset += length
            if kind in _RECORD_END_KINDS:
                record = self._record_class()
                try:
                    record.ParseFromString(b"".join(parts))
                except Exception:  # protobuf's DecodeError, without importing protobuf for its name
                    break
                parts = []
                yield record
        self.is_truncated = bool(parts) or offset < len(self._content)
