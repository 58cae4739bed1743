"""The door to `datasets`: data sets and models of the hub, and whether the hub answers."""

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError, first_line

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")  #: of a repository, beside its weights


def is_reachable() -> bool:
    """Whether the hub answers; asked first because its libraries try for half a minute before they give up."""
    import huggingface_hub

    try:  # offline mode is an error of this session too
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=3.0)
    except Exception:  # of the HTTP library's own kinds
        return False
    return True


def go_offline() -> None:
    """From here on this process takes what has been downloaded and asks nobody."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    if datasets := sys.modules.get("datasets"):  # else it will take the value above
        datasets.config.HF_HUB_OFFLINE = True


def download_model(model: str, *, with_weights: bool, log: Callable[[str], None], revision: str | None = None) -> None:
    """Download what `from_pretrained` reads of a hub id, for all processes of this host. UserError where that fails."""
    import huggingface_hub

    if Path(model).is_dir() or not is_reachable():
        return
    log(f"fetching {model} from the hub, where it is not here yet")
    patterns = [*MODEL_FILES, *(["*.safetensors"] if with_weights else [])]
    others = ["*/*", "consolidated*"]  # what `from_pretrained` does not read: folders, and Mistral's second copy
    try:
        huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=others)
    except Exception as error:  # of the HTTP library, of the disk
        problem = f"cannot be downloaded from the hub ({first_line(error)})"
        raise UserError(f"--model {model}: {problem}; try again, or pass a folder") from None


def find_model_folder(path: str, revision: str | None = None) -> Path:
    """Where the files of a model are that is in a folder, or in the hub's cache."""
    file = None if Path(path).is_dir() else _find_cached(path, "config.json", revision)
    return file.parent if file else Path(path)


def find_adapter_folder(model: str) -> Path | None:
    """The folder of the adapter that a folder or hub id holds; None where it holds none, UserError where its download
    breaks off."""
    import huggingface_hub

    if Path(model).is_dir():
        return Path(model) if (Path(model) / ADAPTER_CONFIG_FILE).exists() else None
    if _find_cached(model, "config.json"):
        return None
    is_cached = _find_cached(model, ADAPTER_WEIGHTS_FILE) is not None
    if not is_cached and _is_repo_id(model) and not huggingface_hub.constants.HF_HUB_OFFLINE and is_reachable():
        with contextlib.suppress(Exception):  # of the hub: a whole model has no such file
            huggingface_hub.hf_hub_download(model, ADAPTER_CONFIG_FILE)
        if _find_cached(model, ADAPTER_CONFIG_FILE):  # small, so downloaded whole before its base is asked for
            download_model(model, with_weights=True, log=lambda line: None)
    file = _find_cached(model, ADAPTER_CONFIG_FILE)
    return file.parent if file else None


def _is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name, re.ASCII) is not None


def _find_cached(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(repo_id, name, revision=revision) if _is_repo_id(repo_id) else None
    return Path(file) if isinstance(file, str) else None


def find_dataset_files(
    flag: str, name: str, config_name: str | None = None, *, is_saved: bool = False
) -> dict[str, list[Path]]:
    """{split: its Arrow files} of a data set of the hub, or of a local copy where it cannot be reached, or of a folder
    that `save_to_disk` wrote, "" for one without splits; UserError where there is none, or not all of it.
    `config_name`: a subset of the repository, None for its only or default one."""
    is_online = is_saved or is_reachable()
    if not is_online:
        go_offline()
    try:
        import datasets

        datasets.disable_progress_bars()  # we say what there is to say
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        if is_saved:
            loaded: Any = datasets.load_from_disk(name, keep_in_memory=False)
        else:
            loaded = datasets.load_dataset(name, config_name, keep_in_memory=False)
        splits = loaded if isinstance(loaded, dict) else {"": loaded}
        return {split: sorted(Path(file["filename"]) for file in data.cache_files) for split, data in splits.items()}
    except Exception as error:  # the hub's libraries raise many kinds, some of them from other packages
        if is_saved:
            problem = f"not a whole saved data set (or one without records: {first_line(error)})"
            raise UserError(f"{flag} {name}: {problem}; save it again") from None
        reason = "the hub cannot be reached, and there is no local copy of a data set of that name"
        if is_online:
            reason = " ".join(str(error).split("\n")[:2]).rstrip(". :") or first_line(error)  # the second: the choices
            reason = f"the hub says: {reason:.400}"
        expected = f"expected a file, a folder, acled-demo or a hub id, with its configuration as {name}:NAME"
        raise UserError(f"{flag} {name}: no such file or folder here, and {reason}; {expected}") from None
