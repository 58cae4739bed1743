"""Prepared rows of token ids: a writer for each split, and their folder, named when whole, hashed, mapped."""

import contextlib
import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trainer.config.choices import MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.config.files import new_folder, open_plain_file, path_from_environment, read_json_object, require_utf8_path
from trainer.config.text import shorten
from trainer.data.chat import ChatTemplate, MaskError
from trainer.data.formats import Example, content_hash
from trainer.data.tokenizer import Row, TokenIds, count_target_bytes, mark_targets

if TYPE_CHECKING:
    import pandas as pd

Int64 = NDArray[np.int64]
FORMAT_VERSION = 15  # of folder and texts; another one makes every earlier folder another
MANIFEST_FILE = "facts.json"
EXCERPT_TOKENS = 24  # of a record, by which people know it
ABANDONED_SECONDS = 24 * 3600.0  # after which an unfinished folder is taken for that of a killed run
SPLITS = ("train", "val", "test", "retain")  # the last: what the base model should still know
MAX_SAMPLE_CHARACTERS = 4000  # length of a validation pair that is kept for samples
MAX_REFERENCES = 16  # of one prompt that are kept
#: What makes no whole row: what is said of it, and the remedy where that leaves no row or is refused.
PROBLEMS = {
    "too long": ("records are longer than --block-size {} tokens and are left out", "raise --block-size"),
    "cut": ("conversations are cut at --block-size {} tokens", ""),
    "tools": ("conversations have tools, which the chat template does not write", ""),
    "unusable": ("conversations cannot be trained on and are left out", "correct them or pass --unusable-records drop"),
}


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """The examples of one split; row i is ids[offsets[i]:offsets[i + 1]]."""

    ids: NDArray[np.unsignedinteger]  #: [tokens], memory-mapped
    offsets: Int64  #: [n + 1]
    target_mask: NDArray[np.uint8] | None = None  #: [tokens], 1 for target tokens; None: all but the first of each row
    #: (rows, share of the examples) of each data set of a mixture by weight, in the order of the rows
    mixture: tuple[tuple[int, float], ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Int64:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    @cached_property
    def num_target_tokens(self) -> Int64:
        """Target tokens of each row, int64 [n]."""
        if self.target_mask is None or not len(self):
            return self.lengths() - 1
        return np.add.reduceat(self.target_mask, self.offsets[:-1], dtype=np.int64)

    def row(self, i: int) -> Int64:
        """The token ids of row i, int64 [length]."""
        return np.asarray(self.ids[self.offsets[i] : self.offsets[i + 1]], dtype=np.int64)

    def is_target(self, i: int) -> NDArray[np.bool_]:
        """Whether each token of row i counts in the loss, bool [length]."""
        if self.target_mask is not None:
            return np.asarray(self.target_mask[self.offsets[i] : self.offsets[i + 1]], dtype=bool)
        return np.arange(self.offsets[i + 1] - self.offsets[i]) > 0


NO_ROWS = TokenDataset(ids=np.empty(0, dtype=np.uint16), offsets=np.zeros(1, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class PreparedDataset:
    """Data ready to train on. metadata: the `data` block of run.json; val_texts: the first validation records as
    (prompt, completion); test, retain: without a row where there is no such split."""

    train: TokenDataset
    val: TokenDataset
    metadata: dict[str, Any]
    val_texts: tuple[tuple[str, str], ...]
    folder: Path
    test: TokenDataset = NO_ROWS
    retain: TokenDataset = NO_ROWS
    val_sets: Mapping[str, TokenDataset] = field(default_factory=dict)  #: {name: rows} of each further --val-data

    def row_info(self, split: str) -> "pd.DataFrame":
        """Who the rows of a split other than "train" are; ValueError where the folder is not whole.

        id: hash of the record's text, or of a block's token ids; occurrence: equal rows before it; group: hash of what
        keeps rows together (--split-by, else the prompt) or None; targets: target tokens; bytes: UTF-8 bytes of their
        text; is_seen: whether the record was seen before (`trainer.data.unseen`), or a part of the block; excerpt: a
        line of it, where its target tokens begin.
        """
        import pandas as pd

        file = self.folder / f"{split}.rows.parquet"
        try:
            return pd.read_parquet(file)
        except OSError as error:
            raise ValueError(f"{file} is not whole ({error})") from error


def load(folder: Path, *, source: str | None = None) -> PreparedDataset:
    """What `prepare` left in `folder`, mapped, not read; ValueError where it is not whole. `source`: what the user
    typed this time, as equal contents share a folder."""
    manifest = read_manifest(folder)
    facts, file_hashes = manifest["facts"], manifest["sha256"]
    datasets = {
        split: map_rows(folder, split, manifest["dtype"], facts[split], f"{split}.mask.bin" in file_hashes)
        for split in (*SPLITS, *(f"val-{name}" for name in facts["val_sets"]))
    }
    mixture = tuple((part["examples"], part["share"]) for part in facts["mixture"])
    datasets["train"] = replace(datasets["train"], mixture=mixture)
    return PreparedDataset(
        val_sets={name: datasets.pop(f"val-{name}") for name in facts["val_sets"]},
        **datasets,
        metadata={**facts, "source": source or facts["source"]},
        val_texts=tuple((prompt, completion) for prompt, completion in manifest["val_texts"]),
        folder=folder,
    )


def map_rows(folder: Path, split: str, dtype: str, counts: dict[str, int], has_mask: bool) -> TokenDataset:
    """The arrays of a split; ValueError where a file is missing or not of the size it must have."""

    def map_file(name: str, array_dtype: str, length: int) -> NDArray[Any]:
        path, num_bytes = folder / f"{split}.{name}.bin", length * np.dtype(array_dtype).itemsize
        if not path.is_file() or path.stat().st_size != num_bytes:
            raise ValueError(f"{path} is not a file of {num_bytes} bytes")
        # an empty file cannot be mapped
        return np.memmap(path, dtype=array_dtype, mode="r") if length else np.empty(0, dtype=array_dtype)

    return TokenDataset(
        ids=map_file("ids", dtype, counts["tokens"]),
        offsets=map_file("offsets", "<i8", counts["examples"] + 1),
        target_mask=map_file("mask", "|u1", counts["tokens"]) if has_mask else None,
    )


def resolve_cache_dir() -> Path:
    """The cache folder: TRAINER_CACHE, or gpt2-full-vs-lora under the user's cache folder; made here."""
    default = path_from_environment("XDG_CACHE_HOME", "~/.cache") / "gpt2-full-vs-lora"
    cache_dir = path_from_environment("TRAINER_CACHE", str(default))
    require_utf8_path(cache_dir, f"{cache_dir}, the folder of prepared data (TRAINER_CACHE)")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(cache_dir, error) from None
    return cache_dir.absolute()


def _write_error(folder: Path, error: OSError) -> UserError:
    reason = error.strerror or error
    return UserError(f"{folder}: prepared data cannot be written ({reason}); make room, or set TRAINER_CACHE")


def sha256(file: Path) -> str:
    """The hash of a plain file's content, in hex; OSError for anything else, a pipe at once."""
    with open_plain_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _content_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What facts.json holds: facts (the `data` block of run.json), dtype of the ids, val_texts (see PreparedDataset),
    sha256 ({file name: hash}) and checksum, of all these. ValueError, naming the folder, where it is another."""
    try:
        content = read_json_object(folder / MANIFEST_FILE)
    except UserError as error:
        raise ValueError(f"{folder} is not prepared data ({error})") from None
    if content.pop("checksum", None) != _content_checksum(content):
        raise ValueError(f"{folder} is not prepared data ({MANIFEST_FILE} was changed since it was written)")
    return content


def load_or_build(
    folder: Path, write_contents: Callable[[Path], dict[str, Any]], *, source: str, log: Callable[[str], None]
) -> PreparedDataset:
    """What is in the folder, made anew where a file of it is not what was written there: `write_contents` fills a new
    one and returns its manifest. Of several that make one folder at once the first to finish names it."""
    was_there = folder.exists()
    try:
        for name, expected in read_manifest(folder)["sha256"].items():
            if sha256(folder / name) != expected:
                raise ValueError(f"{folder / name} is not what was written there")
        return load(folder, source=source)
    except (OSError, ValueError) as error:
        problem = error
    for leftover in folder.parent.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            age = time.time() - max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
            if age > ABANDONED_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)
    try:
        if was_there:  # one that came since then is another run's, and whole
            log(f"prepared data are damaged and are made anew ({problem})")
            shutil.rmtree(folder)
        with new_folder(folder) as temp_folder:
            manifest = write_contents(temp_folder)
            manifest["sha256"] = {file.name: sha256(file) for file in sorted(temp_folder.iterdir())}
            manifest["checksum"] = _content_checksum(manifest)
            (temp_folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another run was first
            raise _write_error(folder.parent, error) from error
    return load(folder, source=source)


class SplitWriter:
    """Writes the rows of one split and hashes them; memory does not grow with them, but for ids of evaluation records.
    counts, parts: what run.json says of the split, and of each data set of a mixture; problems: {what made no whole
    row: (how many records, where the first is)}; texts: {one of the first validation prompts: its records}."""

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        block_size: int,
        is_blocks: bool,
        dtype: str,
        tokenizer: Any,
        chat: ChatTemplate | None,
        is_seen: Sequence[bool] = (),
    ):
        self.folder, self.split, self.dtype = folder, split, dtype
        self.tokenizer, self.chat, self._is_seen = tokenizer, chat, iter(is_seen)
        self.block_size, self.is_blocks = block_size, is_blocks
        self.counts = {"records": 0, "examples": 0, "tokens": 0, "num_target_tokens": 0}
        self.parts: list[dict[str, Any]] = []
        self.problems: dict[str, tuple[int, str]] = {}
        self.example = ""
        self.texts: dict[str, list[tuple[str, str]]] = {}
        self.rows: list[tuple[str, str | None, bool]] = []  # (id, group, whether the record was seen before)
        self._files: dict[str, BinaryIO] = {
            name: open(folder / f"{split}.{name}.bin", "wb")  # noqa: SIM115
            for name in ("ids", "offsets", "mask")[: 2 if is_blocks else 3]
        }
        self._pending: TokenIds = np.empty(0, dtype=np.uint32)  # the tail of the texts, which fills no block yet
        self._num_left_out = 0  # tokens of earlier tails
        self._seen_blocks = set[int]()  # numbers of the blocks with a part of a record that was seen
        self._hash = hashlib.sha256(f"blocks {self.block_size}\n".encode() if is_blocks else b"completion \n")
        self._files["offsets"].write(bytes(8))

    def add(self, example: Example, row: Row | MaskError) -> None:
        """A record as a row, or joined to what is cut in blocks. A pair longer than one is left out, a chat cut."""
        is_seen = next(self._is_seen, False)
        if isinstance(row, MaskError):
            self._add_problem("unusable", f"{example.where}: {row}")
            return
        ids, is_target = row.ids, np.arange(len(row.ids)) > 0  # nothing stands before position 0 to predict it from
        if not self.is_blocks:
            ids, is_target = ids[: self.block_size], (is_target & row.is_target)[: self.block_size]
        self.counts["records"] += 1
        key = row.prompt or f"record {self.counts['records']}"  # texts without a prompt share nothing
        is_kept = self.split == "val" and len(row.prompt) + len(row.completion) <= MAX_SAMPLE_CHARACTERS
        if is_kept and (key in self.texts or len(self.texts) < MAX_NUM_SAMPLES):
            references = self.texts.setdefault(key, [])
            references += [(row.prompt, row.completion)] if len(references) < MAX_REFERENCES else []
        if len(row.ids) > self.block_size and not self.is_blocks:
            self._add_problem("cut" if example.conversation else "too long", f"{example.where}, {len(row.ids)} tokens")
            if example.conversation is None:
                return
        if self.split == "train" and not self.example:
            self.example = mark_targets(self.tokenizer, ids, is_target)
        if self.is_blocks:
            self._add_blocks(ids, is_seen)
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
            group = None if example.group is None else f"{content_hash(example.group):016x}"
            self.rows.append((f"{content_hash(example.content()):016x}", group, is_seen))

    def _add_blocks(self, ids: TokenIds, is_seen: bool) -> None:
        start = self.counts["tokens"] + len(self._pending)
        if is_seen:
            self._seen_blocks |= set(range(start // self.block_size, -(-(start + len(ids)) // self.block_size)))
        stream = np.concatenate([self._pending, ids])
        full_length = len(stream) - len(stream) % self.block_size
        blocks, self._pending = stream[:full_length].reshape(-1, self.block_size), stream[full_length:].copy()
        self._append(blocks, len(blocks) * (self.block_size - 1))

    def end_part(self, source: str, share: float) -> None:
        """Let no block hold texts of two data sets that are mixed by weight."""
        num_examples = self.counts["examples"] - sum(part["examples"] for part in self.parts)
        self.parts.append({"source": source, "share": share, "examples": num_examples})
        self._hash.update(f"{self.counts['examples']} {share!r}\n".encode())
        self._num_left_out += len(self._pending)
        self._pending = self._pending[:0]

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
        for kind, (number, first) in self.problems.items():
            text, remedy = PROBLEMS[kind]
            line = f"{self.split}: {number} of {num_records} {text.format(self.block_size)} (first: {first})"
            if remedy and (number == num_records or (kind == "unusable" and unusable_records == "refuse")):
                raise UserError(f"{line.replace(' and are left out', '')}; {remedy}")
            lines.append(line)
        return lines

    def write_row_info(self) -> dict[str, int]:
        """Write who the rows of an evaluation split are, once the writer is closed; returns the sums of it."""
        import pandas as pd

        dataset, rows = map_rows(self.folder, self.split, self.dtype, self.counts, not self.is_blocks), self.rows
        if self.is_blocks:  # told apart by a hash of their token ids, as they are no single records
            hashes = (content_hash(dataset.row(i).astype("<u4").tobytes()) for i in range(len(dataset)))
            rows = [(f"{block:016x}", None, i in self._seen_blocks) for i, block in enumerate(hashes)]
        frame = pd.DataFrame(rows, columns=["id", "group", "is_seen"])
        frame["occurrence"] = frame.groupby("id").cumcount()
        frame["targets"], frame["bytes"] = dataset.num_target_tokens, count_target_bytes(self.tokenizer, dataset)
        starts = (max(0, int(dataset.is_target(i).argmax()) - EXCERPT_TOKENS // 2) for i in range(len(dataset)))
        ids = (dataset.row(i)[start : start + EXCERPT_TOKENS] for i, start in enumerate(starts))
        frame["excerpt"] = [shorten(self.tokenizer.decode(some, skip_special_tokens=True), 60) for some in ids]
        frame.to_parquet(self.folder / f"{self.split}.rows.parquet", compression="zstd")
        units = {group or row_id for row_id, group, is_seen in rows if not is_seen}  # which an interval tells apart
        return {"target_bytes": int(frame["bytes"].sum()), "units": len(units)}
