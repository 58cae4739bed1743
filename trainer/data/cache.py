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
from trainer.data.token_dataset import SPLITS, TokenDataset, load_token_dataset

FORMAT_VERSION = 3  # of the folder and of the texts; a change of either makes every earlier folder another one
MANIFEST_FILE = "facts.json"
ABANDONED_AFTER_SECONDS = 24 * 3600.0  # seconds after which an unfinished folder is taken for that of a killed run


def resolve_cache_dir(override: Path | None = None) -> Path:
    """The cache folder: `override`, TRAINER_CACHE or gpt2-full-vs-lora under the user's cache folder; made here."""
    env_cache_dir = os.environ.get("TRAINER_CACHE")
    user_cache_root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache_dir = override or (
        Path(env_cache_dir).expanduser() if env_cache_dir else Path(user_cache_root) / "gpt2-full-vs-lora"
    )
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(cache_dir, error) from None
    return cache_dir.absolute()


def cache_key(key_parts: dict[str, Any]) -> str:
    """The name of the folder for what decides its contents."""
    content = json.dumps({"format": FORMAT_VERSION, **key_parts}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, TokenDataset]]:
    """(manifest, {split: dataset}); ValueError where the folder is not whole."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT_VERSION:
            raise ValueError(f"{folder} has format {manifest['format']}, not {FORMAT_VERSION}")
        datasets = {
            split: load_token_dataset(
                folder,
                split,
                dtype=manifest["dtype"],
                num_rows=manifest["facts"][split]["examples"],
                num_tokens=manifest["facts"][split]["tokens"],
            )
            for split in SPLITS
        }
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not prepared data ({error})") from error
    return manifest, datasets


def build(folder: Path, write_contents: Callable[[Path], dict[str, Any]]) -> None:
    """Have `write_contents` fill a new folder and return its manifest; the folder is named once all is on the disk.

    Several may build the same folder at once: the first to finish names it, the others throw theirs away.
    """
    _remove_abandoned(folder)
    temp_folder = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        temp_folder.mkdir(parents=True)
        manifest = {"format": FORMAT_VERSION, **write_contents(temp_folder)}
        (temp_folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in temp_folder.iterdir():
            _fsync(file)
        _fsync(temp_folder)
        _rename_into_place(temp_folder, folder)
        _fsync(folder.parent)
    except OSError as error:
        raise _write_error(folder.parent, error) from error
    finally:
        shutil.rmtree(temp_folder, ignore_errors=True)


def _rename_into_place(temp_folder: Path, folder: Path) -> None:
    for _ in range(3):
        try:
            return os.rename(temp_folder, folder)
        except OSError:
            if not folder.exists():
                raise
        with contextlib.suppress(ValueError):
            read(folder)
            return None  # another run was first
        broken_folder = folder.with_name(f"{folder.name}.broken-{uuid.uuid4().hex[:8]}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, broken_folder)
        shutil.rmtree(broken_folder, ignore_errors=True)
    raise OSError(f"{folder} is rewritten by another program")


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left of this folder; a young one may still be written."""
    for leftover in folder.parent.glob(f"{folder.name}.*-*"):
        with contextlib.suppress(OSError):
            newest_mtime = max(file.stat().st_mtime for file in (leftover, *leftover.iterdir()))
            if time.time() - newest_mtime > ABANDONED_AFTER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _fsync(path: Path) -> None:
    file_descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file_descriptor)
    finally:
        os.close(file_descriptor)


def _write_error(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: prepared data cannot be written ({error.strerror or error}); make room, or name another folder "
        "by the environment variable TRAINER_CACHE"
    )
