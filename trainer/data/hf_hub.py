"""Data sets of the hub: whether it answers, and the split that is wanted."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.config.errors import UserError
from trainer.config.schema import DEMO_DATA
from trainer.data.hf_readers import library


def reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers; asked first because its libraries try for half a minute before they give up."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy knows
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    answers: list[bool] = []

    def ask() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(
                (address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=seconds
            ),
        ):
            answers.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # looking up the name has no time limit of its own
    asking.start()
    asking.join(2 * seconds)
    return bool(answers)


@contextlib.contextmanager
def _offline(on: bool) -> Iterator[None]:
    """Have the hub's libraries look at local copies only."""
    import huggingface_hub.constants as hub

    config = library().config
    before = hub.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before[0] or on, before[1] or on
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def data_set(flag: str, typed: str) -> tuple[Any, tuple[Path, ...]]:
    """A data set of the hub and the files that hold it here: its train split, for --val-data its validation split.

    A local copy does where the hub cannot be reached; UserError where there is neither, or no such split.
    """
    datasets = library()
    online = reachable()
    try:
        with _offline(not online):
            splits = datasets.load_dataset(typed)
    except Exception as problem:  # the hub's libraries raise many kinds, some of them from other packages
        if not online:
            raise UserError(
                f"{flag} {typed}: no such file or folder here, no local copy of a hub data set of that name, and the "
                f"hub cannot be reached; give {flag} a file, a folder or {DEMO_DATA}"
            ) from None
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"{flag} {typed}: no such file or folder here, and the hub says: {first[:200]}; give {flag} a file, a "
            "folder or the id of a data set that can be read"
        ) from None
    wanted = ("validation", "train") if flag == "--val-data" else ("train",)
    name = next((split for split in wanted if split in splits), None)
    if name is None:
        raise UserError(
            f"{flag} {typed}: the data set has no split `train`, only {', '.join(splits)}; download one as a file"
        )
    if not len(splits[name]):
        raise UserError(f"{flag} {typed}: the data set is empty; expected at least one record")
    copies = sorted({Path(part["filename"]) for part in splits[name].cache_files})
    return splits[name], tuple(copies)
