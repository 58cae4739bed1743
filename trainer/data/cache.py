"""A folder of prepared data by its key: written under another name, made durable, and only then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.data.token_dataset import Rows, read_rows, row_files

FORMAT = 2  # of the folder and of the texts; a change of either makes every earlier folder another one
FACTS = "facts.json"
ABANDONED = 24 * 3600.0  # seconds after which an unfinished folder is taken for that of a killed run


def root(given: Path | None = None) -> Path:
    """The cache folder: given, TRAINER_CACHE, or gpt2-full-vs-lora under the user's cache folder; made if missing."""
    named = os.environ.get("TRAINER_CACHE")
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = given or (Path(named).expanduser() if named else Path(users) / "gpt2-full-vs-lora")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise _no_room(folder, problem) from None
    return folder.absolute()


def key_of(parts: dict[str, Any]) -> str:
    """The name of the folder for what decides its contents."""
    told = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def read(folder: Path) -> tuple[dict[str, Any], Rows, Rows]:
    """(stored facts, train rows, validation rows); ValueError where the folder is not whole."""
    try:
        stored = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError(f"{folder} has format {stored['format']}, not {FORMAT}")
        sides = [
            read_rows(
                folder,
                side,
                dtype=stored["dtype"],
                rows=stored["facts"][side]["examples"],
                tokens=stored["facts"][side]["tokens"],
            )
            for side in ("train", "val")
        ]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{folder} is not prepared data ({problem})") from problem
    return stored, sides[0], sides[1]


def build(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Have `fill` write a new folder and return its facts; it gets its name only when all of it is on the disk.

    Several may build the same folder at once: the first to finish names it, the others throw theirs away.
    """
    _sweep(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        unfinished.mkdir(parents=True)
        stored = {"format": FORMAT, **fill(unfinished)}
        (unfinished / FACTS).write_text(json.dumps(stored, indent=1), encoding="utf-8")
        for file in (
            *row_files(unfinished, "train").values(),
            *row_files(unfinished, "val").values(),
            unfinished / FACTS,
        ):
            _sync(file)
        _sync(unfinished)
        _name(unfinished, folder)
        _sync(folder.parent)
    except OSError as problem:
        raise _no_room(folder.parent, problem) from problem
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _name(unfinished: Path, folder: Path) -> None:
    for _ in range(3):
        try:
            return os.rename(unfinished, folder)
        except OSError:
            if not folder.exists():
                raise
        with contextlib.suppress(ValueError):
            read(folder)
            return None  # another run was first
        broken = folder.with_name(f"{folder.name}.broken-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, broken)
        shutil.rmtree(broken, ignore_errors=True)
    raise OSError(f"{folder} is rewritten by another program")


def _sweep(folder: Path) -> None:
    """Remove what killed runs left of this folder; a young one may still be written."""
    for left in folder.parent.glob(f"{folder.name}.*-*"):
        with contextlib.suppress(OSError):
            newest = max(file.stat().st_mtime for file in (left, *left.iterdir()))
            if time.time() - newest > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _no_room(folder: Path, problem: OSError) -> UserError:
    return UserError(
        f"{folder}: prepared data cannot be written ({problem.strerror or problem}); make room, or name another folder "
        "by the environment variable TRAINER_CACHE"
    )
