"""Files that somebody else may have written, read without a wait; files written whole or not at all, never through a
link, and on the disk when the call returns."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config.errors import UserError


def read_text_file(path: Path, name: str, expected: str) -> str:
    """The text of a regular file; UserError, which begins with `name` and ends with what is expected, for any other."""
    try:
        if path.exists() and not path.is_file():  # a named pipe would be waited for, a device has no end
            raise UserError(f"{name}: not a regular file; expected {expected}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{name}: cannot be read ({reason}); expected {expected}") from None


def require_utf8_path(path: Path, name: str) -> None:
    """UserError, which begins with `name`, for a folder whose path Arrow, safetensors and W&B cannot write to."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: its path is not UTF-8; name another folder") from None


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write the new content of `path` to: it takes its place at the end, or on an error nothing.

    The temporary file has a random name and must not exist, so no link is followed; a link at `path` itself is
    replaced by the file. Raises OSError.
    """
    temporary_path = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary_path, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary_path, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary_path)
        raise
    fsync_path(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole file at once; text as UTF-8, with what is no text (names from the file system) as it was."""
    with replace_atomically(path) as file:
        file.write(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(folder: Path, *, previous: Path | None = None) -> Iterator[Path]:
    """An empty folder to fill: it is named `folder` once all of its files are on the disk, or on an error removed.

    `previous`: what a folder of that name is then renamed to; left out, one that is not empty is an OSError.
    """
    temporary_folder = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    temporary_folder.mkdir(parents=True)
    try:
        yield temporary_folder
        for path in (*temporary_folder.rglob("*"), temporary_folder):
            fsync_path(path)
        if previous is not None and folder.exists():  # now, and not before the disk has all of the new one
            os.rename(folder, previous)
        os.rename(temporary_folder, folder)
    except BaseException:
        shutil.rmtree(temporary_folder, ignore_errors=True)
        raise
    fsync_path(folder.parent)


def fsync_path(path: Path) -> None:
    """Hand a file, or the names in a folder, to the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder`."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 12}.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def folder_size(folder: Path | None) -> int:
    """Bytes of all files under a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder and folder.exists() else 0


def parse_json(text: str | bytes, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; ValueError for anything else, also for NaN, Infinity and too deep a nesting."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json_object(path: Path, name: str = "") -> dict[str, Any]:
    """The object that a regular file holds; UserError, which begins with `name` or the path, where it holds none."""
    name = name or str(path)
    try:
        value = parse_json(read_text_file(path, name, "JSON"))
    except ValueError as error:
        raise UserError(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{name}: not a JSON object; expected one")
    return value
