"""A folder of prepared rows of token ids: named when it is whole, all of it covered by hashes; mapped, not read."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.errors import UserError
from trainer.config.files import new_folder, path_from_environment, read_json_object, require_utf8_path
from trainer.data.readers import open_bytes

if TYPE_CHECKING:
    import pandas as pd

Int64 = NDArray[np.int64]
TokenIds = NDArray[np.uint32]
FORMAT_VERSION = 13  # of folder and texts; another one makes every earlier folder another
MANIFEST_FILE = "facts.json"
SPLITS = ("train", "val", "test", "retain")  # the last: what the base model should still know
ABANDONED_AFTER_SECONDS = 24 * 3600.0  # after which an unfinished folder is taken for that of a killed run


@dataclass(frozen=True, eq=False)
class TokenDataset:
    """The examples of one split (training, validation, test or retain); row i is ids[offsets[i]:offsets[i + 1]].

    ids: [tokens] uint16 or uint32, memory-mapped; offsets: int64 [n + 1]; target_mask: uint8 [tokens], 1 for the target
    tokens, None: all but the first of each row, which nothing stands before to predict.
    """

    ids: NDArray[np.unsignedinteger]
    offsets: Int64
    target_mask: NDArray[np.uint8] | None = None
    #: (rows, share of the examples) of each data set of a mixture by weight, in the order of the rows
    mixture: tuple[tuple[int, float], ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Int64:
        """Tokens of each row, int64 [n]."""
        return np.diff(self.offsets)

    def num_target_tokens(self, rows: Int64 | None = None) -> Int64:
        """Target tokens of each of `rows`, all where it is None; int64 [rows]."""
        return self._num_targets if rows is None else self._num_targets[rows]

    @cached_property
    def _num_targets(self) -> Int64:
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


@dataclass(frozen=True, eq=False)
class Row:
    """One record as tokens; `prompt` and `completion` are the texts before and of its last target tokens."""

    ids: TokenIds  #: [length]
    is_target: NDArray[np.bool_]  #: [length]
    prompt: str
    completion: str


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
        """Who the rows of a split other than "train" are, by which a comparison pairs the losses of two runs.

        id: 16 hex digits, a hash of the record's text, of the token ids where rows are blocks; occurrence: equal rows
        before it; group: hash of what keeps rows together (--split-by, else the prompt), None where a row is a unit by
        itself; targets: target tokens; bytes: UTF-8 bytes of their text, 0 where there is no tokenizer; is_seen:
        whether it is a record that was seen before (`trainer.data.unseen`), or a block with part of one. ValueError
        where the folder is not whole.
        """
        import pandas as pd

        file = self.folder / f"{split}.rows.parquet"
        try:
            return pd.read_parquet(file)
        except OSError as error:
            raise ValueError(f"{file} is not whole ({error})") from error

    def num_target_bytes(self, split: str) -> int:
        """UTF-8 bytes of the targets of a split other than "train", 0 where the text is not known."""
        return int(self.metadata[split].get("target_bytes", 0))


def load(folder: Path, *, source: str | None = None) -> PreparedDataset:
    """What `prepare` left in `folder`, mapped, not read; ValueError where it is not whole.

    `source`: what the user typed this time; equal contents under another name share a folder.
    """
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


# --- the folder ---


def resolve_cache_dir() -> Path:
    """The cache folder: TRAINER_CACHE, or gpt2-full-vs-lora under the user's cache folder; made here."""
    if os.environ.get("TRAINER_CACHE"):
        cache_dir = path_from_environment("TRAINER_CACHE", "")
    else:
        cache_dir = path_from_environment("XDG_CACHE_HOME", "~/.cache") / "gpt2-full-vs-lora"
    require_utf8_path(cache_dir, f"{cache_dir}, the folder of prepared data (TRAINER_CACHE)")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(cache_dir, error) from None
    return cache_dir.absolute()


def _write_error(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: prepared data cannot be written ({error.strerror or error}); make room, or name another folder "
        "by the environment variable TRAINER_CACHE"
    )


def sha256(file: Path) -> str:
    """The hash of what a file holds, decompressed, in hex."""
    with open_bytes(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _content_checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What facts.json holds; ValueError, naming the folder, where it is not what was written.

    facts: the `data` block of run.json; dtype: numpy's name of the type of the ids; val_texts: the first validation
    records as (prompt, completion); sha256: {file name: hash of its bytes}; checksum: the hash of all these.
    """
    try:
        content = read_json_object(folder / MANIFEST_FILE)
    except UserError as error:
        raise ValueError(f"{folder} is not prepared data ({error})") from None
    if content.pop("checksum", None) != _content_checksum(content):
        raise ValueError(f"{folder} is not prepared data ({MANIFEST_FILE} was changed since it was written)")
    return content


def load_or_build(
    folder: Path,
    write_contents: Callable[[Path], dict[str, Any]],
    *,
    source: str,
    log: Callable[[str], None] = lambda line: None,
) -> PreparedDataset:
    """What is in the folder, made anew where a file of it is missing or is not what was written there.

    `write_contents` fills a new folder and returns its manifest; the folder is named once all is on the disk. Several
    may make the same folder at once: the first to finish names it, the others throw theirs away.
    """
    was_there = folder.exists()
    try:
        for name, expected in read_manifest(folder)["sha256"].items():
            if not (folder / name).is_file() or sha256(folder / name) != expected:  # a pipe would be waited for
                raise ValueError(f"{folder / name} is not what was written there")
        return load(folder, source=source)
    except (OSError, ValueError) as error:
        problem = error
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of killed runs; a young one may still be written
        with contextlib.suppress(OSError):
            newest_mtime = max(file.stat().st_mtime for file in (leftover, *leftover.iterdir()))
            if time.time() - newest_mtime > ABANDONED_AFTER_SECONDS:
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
