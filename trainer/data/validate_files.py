"""The contents of files: their hash, remembered while they do not change, and text that is not UTF-8."""

import codecs
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from trainer.config.errors import UserError, first_line
from trainer.config.files import write_atomically
from trainer.config.json_file import read_json_object
from trainer.data import readers
from trainer.data.readers import MAX_LINE_BYTES, READ_ERRORS, open_bytes
from trainer.data.sources import COMPRESSIONS, Source

CHUNK_BYTES = 2**20
SETTLE_SECONDS = 2.0  # seconds; a file younger than that may change again without its time stamp showing it
_RECORD_VERSION = 2  # version of what is remembered of a file


@dataclass(frozen=True)
class FileFingerprint:
    """One file as it was when it was read: stamp is what the file system says of it, sha256 of its bytes.

    Of a compressed file the bytes are those that it holds.
    """

    stamp: tuple[int, ...]
    sha256: str


def stamp(file: Path) -> tuple[int, ...]:
    """(size, modified, changed, inode): differs after any write; the change time cannot be set back by a user."""
    stat = os.stat(file)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def scan(source: Source, cache: Path) -> tuple[FileFingerprint, ...]:
    """The fingerprint of every file of `source`; UserError at the first byte or line that cannot be used.

    Fingerprints are remembered in `cache`, so that a large file that did not change is not read again at each start.
    """
    is_binary = source.kind in ("Parquet", "Arrow", "hub", "saved")
    compute_sha256 = sha256 if is_binary else partial(_check_text, source)
    return tuple(remembered_fingerprint(file, cache, source.kind, compute_sha256) for file in source.files)


def find_change(source: Source, fingerprints: tuple[FileFingerprint, ...]) -> UserError | None:
    """The error to raise when a file is no longer what it was when it was scanned."""
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


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with open_bytes(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def remembered_fingerprint(
    file: Path, cache: Path, purpose: str, compute_sha256: Callable[[Path], str]
) -> FileFingerprint:
    """The fingerprint of a file, computed again only where size, times or inode are not those remembered in `cache`."""
    current_stamp = stamp(file)
    key = os.fsencode(f"{_RECORD_VERSION} {purpose} {file.absolute()}")
    record_file = cache / "files" / hashlib.sha256(key).hexdigest()
    with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
        record = read_json_object(record_file)
        if tuple(record["stamp"]) == current_stamp and len(bytes.fromhex(record["sha256"])) == 32:
            return FileFingerprint(current_stamp, record["sha256"])
    fingerprint = FileFingerprint(current_stamp, compute_sha256(file))
    if time.time_ns() - max(current_stamp[1], current_stamp[2]) > SETTLE_SECONDS * 1e9:
        with contextlib.suppress(OSError):  # it only saves time
            record_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(record_file, json.dumps(asdict(fingerprint)))
    return fingerprint


def _check_text(source: Source, file: Path) -> str:
    """The hash of a text file that is UTF-8 throughout and has lines of a length that can be held in memory."""
    try:
        is_line_based = source.kind != "JSON" or not readers.is_json_list(file)
        return _scan_lines(source, file, is_line_based)
    except READ_ERRORS as error:
        if file.suffix.lower() not in COMPRESSIONS:
            raise
        reason = first_line(error)
        raise UserError(f"{source.flag} {file}: not a whole {file.suffix} file ({reason}); write it again") from None


def _scan_lines(source: Source, file: Path, is_line_based: bool) -> str:
    decoder, digest, line_number, line_length = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 1, 0
    with open_bytes(file) as stream:
        while True:
            chunk = stream.read(CHUNK_BYTES)
            digest.update(chunk)
            num_pending_bytes = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                error_offset = max(error.start - num_pending_bytes, 0)
                error_line = line_number + chunk[:error_offset].count(b"\n")
                raise UserError(
                    f"{source.flag} {file}, line {error_line}: not UTF-8 (byte 0x{error.object[error.start]:02x}); "
                    "save the file as UTF-8"
                ) from None
            if not chunk:
                return digest.hexdigest()
            line_number += chunk.count(b"\n")
            line_length = len(chunk) - 1 - chunk.rfind(b"\n") if b"\n" in chunk else line_length + len(chunk)
            if is_line_based and line_length > MAX_LINE_BYTES:
                raise UserError(
                    f"{source.flag} {file}, line {line_number}: longer than {MAX_LINE_BYTES // 2**20} MB; "
                    f"a {source.kind} file is read line by line: break it into lines"
                )
