"""The contents of the files of a source: their hash, and what is wrong with them, before any slow work."""

import codecs
import contextlib
import csv
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.data import sources
from trainer.data.sources import MAX_LINE_BYTES, Source

CHUNK_BYTES = 2**20
SETTLE_SECONDS = 2.0  # seconds; a file younger than that may change again without its time stamp showing it
_RECORD_VERSION = 1  # version of what is remembered of a file


@dataclass(frozen=True)
class FileFingerprint:
    """One file as it was when it was read: stamp is what the file system says of it, sha256 of its bytes."""

    stamp: tuple[int, ...]
    sha256: str


def stamp(file: Path) -> tuple[int, ...]:
    """(size, modified, changed, inode): differs after any write; the change time cannot be set back by a user."""
    stat = os.stat(file)
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def scan(source: Source, cache: Path) -> tuple[FileFingerprint, ...]:
    """The fingerprint of every file of `source`; UserError at the first byte, line or row that cannot be used.

    Fingerprints are remembered in `cache`, so that a large file that did not change is not read again at each start.
    """
    return tuple(_scan_file(source, file, cache / "files") for file in source.files)


def find_change(source: Source, fingerprints: tuple[FileFingerprint, ...]) -> UserError | None:
    """The error to raise when a file is no longer what it was when it was scanned."""
    for file, fingerprint in zip(source.files, fingerprints, strict=True):
        try:
            is_same = stamp(file) == fingerprint.stamp or sha256(file) == fingerprint.sha256
        except OSError:
            is_same = False
        if not is_same:
            return UserError(
                f"{source.flag} {file}: the file changed while it was read; start again when it is complete"
            )
    return None


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _scan_file(source: Source, file: Path, record_folder: Path) -> FileFingerprint:
    current_stamp = stamp(file)
    name = hashlib.sha256(f"{_RECORD_VERSION} {source.kind} {file.absolute()}".encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((record_folder / name).read_text())
        if tuple(record["stamp"]) == current_stamp:
            return FileFingerprint(current_stamp, record["sha256"])
    if source.kind == "Parquet" and not sources.open_parquet(source, file).metadata.num_rows:
        raise UserError(f"{source.flag} {file}: has columns but no row; expected at least one record")
    fingerprint = FileFingerprint(
        current_stamp, sha256(file) if source.kind in ("Parquet", "hub") else _check_text(source, file)
    )
    if source.kind in ("CSV", "TSV"):
        _check_csv(source, file)
    if time.time_ns() - max(current_stamp[1], current_stamp[2]) > SETTLE_SECONDS * 1e9:
        _save_record(record_folder / name, asdict(fingerprint))
    return fingerprint


def _save_record(path: Path, record: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        temp_path = path.with_name(f"{path.name}.{os.getpid()}")
        temp_path.write_text(json.dumps(record))
        os.replace(temp_path, path)


def _check_text(source: Source, file: Path) -> str:
    """The hash of a text file that is UTF-8 throughout and has lines of a length that can be held in memory."""
    decoder, digest = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256()
    line_number, line_length, is_line_based = 1, 0, source.kind != "JSON" or not sources.is_json_list(file)
    with open(file, "rb") as stream:
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


def _mark_end(end_marks: list[bool]) -> Iterator[str]:
    """No line, and a note that one was asked for."""
    end_marks.append(True)
    yield from ()


def _check_csv(source: Source, file: Path) -> None:
    """Refuse a CSV file without rows, or with a row that has not as many fields as the header."""
    names = sources.file_columns(source, file)
    row, line = -1, 1
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            end_marks: list[bool] = []
            reader = csv.reader(chain(stream, _mark_end(end_marks)), delimiter=sources.delimiter(source.kind))
            for cells in reader:
                if end_marks:  # it asked for another line in the middle of a row
                    raise csv.Error("the file ends within quotation marks")
                if cells:
                    row += 1
                    if len(cells) != len(names):
                        raise UserError(
                            f"{source.flag} {file}, row {row} (line {line}): {len(cells)} fields where the header "
                            f"has {len(names)}; quote fields that hold a separator or a line break"
                        )
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{source.flag} {file}, row {row + 1} (line {line}): not {source.kind} ({error}); look for a quotation "
            "mark that is never closed"
        ) from None
    finally:
        csv.field_size_limit(previous_limit)
    if row < 1:
        raise UserError(f"{source.flag} {file}: has a header but no row; expected at least one record")
