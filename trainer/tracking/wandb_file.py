"""A .wandb file, one record at a time, by W&B's own reader."""

import importlib.util
import json
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 600.0  # reading one file back may take this long


class WandbFile:
    """The records of a file, in the order of writing; each iteration reads it once, and in bounded memory.

    An iteration ends in a ValueError where it is no such file, or a record is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_truncated = False  #: after an iteration: whether the file ends within a record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        core = Path(importlib.util.find_spec("wandb").submodule_search_locations[0]) / "bin" / "wandb-core"  # type: ignore[union-attr,index]
        command = [str(core), "leet", "inspect", "--no-observability", "--json", "--run-file", str(self.path)]
        with (
            tempfile.TemporaryFile() as stderr,
            subprocess.Popen([*command, str(self.path.parent)], stdout=subprocess.PIPE, stderr=stderr) as process,
        ):
            timer = threading.Timer(TIMEOUT_SECONDS, process.kill)
            timer.start()
            assert process.stdout is not None
            try:
                yield from map(json.loads, process.stdout)
            finally:  # also where a line cannot be read: the thread would hold this process at its end
                timer.cancel()
                process.stdout.close()
            exit_code = process.wait()
            stderr.seek(0)
            message = stderr.read(4096).decode(errors="replace")
        self.is_truncated = "incomplete" in message
        if exit_code:
            raise ValueError(f"{self.path.name} is not a W&B run file ({' '.join(message.split())[:120]})")
