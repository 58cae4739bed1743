"""What becomes of the records of one split: rows of token ids in files, who they are, and what is left out."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer.config.choices import MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.config.settings import DataSettings
from trainer.data.chat import ChatTemplate, MaskError
from trainer.data.dataset import Row, TokenDataset, TokenIds, map_rows
from trainer.data.formats import Example, content_hash
from trainer.data.tokenizer import count_target_bytes, mark_targets

MAX_SAMPLE_CHARACTERS = 4000  # length of a validation pair that is kept for samples
MAX_REFERENCES = 16  # of one prompt that are kept
#: What makes no whole row: what is said of it, and the remedy where that leaves no row or is refused.
PROBLEMS = {
    "too long": ("records are longer than --block-size {} tokens and are left out", "raise --block-size"),
    "cut": ("conversations are cut at --block-size {} tokens", ""),
    "tools": ("conversations have tools, which the chat template does not write", ""),
    "unusable": (
        "conversations cannot be trained on and are left out",
        "correct them, leave them out with --unusable-records drop, or pass another --chat-template",
    ),
}


class SplitWriter:
    """Writes the rows of one split and hashes them; memory does not grow with them, but for ids of evaluation records.

    counts: what run.json says of the split; problems: {what made no whole row: (how many records, where the first is)}.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        settings: DataSettings,
        *,
        is_blocks: bool,
        dtype: str,
        tokenizer: Any,
        chat: ChatTemplate | None,
        is_seen: Sequence[bool] = (),
    ):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.tokenizer, self.chat, self._is_seen = tokenizer, chat, iter(is_seen)
        self.block_size, self.is_blocks = settings.block_size, is_blocks
        self.counts = {"records": 0, "examples": 0, "tokens": 0, "num_target_tokens": 0}
        self.problems: dict[str, tuple[int, str]] = {}
        self.example = ""  # the first training row, with its target tokens marked
        #: the first validation prompts, each with the records of it as (prompt, completion): references of one prompt
        self.texts: dict[str, list[tuple[str, str]]] = {}
        self.rows: list[tuple[str, str | None, bool]] = []  # (id, group, whether the record was seen before)
        self._files: dict[str, BinaryIO] = {
            name: open(folder / f"{split}.{name}.bin", "wb")  # noqa: SIM115
            for name in ("ids", "offsets", "mask")[: 2 if self.is_blocks else 3]
        }
        self._pending: TokenIds = np.empty(0, dtype=np.uint32)  # the tail of the texts, which fills no block yet
        self._pending_is_seen = np.empty(0, dtype=bool)  # whether each token of it is of a record that was seen
        self._num_left_out = 0  # tokens of earlier tails
        self._seen_blocks: list[bool] = []  # whether each block has such a token
        self._hash = hashlib.sha256(f"blocks {self.block_size}\n".encode() if self.is_blocks else b"completion \n")
        self._files["offsets"].write(bytes(8))

    def add(self, example: Example, row: Row | MaskError) -> None:
        """A record as a row, or joined to the text that is cut into blocks. A pair that is longer than a block is left
        out, a conversation is cut; what cannot be trained on is counted."""
        is_seen = next(self._is_seen, False)
        if isinstance(row, MaskError):
            self._add_problem("unusable", f"{example.where}: {row}")
            return
        if self.is_blocks:
            ids, is_target = row.ids, np.arange(len(row.ids)) > 0
        else:
            ids, is_target = row.ids[: self.block_size], row.is_target[: self.block_size]
            is_target[0] = False  # nothing stands before position 0 to predict it from
            if self.chat is not None and not is_target.any():
                problem = f"its assistant turns lie beyond --block-size {self.block_size} ({len(row.ids)} tokens)"
                self._add_problem("unusable", f"{example.where}: {problem}")
                return
        self.counts["records"] += 1
        key = row.prompt or f"record {self.counts['records']}"  # texts without a prompt share nothing
        has_room = (key in self.texts or len(self.texts) < MAX_NUM_SAMPLES) and (
            len(self.texts.get(key, ())) < MAX_REFERENCES
            and len(row.prompt) + len(row.completion) <= MAX_SAMPLE_CHARACTERS
        )
        if self.split == "val" and example.ids is None and has_room:
            self.texts.setdefault(key, []).append((row.prompt, row.completion))
        if len(row.ids) > self.block_size and not self.is_blocks:
            self._add_problem("cut" if self.chat else "too long", f"{example.where}, {len(row.ids)} tokens")
            if self.chat is None:
                return
        if self.split == "train" and self.tokenizer is not None and not self.example:
            self.example = mark_targets(self.tokenizer, ids, is_target)
        if self.is_blocks:
            stream = np.concatenate([self._pending, ids])
            full_length = len(stream) - len(stream) % self.block_size
            self._pending = stream[full_length:].copy()
            seen_tokens = np.concatenate([self._pending_is_seen, np.full(len(ids), is_seen)])
            self._seen_blocks += np.logical_or.reduce(
                seen_tokens[:full_length].reshape(-1, self.block_size), axis=1
            ).tolist()
            self._pending_is_seen = seen_tokens[full_length:]
            blocks = stream[:full_length].reshape(-1, self.block_size)
            self._append(blocks, len(blocks) * (self.block_size - 1))
            return
        if example.conversation and example.conversation.tools and self.chat and "tools" not in self.chat.template:
            self._add_problem("tools", example.where)
        # the lengths go into the hash, or rows cut elsewhere would have the same one
        mask = is_target.astype(np.uint8)
        if self.chat is not None:
            self._hash.update(np.asarray([len(ids)], dtype="<u4").tobytes() + mask.tobytes())
        else:
            self._hash.update(np.asarray([len(ids), int(mask.argmax()) or 1], dtype="<u4").tobytes())
        self._files["mask"].write(mask.tobytes())
        self._append(ids[None], int(mask.sum()))
        if self.split != "train":
            record_hash = content_hash(example.content())
            group = None if example.group is None else f"{content_hash(example.group):016x}"
            self.rows.append((f"{record_hash:016x}", group, is_seen))

    def end_part(self, share: float) -> None:
        """Let no block hold texts of two data sets that are mixed by weight."""
        self._hash.update(f"{self.counts['examples']} {share!r}\n".encode())
        self._num_left_out += len(self._pending)
        self._pending, self._pending_is_seen = self._pending[:0], self._pending_is_seen[:0]

    def _add_problem(self, kind: str, where: str) -> None:
        number, first = self.problems.get(kind, (0, where))
        self.problems[kind] = (number + 1, first)

    def _append(self, rows: TokenIds, num_target_tokens: int) -> None:
        num_rows, row_length = rows.shape
        self._hash.update(rows.astype("<u4").tobytes())
        self._files["ids"].write(rows.astype(self.dtype).tobytes())
        ends = self.counts["tokens"] + row_length * np.arange(1, num_rows + 1, dtype="<i8")
        self._files["offsets"].write(ends.tobytes())
        self.counts["examples"] += num_rows
        self.counts["tokens"] += num_rows * row_length
        self.counts["num_target_tokens"] += num_target_tokens

    def close(self) -> str:
        """Close the files, and return the fingerprint of the rows, in hex."""
        for file in self._files.values():
            file.close()
        return self._hash.hexdigest()

    def notices(self, unusable_records: str) -> list[str]:
        """One line for everything that was left out or cut; UserError where that is refused, or nothing is left."""
        lines, num_records = [], self.counts["records"] + self.problems.get("unusable", (0, ""))[0]
        if num_left_out := self._num_left_out + len(self._pending):
            lines.append(f"{self.split}: the last {num_left_out} tokens do not fill a block and are left out")
        for kind, (text, remedy) in PROBLEMS.items():
            number, first = self.problems.get(kind, (0, ""))
            line = f"{self.split}: {number} of {num_records} {text.format(self.block_size)} (first: {first})"
            if remedy and number and (number == num_records or (kind == "unusable" and unusable_records == "refuse")):
                raise UserError(f"{line.replace(' and are left out', '')}; {remedy}")
            lines += [line] if number else []
        return lines

    def _read_back(self) -> TokenDataset:
        """The rows, once the writer is closed."""
        return map_rows(self.folder, self.split, self.dtype, self.counts, "mask" in self._files)

    def write_row_info(self) -> dict[str, int]:
        """Write who the rows of an evaluation split are; returns the sums of it."""
        import pandas as pd

        dataset, rows = self._read_back(), self.rows
        if self.is_blocks:  # told apart by a hash of their token ids, as they are no single records
            hashes = [content_hash(dataset.row(i).astype("<u4").tobytes()) for i in range(len(dataset))]
            rows = [(f"{block:016x}", None, seen) for block, seen in zip(hashes, self._seen_blocks, strict=True)]
        frame = pd.DataFrame(rows, columns=["id", "group", "is_seen"])
        frame["occurrence"] = frame.groupby("id").cumcount()
        frame["targets"], frame["bytes"] = dataset.num_target_tokens(), count_target_bytes(self.tokenizer, dataset)
        frame.to_parquet(self.folder / f"{self.split}.rows.parquet", compression="zstd")
        units = {group or row_id for row_id, group, is_seen in rows if not is_seen}  # which an interval tells apart
        return {"target_bytes": int(frame["bytes"].sum()), "units": len(units)}
