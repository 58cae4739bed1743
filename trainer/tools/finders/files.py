"""What the finders and `doctor.py --prove` leave in a run folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from trainer.config.errors import UserError
from trainer.training.run_plan import RunPlan

PROOF_FILE = "prove.json"
FINDER_FILES = ("find-lr.json", "find-lr.png", "find-batch.json", PROOF_FILE)  # a run may begin beside them


@contextlib.contextmanager
def output_folder(plan: RunPlan) -> Iterator[Path]:
    """The run folder, for a block that writes there; UserError where it cannot."""
    folder = Path(plan.settings.run_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        message = f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
        raise UserError(message) from error
