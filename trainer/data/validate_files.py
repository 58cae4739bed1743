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
from trainer.data.sources import LONGEST_LINE, Source

CHUNK = 2**20
SETTLED = 2.0  # seconds; a file younger than that may change again without its time stamp showing it
_REMEMBERED = 1  # version of what is remembered of a file


@dataclass(frozen=True)
class FileFacts:
    """One file as it was when it was read: stamp is what the file system says of it, sha256 of its bytes."""

    stamp: tuple[int, ...]
    sha256: str


def stamp(file: Path) -> tuple[int, ...]:
    """(size, modified, changed, inode): differs after any write; the change time cannot be set back by a user."""
    facts = os.stat(file)
    return (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


def scan(source: Source, cache: Path) -> tuple[FileFacts, ...]:
    """The facts of every file of `source`; UserError at the first byte, line or row that cannot be used.

    Facts are remembered in `cache`, so that a large file that did not change is not read again at each start.
    """
    return tuple(_scan_file(source, file, cache / "files") for file in source.files)


def changed(source: Source, facts: tuple[FileFacts, ...]) -> UserError | None:
    """The error to raise when a file is no longer what it was when it was scanned."""
    for file, before in zip(source.files, facts, strict=True):
        try:
            same = stamp(file) == before.stamp or sha256(file) == before.sha256
        except OSError:
            same = False
        if not same:
            return UserError(
                f"{source.flag} {file}: the file changed while it was read; start again when it is complete"
            )
    return None


def sha256(file: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _scan_file(source: Source, file: Path, memory: Path) -> FileFacts:
    now = stamp(file)
    name = hashlib.sha256(f"{_REMEMBERED} {source.kind} {file.absolute()}".encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads((memory / name).read_text())
        if tuple(known["stamp"]) == now:
            return FileFacts(now, known["sha256"])
    if source.kind == "Parquet" and not sources.open_parquet(source, file).metadata.num_rows:
        raise UserError(f"{source.flag} {file}: has columns but no row; expected at least one record")
    facts = FileFacts(now, sha256(file) if source.kind in ("Parquet", "hub") else _check_text(source, file))
    if source.kind in ("CSV", "TSV"):
        _check_table(source, file)
    if time.time_ns() - max(now[1], now[2]) > SETTLED * 1e9:
        _remember(memory / name, asdict(facts))
    return facts


def _remember(path: Path, facts: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(facts))
        os.replace(unfinished, path)


def _check_text(source: Source, file: Path) -> str:
    """The hash of a text file that is UTF-8 throughout and has lines of a length that can be held in memory."""
    decoder, digest = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256()
    lines, since, by_line = 1, 0, source.kind != "JSON" or not sources.is_list(file)
    with open(file, "rb") as opened:
        while True:
            piece = opened.read(CHUNK)
            digest.update(piece)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as problem:
                at = max(problem.start - pending, 0)
                line = lines + piece[:at].count(b"\n")
                raise UserError(
                    f"{source.flag} {file}, line {line}: not UTF-8 (byte 0x{problem.object[problem.start]:02x}); "
                    "save the file as UTF-8"
                ) from None
            if not piece:
                return digest.hexdigest()
            lines += piece.count(b"\n")
            since = len(piece) - 1 - piece.rfind(b"\n") if b"\n" in piece else since + len(piece)
            if by_line and since > LONGEST_LINE:
                raise UserError(
                    f"{source.flag} {file}, line {lines}: longer than {LONGEST_LINE // 2**20} MB; "
                    f"a {source.kind} file is read line by line: break it into lines"
                )


def _mark(ended: list[bool]) -> Iterator[str]:
    """No line, and a note that one was asked for."""
    ended.append(True)
    yield from ()


def _check_table(source: Source, file: Path) -> None:
    """Refuse a CSV file without rows, or with a row that has not as many fields as the header."""
    names = sources.file_columns(source, file)
    row, begins = -1, 1
    limit = csv.field_size_limit(LONGEST_LINE)
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            ended: list[bool] = []
            reader = csv.reader(chain(opened, _mark(ended)), delimiter=sources.delimiter(source.kind))
            for cells in reader:
                if ended:  # it asked for another line in the middle of a row
                    raise csv.Error("the file ends within quotation marks")
                if cells:
                    row += 1
                    if len(cells) != len(names):
                        raise UserError(
                            f"{source.flag} {file}, row {row} (line {begins}): {len(cells)} fields where the header "
                            f"has {len(names)}; quote fields that hold a separator or a line break"
                        )
                begins = reader.line_num + 1
    except csv.Error as problem:
        raise UserError(
            f"{source.flag} {file}, row {row + 1} (line {begins}): not {source.kind} ({problem}); look for a quotation "
            "mark that is never closed"
        ) from None
    finally:
        csv.field_size_limit(limit)
    if row < 1:
        raise UserError(f"{source.flag} {file}: has a header but no row; expected at least one record")
