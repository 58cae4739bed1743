"""The door to `datasets`: data sets of the hub, saved ones, and whether the hub answers."""

import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.config.choices import DEMO_DATA
from trainer.config.errors import UserError, first_line


def import_datasets() -> Any:
    """`datasets`, without its progress bars and log lines: we say what there is to say."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def is_reachable(timeout_seconds: float = 3.0) -> bool:
    """Whether the hub answers; asked first because its libraries try for half a minute before they give up."""
    offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    if offline.upper() in ("1", "ON", "YES", "TRUE"):  # as huggingface_hub does
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host_and_port = (address.hostname or "", address.port or (80 if address.scheme == "http" else 443))
    successes: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection(host_and_port, timeout=timeout_seconds):
            successes.append(True)

    thread = threading.Thread(target=connect, daemon=True)  # looking up the name has no time limit of its own
    thread.start()
    thread.join(2 * timeout_seconds)
    return bool(successes)


def load_hub_dataset(flag: str, repo_id: str, config_name: str | None = None) -> Mapping[str, Any]:
    """{split: data set} of the hub; a local copy does where it cannot be reached. UserError where there is neither.

    `config_name`: which of the repository's configurations (subsets); None where it has one alone, or names a default.
    """
    import huggingface_hub.constants as hub

    datasets, is_online = import_datasets(), is_reachable()
    previous = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = (value or not is_online for value in previous)
    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(repo_id, config_name)
        return loaded
    except Exception as error:  # the hub's libraries raise many kinds, some of them from other packages
        if not is_online:
            raise UserError(
                f"{flag} {repo_id}: no such file or folder here, no local copy of a hub data set of that name, and the "
                f"hub cannot be reached; give {flag} a file, a folder or {DEMO_DATA}"
            ) from None
        reason = " ".join(str(error).split("\n")[:2]).rstrip(". :") or first_line(error)  # the second has the choices
        raise UserError(
            f"{flag} {repo_id}: no such file or folder here, and the hub says: {reason:.400}; give {flag} a file, a "
            f"folder, or the id of a data set that can be read, with its configuration as {repo_id}:NAME"
        ) from None
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = previous


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def load_saved_dataset(folder: Path, flag: str) -> Mapping[str, Any]:
    """{split: data set} of such a folder, "" for one without splits; UserError where it is not whole."""
    try:
        loaded = import_datasets().load_from_disk(str(folder))
    except IndexError:
        raise UserError(f"{flag} {folder}: a saved data set, or a split of it, is empty; expected records") from None
    except Exception as error:  # damaged files raise many kinds, from several packages
        raise UserError(f"{flag} {folder}: not a whole saved data set ({first_line(error)}); save it again") from None
    splits: Mapping[str, Any] = loaded if isinstance(loaded, dict) else {"": loaded}
    for name in (cache_file["filename"] for dataset in splits.values() for cache_file in dataset.cache_files):
        if not Path(os.path.abspath(name)).is_relative_to(os.path.abspath(folder)):
            raise UserError(f"{flag} {folder}: its state.json names {name}, outside of the folder; save it again")
    return splits
