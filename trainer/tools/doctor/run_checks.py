"""`launch/doctor.py --check-run RUN`: a run folder read whole, what is damaged in it, and what it is still good for."""

from pathlib import Path
from typing import Any

from trainer.config.errors import UserError, escape_controls
from trainer.config.run_metadata import read_run_metadata
from trainer.model.model_files import weights_file_problem
from trainer.tools.doctor.checks import ERROR, OK, WARNING, Check
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, find_damaged_evaluations
from trainer.tracking.records import METRICS_FILE, EventRecord, Record, read_records
from trainer.tracking.run_lock import LOCK_FILE, FolderInUseError, RunLock
from trainer.training.checkpoint import iter_checked_checkpoints
from trainer.training.run_folder import find_changed_records, find_edited_settings, find_resume_source

USES = ("resume", "export", "compare")  #: what may not be possible though nothing is damaged


def inspect_run(folder: Path) -> list[Check]:
    """Read everything in a run folder; the last checks say which of the USES are possible.
    UserError where there is no such folder. Nothing is changed."""
    if not folder.is_dir():
        raise UserError(f"--check-run {folder}: no such folder; expected a run folder, for instance runs/<run name>")
    checks, running = list[Check](), ""

    def add(name: str, problem: str | None, message: str = "", level: str = ERROR) -> bool:
        """One thing that was looked at: `problem`, or none and what there is to say of it. Whether there is none."""
        checks.append(Check(level, name, problem) if problem else Check(OK, name, message))
        return not problem

    if (folder / LOCK_FILE).exists():
        lock = RunLock(folder)
        try:
            lock.acquire()
        except UserError as error:
            add("running", str(error), level=WARNING)
            running = "it is running" if isinstance(error, FolderInUseError) else str(error)
        finally:
            lock.release()
    metadata: dict[str, Any] = {}
    try:
        metadata = read_run_metadata(folder / "run.json")
        add("run.json", None, f"run {metadata['name']}, --mode {metadata['mode']}")
    except UserError as error:
        add("run.json", f"{error}; restore it: without it nothing can be done with the run")
    newest = None  # whole checkpoint
    for path, checkpoint, damage in iter_checked_checkpoints(folder / "checkpoints"):
        if add(path.name, damage, "whole") and newest is None:
            newest = checkpoint

    last: Record | None = None
    path, num_rows, problem = folder / METRICS_FILE, 0, ""
    try:
        for record in read_records(path):
            last, num_rows = record, num_rows + 1
    except FileNotFoundError:
        problem = "is not there" if newest else ""
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError as error:
        last, problem = None, str(error).removeprefix(f"{path}, ")
    if last is not None:
        has_finished = isinstance(last, EventRecord) and last.event == "finished"
        if has_finished or not running:  # where a launcher was killed its exit code does not tell
            unfinished = None if has_finished else f"not finished: its last row is of step {last.step}"
            add("end", unfinished, f"finished after step {last.step}", level=WARNING)
    add(METRICS_FILE, problem, f"{num_rows} rows")
    no_rows = f"{METRICS_FILE} is damaged" if problem and path.exists() else "" if num_rows else "no rows"

    damaged_evaluations = find_damaged_evaluations(folder / EVAL_RECORDS_FOLDER)
    for path, damage in damaged_evaluations.items():
        add(f"{EVAL_RECORDS_FOLDER}/{path.name}", damage)
    if (folder / EVAL_RECORDS_FOLDER).is_dir() and not damaged_evaluations:
        num_evaluations = len(list((folder / EVAL_RECORDS_FOLDER).glob("step-*")))
        add(EVAL_RECORDS_FOLDER, None, f"{num_evaluations} evaluations")
    if newest:
        changed = "; ".join(f"{name}: {change}" for name, change in find_changed_records(folder, newest).items())
        add("rows", changed, f"as they were when {newest.folder.name} was saved")
        edited = find_edited_settings(metadata, newest) if metadata else ""
        add("settings", edited, f"those of {newest.folder.name}")
    for path in sorted(path for name in ("model", "base") for path in (folder / name).glob("*.safetensors")):
        add(str(path.relative_to(folder)), weights_file_problem(path), "a whole safetensors file")

    no_resume, origin = _check_resume(folder, metadata)
    no_metadata = "" if metadata else "run.json cannot be read"
    no_export = no_metadata or ("" if newest else "no whole checkpoint")
    blockers = (running or no_resume, no_export, no_metadata or no_rows)
    messages = (f"from {origin}", f"of {newest and newest.folder.name}", "yes")
    for use, blocker, message in zip(USES, blockers, messages, strict=True):
        add(use, blocker and f"not possible: {blocker}", message)
    return checks


def _check_resume(folder: Path, metadata: dict[str, Any]) -> tuple[str, str]:
    problem, base = "run.json cannot be read", metadata["model"]["fingerprint"] if metadata else ""
    for allows_records in (False, True) if metadata else ():
        try:
            source, _ = find_resume_source(folder, "latest", base=base, allows_records=allows_records)
            if source is not None and (edited := find_edited_settings(metadata, source)):
                return edited, ""
            origin = source.folder.name if source else "the start"
            return "", origin + " with --allow-change records" * allows_records
        except UserError as error:
            problem = str(error).removeprefix("--resume: ")
    return problem, ""


def run_check(folder: Path) -> int:
    """Print what a run folder holds and is good for; 0, or 1 where something in it is damaged."""
    checks = inspect_run(folder)
    for check in checks:
        print(escape_controls(f"{check.level:<8} {check.name:<20} {check.message}"))
    return int(any(check.level == ERROR for check in checks if check.name not in USES))
