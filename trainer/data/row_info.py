"""Who each row of an evaluation split is: what a comparison of two runs pairs their losses by."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.token_dataset import TokenDataset


@dataclass(frozen=True, kw_only=True, eq=False)
class RowInfo:
    """Columns of one length, one entry a row.

    ids: 16 hex digits, a hash of the record's text, of the token ids where rows are blocks; groups: hash of what keeps
    rows together (--split-by, else the prompt), None where a row is a unit by itself; targets: counted tokens;
    num_bytes: UTF-8 bytes of their text, 0 where there is no tokenizer; in_train: whether the row equals a training
    record (or block).
    """

    ids: Sequence[str]
    groups: Sequence[str | None]
    targets: Sequence[int]
    num_bytes: Sequence[int]
    in_train: Sequence[bool]

    @property
    def num_units(self) -> int:
        """Groups, or rows that share none, that an interval can tell apart: those that equal no training record."""
        rows = zip(self.groups, self.ids, self.in_train, strict=True)
        return len({group or row_id for group, row_id, is_in_train in rows if not is_in_train})

    @property
    def occurrences(self) -> list[int]:
        """For each row the number of equal rows before it."""
        counts: Counter[str] = Counter()
        occurrences = []
        for row_id in self.ids:
            occurrences.append(counts[row_id])
            counts[row_id] += 1
        return occurrences


def content_hash(content: str | bytes) -> int:
    """64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()[:8], "big")


def hash_text(content: str | bytes) -> str:
    """`content_hash` as 16 hex digits."""
    return f"{content_hash(content):016x}"


def block_ids(dataset: TokenDataset) -> list[str]:
    """The ids of rows that are no single record: a hash of their token ids."""
    return [hash_text(dataset.row(i).astype("<u4").tobytes()) for i in range(len(dataset))]


def count_target_bytes(dataset: TokenDataset, tokenizer: Any) -> list[int]:
    """UTF-8 bytes of the targets of each row; the token that ends a text has none; all are 0 without a tokenizer."""
    if tokenizer is None:
        return [0] * len(dataset)
    bytes_by_id = _byte_level_lengths(tokenizer)
    rows = ((dataset.row(i), dataset.is_target(i)) for i in range(len(dataset)))
    if bytes_by_id is not None:
        return [int(bytes_by_id[ids[is_target]].sum()) for ids, is_target in rows]
    return [
        sum(sign * _decoded_bytes(tokenizer, ids[:edge]) for edge, sign in _target_edges(is_target))
        for ids, is_target in rows
    ]


def _target_edges(is_target: Any) -> list[tuple[int, int]]:
    """(place, -1 where a run of targets begins and 1 where it ends); the first token of a row is never one."""
    steps = np.diff(np.append(is_target.astype(np.int8), 0))
    return [(int(i) + 1, -int(steps[i])) for i in np.flatnonzero(steps)]


def _byte_level_lengths(tokenizer: Any) -> Any:
    """int64 [vocabulary]: bytes of each token, where tokens are runs of bytes (GPT-2, Llama 3, Qwen); else None."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if type(decoder).__name__ != "ByteLevel":
        return None
    vocabulary, added_tokens = tokenizer.get_vocab(), set(tokenizer.get_added_vocab())
    lengths = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)
    special_tokens = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token, token_id in vocabulary.items():
        if token not in special_tokens:  # each character of a token stands for one byte; added tokens are plain text
            lengths[token_id] = len(token.encode()) if token in added_tokens else len(token)
    return lengths


def _decoded_bytes(tokenizer: Any, ids: Any) -> int:
    return len(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode())


def row_info_file(folder: Path, split: str) -> Path:
    """Where the columns of `split` lie in a folder of prepared data."""
    return folder / f"{split}.rows.parquet"


def write_row_info(folder: Path, split: str, info: RowInfo) -> None:
    """Write the columns beside the rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "ids": pa.string(),
            "groups": pa.string(),
            "targets": pa.int32(),
            "num_bytes": pa.int32(),
            "in_train": pa.bool_(),
        }
    )
    pq.write_table(pa.table(vars(info), schema=schema), row_info_file(folder, split), compression="zstd")


def read_row_info(folder: Path, split: str) -> RowInfo:
    """What `write_row_info` left; ValueError where it is not whole."""
    import pyarrow.parquet as pq

    try:
        return RowInfo(**pq.read_table(row_info_file(folder, split)).to_pydict())
    except (OSError, TypeError) as error:
        raise ValueError(f"{row_info_file(folder, split)} is not whole ({error})") from error
