"""The one door for a user's paths and for opening files that somebody else may have written; files written whole or not
at all, never through a link, and on the disk when the call returns."""

import contextlib
import errno
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from trainer.config.errors import UserError

NAMED_PATH = re.compile(r"([\w.-]+)=(.*)", re.ASCII)  # of --val-data
WEIGHTED_PATH = re.compile(r"(\S.*?)=([0-9]+\.?[0-9]*|\.[0-9]+)(?:\s+|$)")


def expand_user_path(text: str) -> str:
    """The path, with the home folder that a shell would put for `~` or `~name`; ValueError where nobody has it, and for
    what no file can be named."""
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"there is no home folder of {text.partition('/')[0]}; write ./~ for a name that begins so")
    with contextlib.suppress(UnicodeEncodeError):  # half of a pair of JSON's or YAML's `\\ud800`
        name = os.fsencode(path)
        if name and 0 not in name and len(name) < 4096 and max(map(len, name.split(b"/"))) <= 255:  # Linux's limits
            return path
    raise ValueError("expected a name of a file, at most 255 bytes between two slashes, 4,095 in all")


def split_weights(text: str) -> list[tuple[str, float]]:
    """(path, share) of each part of A=0.7 B=0.3; of any other text that text alone. UserError for a weight of 0."""
    matches = list(WEIGHTED_PATH.finditer(text))
    if len(matches) < 2 or "".join(match[0] for match in matches) != text:
        return [(text, 1.0)]
    total = math.fsum(float(match[2]) for match in matches)
    for match in matches:
        if not float(match[2]):
            raise UserError(f"--data {match[0].strip()}: expected a weight above 0, or leave it out")
    return [(os.path.expanduser(match[1]), float(match[2]) / total) for match in matches]


def name_val_sets(val_data: Sequence[str]) -> dict[str, str]:
    """{split: path} of each PATH or NAME=PATH: `val` of the first one, by which a run is judged, `val-NAME` of others.
    A path or hub id alone is named by its last part, without its ending. UserError where two have one name."""
    paths: dict[str, str] = {}
    for text in val_data:
        match = None if os.path.exists(text) else NAMED_PATH.fullmatch(text)  # as year=2025/events.csv
        stem = re.sub(r"(?<=.)\..*|[^\w-]+", "-", Path(text).name, flags=re.ASCII).strip("-")
        name, path = match.groups() if match else (stem or "data", text)
        if name in paths:
            raise UserError(f"--val-data {text}: a second set named {name}; expected --val-data OTHER_NAME={path}")
        paths[name] = path
    return {f"val-{name}" if number else "val": path for number, (name, path) in enumerate(paths.items())}


def name_data(source: str) -> str:
    """What --data names, without its place: the last part of a path or hub id, of a mixture each with its share."""
    parts = split_weights(source)
    return " ".join(f"{Path(part).name}={share:g}" if len(parts) > 1 else Path(part).name for part, share in parts)


def data_name(source: str) -> str:
    """The short name of a data source: the last part of each path or hub id, without its ending."""
    paths = (part.rstrip("/").rsplit("/", 1)[-1] for part, _ in split_weights(source))
    stem = "-".join(re.sub(r"\.\w+$", "", path) for path in paths)
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", stem).strip("-") or "data"


def path_from_environment(name: str, default: str) -> Path:
    """The path that a variable names, `default` where it is not set or empty; UserError for a `~` of nobody."""
    value = os.environ.get(name) or default
    try:
        return Path(expand_user_path(value))
    except ValueError as error:
        raise UserError(f"{name}={value}: {error}") from None


def open_plain_file(path: Path) -> io.BufferedReader:
    """The bytes of a file; OSError, whose `strerror` says what to do, for one that may not be read, and at once for a
    folder, a pipe, which would be waited for, or a device, which has no end."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except PermissionError as error:
        raise PermissionError(error.errno, "permission denied: let this user read it", str(path)) from None
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket
            raise
        file = os.open(os.devnull, os.O_RDONLY)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a plain file, but a folder, a pipe or a device", str(path))
    return os.fdopen(file, "rb")


def read_text_file(path: Path, name: str, expected: str) -> str:
    """The text of a plain file; UserError, which begins with `name` and ends with what is expected, for any other."""
    try:
        with io.TextIOWrapper(open_plain_file(path), encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{name}: cannot be read ({reason}); expected {expected}") from None


def require_utf8_path(path: Path, name: str) -> None:
    """UserError, which begins with `name`, for a folder whose path Arrow, safetensors and W&B cannot write to."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: its path is not UTF-8; name another folder") from None


def require_place_for_folder(folder: Path, name: str) -> None:
    """UserError, which begins with `name`, where no folder is or can be made that this user may write into: there, or
    above it, is something else. Nothing is made."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{name}: {existing} is not a folder; name another one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{name}: {existing} is read-only for this user; name another folder")


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write the new content of `path` to: it takes its place at the end, or on an error nothing. The
    temporary file has a random name and must not exist, so no link is followed; a link at `path` itself is replaced by
    the file. Raises OSError."""
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
    `previous`: what a folder of that name is then renamed to; left out, one that is not empty is an OSError."""
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


def free_path(path: Path) -> Path:
    """The first of `path.1`, `path.2` ... that is not there."""
    return next(free for n in itertools.count(1) if not os.path.lexists(free := path.with_name(f"{path.name}.{n}")))


def folder_size(folder: Path | None) -> int:
    """Bytes of all files under a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder and folder.exists() else 0


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.80} occurs twice in an object")
    return value


def _make_number(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text:.40} is larger than any float")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(text: str | bytes, *, with_nan: bool = False) -> Any:
    """The one value of a JSON text; ValueError for anything else, also for a key that occurs twice in an object, a
    number that no float holds, too deep a nesting, and NaN, which pandas writes for null, unless `with_nan`."""
    parse_constant = _make_number if with_nan else _refuse_constant
    try:
        return json.loads(text, object_pairs_hook=_make_object, parse_float=_make_number, parse_constant=parse_constant)
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
