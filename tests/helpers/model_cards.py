"""The example of a model card, run as its reader would."""

import contextlib
import re
from pathlib import Path
from typing import Any


def run_card(folder: Path, base: Path | str = "", *, generates: bool = True) -> dict[str, Any]:
    """What the example of an exported folder's model card leaves, run in the folder; `base`: of an adapter.
    `generates`: False without its last line, which bitsandbytes refuses for layers as small as a test's."""
    code = re.search(r"```python\n(.+?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    namespace: dict[str, Any] = {}
    with contextlib.chdir(folder):
        text = code[1] if generates else code[1].rpartition("print(")[0]
        exec(text.replace('"BASE"', repr(str(base))), namespace)
    return namespace
