"""A folder of prepared data by its key: written under another name, made durable, and only then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.files import fsync_path, require_utf8_path
from trainer.config.json_file import read_json_object
from trainer.data.token_dataset import SPLITS, TokenDataset, array_files, load_token_dataset
from trainer.data.validate_files import remembered_fingerprint, sha256

FORMAT_VERSION = 6  # of the folder and of the texts; a change of either makes every earlier folder another one
MANIFEST_FILE = "facts.json"
REQUIRED_ARRAYS = ("ids", "offsets", "first")
#: What every reader of the `data` block of run.json may count on.
FACT_TYPES = {"source": str, "form": str, "fingerprint": str, "objective": str, "vocabulary": int, "notices": list}
ABANDONED_AFTER_SECONDS = 24 * 3600.0  # seconds after which an unfinished folder is taken for that of a killed run


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What facts.json says of a folder of prepared data."""

    dtype: str  #: numpy's name of the type of the ids
    pad_id: int
    val_texts: list[tuple[str, str]]  #: the first validation records as (prompt, completion)
    facts: dict[str, Any]  #: the `data` block of run.json
    sha256: dict[str, str]  #: {file name: hash of its bytes, in hex}

    def to_json(self) -> str:
        """The text of facts.json, which carries its own hash; `read_manifest` reads it back."""
        content = {"format": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**content, "checksum": content_checksum(content)}, indent=1)


def content_checksum(content: dict[str, Any]) -> str:
    """The hash that facts.json carries of everything else in it, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """What facts.json holds; ValueError, naming it, where anything is missing, of another type or changed."""
    try:
        content = read_json_object(path)
        checksum = content.pop("checksum")
        if content.get("format") != FORMAT_VERSION or checksum != content_checksum(content):
            raise ValueError("another format, or changed since it was written")
        del content["format"]
        _check_manifest(content)
        content["val_texts"] = [(str(prompt), str(completion)) for prompt, completion in content["val_texts"]]
        return Manifest(**content)
    except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.parent} is not prepared data ({type(error).__name__}: {error})") from error


def _check_manifest(content: dict[str, Any]) -> None:
    """ValueError, KeyError or TypeError for what a builder of prepared data does not write."""
    kinds = {"dtype": str, "pad_id": int, "val_texts": list, "facts": dict, "sha256": dict}
    expected: dict[tuple[str, ...], type] = {(name,): kind for name, kind in kinds.items()}
    expected |= {("facts", name): kind for name, kind in FACT_TYPES.items()}
    expected |= {("facts", split, name): int for split in SPLITS for name in ("records", "examples", "tokens")}
    expected |= {("sha256", array_files(Path(), split)[name].name): str for split in SPLITS for name in REQUIRED_ARRAYS}
    for place, kind in expected.items():
        value: Any = content
        for key in place:
            value = value[key]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(f"{'.'.join(place)} is {value!r:.80}, expected {kind.__name__}")
    if content["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"dtype is {content['dtype']!r:.80}, expected <u2 or <u4")
    if any("/" in name for name in content["sha256"]):
        raise ValueError("sha256 names a file outside the folder")


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


def cache_key(key_parts: dict[str, Any]) -> str:
    """The name of the folder for what decides its contents."""
    content = json.dumps({"format": FORMAT_VERSION, **key_parts}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def read(folder: Path) -> tuple[Manifest, dict[str, TokenDataset]]:
    """(manifest, {split: data set}), mapped; ValueError where the folder is not whole."""
    manifest = read_manifest(folder / MANIFEST_FILE)
    return manifest, {
        split: load_token_dataset(
            folder,
            split,
            dtype=manifest.dtype,
            num_rows=manifest.facts[split]["examples"],
            num_tokens=manifest.facts[split]["tokens"],
            has_mask=f"{split}.mask.bin" in manifest.sha256,
        )
        for split in SPLITS
    }


def verify(folder: Path, cache_root: Path | None) -> None:
    """ValueError where a file of the folder is not what was written there.

    Hashes are remembered in `cache_root` while a file's size, times and inode do not change; None: read them again.
    """
    manifest, _ = read(folder)
    for name, expected in manifest.sha256.items():
        file = folder / name
        if not file.is_file():  # a named pipe would be waited for
            raise ValueError(f"{file} is not a regular file")
        try:
            actual = remembered_fingerprint(file, cache_root, "prepared", sha256).sha256 if cache_root else sha256(file)
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror})") from None
        if actual != expected:
            raise ValueError(f"{file} is not what was written there")


def build(folder: Path, write_contents: Callable[[Path], dict[str, Any]]) -> None:
    """Have `write_contents` fill a new folder and return its manifest; the folder is named once all is on the disk.

    Several may build the same folder at once: the first to finish names it, the others throw theirs away.
    """
    _remove_abandoned(folder)
    temp_folder = folder.with_name(f"{folder.name}.unfinished-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        temp_folder.mkdir(parents=True)
        contents = write_contents(temp_folder)
        hashes = {file.name: sha256(file) for file in sorted(temp_folder.iterdir()) if file.name != MANIFEST_FILE}
        manifest = Manifest(**{**contents, "sha256": hashes})
        (temp_folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        for path in (*temp_folder.iterdir(), temp_folder):
            fsync_path(path)
        _rename_into_place(temp_folder, folder)
        fsync_path(folder.parent)
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
            verify(folder, None)
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


def _write_error(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: prepared data cannot be written ({error.strerror or error}); make room, or name another folder "
        "by the environment variable TRAINER_CACHE"
    )
