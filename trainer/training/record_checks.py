"""Whether the records of a run are those that its checkpoint knows: metrics.jsonl and eval_records/."""

from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, find_changed_evaluations, find_damaged_evaluations
from trainer.tracking.jsonl import METRICS_FILE, find_changed_rows
from trainer.tracking.records import read_records
from trainer.training.checkpoint import Checkpoint, list_checkpoints


def validate_rows(folder: Path, source: Checkpoint, allowed_names: tuple[str, ...]) -> dict[str, list[Any]]:
    """{"records": [as written, how they differ]} where rows of metrics.jsonl or evaluations were changed
    since the checkpoint was saved and that is allowed; UserError where it is not."""
    changes = find_changed_records(folder, source)
    for name, damage in changes.items():
        if unreadable := find_unreadable(folder / name):
            raise UserError(
                f"--resume: {folder / name}: {unreadable}; put it back, or have `python launch/doctor.py --check-run "
                f"{folder} --move-aside` put aside what cannot be read"
            )
        if "records" not in allowed_names:
            raise UserError(
                f"--resume: {folder / name} is not as it was when {source.folder.name} was saved: {damage}; put it "
                "back, or say --allow-change records to go on with the rows that are there"
            )
    differences = "; ".join(f"{name}: {damage}" for name, damage in changes.items())
    return {"records": ["as written", differences]} if changes else {}


def find_changed_records(run_folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """{name: how it differs from when the checkpoint was saved} of metrics.jsonl and eval_records/."""
    until = [c for c in list_checkpoints(checkpoint.folder.parent) if c.step <= checkpoint.step]
    digests = [c.records for c in until if c.has_valid_metadata and c.records is not None]
    changes = {METRICS_FILE: find_changed_rows(run_folder / METRICS_FILE, digests)}
    if checkpoint.evaluations is not None:
        changes[EVAL_RECORDS_FOLDER] = find_changed_evaluations(
            run_folder / EVAL_RECORDS_FOLDER,
            checkpoint.evaluations,
            checkpoint.step,
            eval_pending=checkpoint.train_state.eval_pending,
        )
    return {name: change for name, change in changes.items() if change is not None}


def find_unreadable(path: Path) -> str | None:
    """What in metrics.jsonl or eval_records/ no resume can go on with; None where it can be read, or is gone."""
    try:
        if path.name == METRICS_FILE and path.exists():
            for _ in read_records(path):
                pass
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{path}").lstrip(":, ")
    if path.name == EVAL_RECORDS_FOLDER:
        for file, damage in find_damaged_evaluations(path).items():
            return f"{file.name}: {damage}"
    return None
