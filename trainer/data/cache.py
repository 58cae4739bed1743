"""A folder of prepared data by its key: every file covered by a hash, and named only when all of it is on the disk."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Strict, ValidationError

from trainer.config.errors import UserError
from trainer.config.fields import NonNegativeInt, Text
from trainer.config.files import new_folder, read_json_object, require_utf8_path, write_atomically
from trainer.config.run_metadata import DataBlock, SplitBlock
from trainer.data.readers import open_bytes
from trainer.data.sources import READ_ERRORS, Source, read_error

T = TypeVar("T")
FORMAT_VERSION: Literal[8] = 8  # of folder and texts; another one makes every earlier folder another
MANIFEST_FILE = "facts.json"
ABANDONED_AFTER_SECONDS = 24 * 3600.0  # after which an unfinished folder is taken for that of a killed run
SETTLE_SECONDS = 2.0  # a file younger than that may change again without its time stamp showing it


class _Counts(SplitBlock):
    examples: NonNegativeInt
    tokens: NonNegativeInt


class _Facts(DataBlock):
    """What every reader of the `data` block of run.json may count on; there is more in it."""

    form: Text
    notices: list[Text]
    train: _Counts
    val: _Counts
    test: _Counts
    retain: _Counts


class Manifest(BaseModel):
    """What facts.json says of a folder of prepared data."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal[8] = FORMAT_VERSION
    dtype: Literal["<u2", "<u4"]  #: numpy's name of the type of the ids
    pad_id: NonNegativeInt
    val_texts: list[Annotated[tuple[str, str], Strict(False)]]  #: the first validation records as (prompt, completion)
    facts: dict[str, Any]  #: the `data` block of run.json
    sha256: dict[str, str]  #: {file name: hash of its bytes, in hex}


def content_checksum(content: dict[str, Any]) -> str:
    """The hash that facts.json carries of everything else in it, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """What facts.json holds; ValueError, naming the folder, where anything is missing, of another type or changed."""
    try:
        content = read_json_object(folder / MANIFEST_FILE)
        if content.pop("checksum", None) != content_checksum(content):
            raise ValueError("changed since it was written")
        manifest = Manifest.model_validate(content)
        _Facts.model_validate(manifest.facts)
        if any("/" in name for name in manifest.sha256):
            raise ValueError("sha256 names a file outside the folder")
        return manifest
    except ValidationError as error:
        problem = error.errors()[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        raise ValueError(f"{folder} is not prepared data ({reason})") from None
    except (UserError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is not prepared data ({error})") from None


def resolve_cache_dir(override: Path | None = None) -> Path:
    """The cache folder: `override`, TRAINER_CACHE or gpt2-full-vs-lora under the user's cache folder; made here."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache_dir = override or Path(os.environ.get("TRAINER_CACHE") or user_cache / "gpt2-full-vs-lora").expanduser()
    require_utf8_path(cache_dir, f"{cache_dir}, the folder of prepared data (TRAINER_CACHE)")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(cache_dir, error) from None
    return cache_dir.absolute()


def load_or_build(
    folder: Path,
    cache_root: Path,
    load: Callable[[Path], T],
    write_contents: Callable[[Path], dict[str, Any]],
    log: Callable[[str], None] = lambda line: None,
) -> T:
    """What `load` makes of the folder, made anew where a file of it is missing or is not what was written there.

    `write_contents` fills a new folder and returns its manifest; the folder is named once all is on the disk. Several
    may make the same folder at once: the first to finish names it, the others throw theirs away.
    """
    was_there = folder.exists()
    try:
        _verify(folder, cache_root)
        return load(folder)
    except ValueError as error:
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
            contents = write_contents(temp_folder)
            hashes = {file.name: sha256(file) for file in sorted(temp_folder.iterdir())}
            manifest = Manifest(**contents, sha256=hashes).model_dump(mode="json")
            manifest["checksum"] = content_checksum(manifest)
            (temp_folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another run was first
            raise _write_error(folder.parent, error) from error
    return load(folder)


def _verify(folder: Path, cache_root: Path) -> None:
    """ValueError where a file of the folder is not what was written there.

    Hashes are remembered in `cache_root` while a file's size, times and inode do not change.
    """
    for name, expected in read_manifest(folder).sha256.items():
        file = folder / name
        try:
            is_same = file.is_file() and fingerprint_of(file, cache_root).sha256 == expected  # a pipe is waited for
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror})") from None
        if not is_same:
            raise ValueError(f"{file} is not what was written there")


def _write_error(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: prepared data cannot be written ({error.strerror or error}); make room, or name another folder "
        "by the environment variable TRAINER_CACHE"
    )


# --- the contents of files, remembered while they do not change ---


class FileFingerprint(NamedTuple):
    """A file as it was when it was read: what the file system says of it, and the hash of its bytes in hex.

    Of a compressed file the bytes are those that it holds.
    """

    stamp: tuple[int, ...]  #: size, modified, changed, inode: differs after any write
    sha256: str


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with open_bytes(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def stamp(file: Path) -> tuple[int, ...]:
    """What the file system says of a file; its change time cannot be set back by a user."""
    stat = os.stat(file)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def fingerprint_of(file: Path, cache_root: Path) -> FileFingerprint:
    """The fingerprint of a file, computed again only where its stamp is not the one remembered in `cache_root`."""
    current_stamp = stamp(file)
    record_file = cache_root / "files" / hashlib.sha256(os.fsencode(f"3 {file.absolute()}")).hexdigest()
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
        record = read_json_object(record_file)
        if tuple(record["stamp"]) == current_stamp and len(bytes.fromhex(record["sha256"])) == 32:
            return FileFingerprint(current_stamp, record["sha256"])
    fingerprint = FileFingerprint(current_stamp, sha256(file))
    if time.time_ns() - max(current_stamp[1], current_stamp[2]) > SETTLE_SECONDS * 1e9:
        with contextlib.suppress(OSError):  # it only saves time
            record_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record_file, json.dumps(fingerprint._asdict()))
    return fingerprint


def fingerprint_files(source: Source, cache_root: Path) -> tuple[FileFingerprint, ...]:
    """The fingerprints of the files of a source; UserError for one that cannot be read or decompressed."""
    fingerprints = []
    for file in source.files:
        try:
            fingerprints.append(fingerprint_of(file, cache_root))
        except READ_ERRORS as error:
            raise read_error(source, file, "the beginning", error) from None
    return tuple(fingerprints)


def find_change(source: Source, fingerprints: tuple[FileFingerprint, ...]) -> UserError | None:
    """The error to raise when a file is no longer what it was when it was hashed."""
    for file, fingerprint in zip(source.files, fingerprints, strict=True):
        try:
            is_same = stamp(file) == fingerprint.stamp or sha256(file) == fingerprint.sha256
        except READ_ERRORS:
            is_same = False
        if not is_same:
            return UserError(
                f"{source.flag} {file}: the file changed while it was read; start again when it is complete"
            )
    return None
