"""`launch/doctor.py --check-run RUN`: a run folder read whole, what is damaged in it, and what it is still good for."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError, escape_controls
from trainer.config.files import free_path, replace_atomically
from trainer.config.run_metadata import read_run_metadata
from trainer.model.model_files import weights_file_problem
from trainer.tools.doctor.checks import ERROR, OK, WARNING, Check
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, find_damaged_evaluations
from trainer.tracking.records import METRICS_FILE, EventRecord, from_line, iter_records
from trainer.tracking.run_lock import LOCK_FILE, FolderInUseError, RunLock
from trainer.training.checkpoint import iter_checked_checkpoints
from trainer.training.run_folder import find_changed_records, find_edited_settings, find_resume_source

DAMAGED_FOLDER = "damaged"  #: in the run folder: what was moved aside
LEFTOVERS = (".*.tmp", "checkpoints/.*.tmp", "eval_records/.*.tmp")


@dataclass
class Inspection:
    """What a run folder holds."""

    checks: list[Check] = field(default_factory=list)
    uses: list[Check] = field(default_factory=list)  #: whether it can be resumed, exported and compared
    damaged: list[Path] = field(default_factory=list)  #: what may be moved aside without losing anything whole

    def add(self, name: str, problem: str | None, message: str, path: Path | None = None, level: str = ERROR) -> bool:
        """One thing that was looked at: `problem`, or None and what there is to say of it. Whether there is none."""
        self.checks.append(Check(level, name, problem) if problem else Check(OK, name, message))
        if problem and path is not None:
            self.damaged.append(path)
        return not problem


def inspect_run(folder: Path) -> Inspection:
    """Read everything in a run folder; UserError where there is no such folder. Nothing is changed."""
    if not folder.is_dir():
        raise UserError(f"--check-run {folder}: no such folder; expected a run folder, for instance runs/<run name>")
    found, blockers = Inspection(), {"running": "", "metadata": "", "checkpoint": "no whole checkpoint", "rows": ""}
    if (folder / LOCK_FILE).exists():
        lock = RunLock(folder)
        try:
            lock.acquire()
        except UserError as error:
            found.add("running", str(error), "", level=WARNING)
            blockers["running"] = "it is running" if isinstance(error, FolderInUseError) else str(error)
        finally:
            lock.release()
    metadata: dict[str, Any] = {}
    try:
        metadata = read_run_metadata(folder / "run.json")
        found.add("run.json", None, f"run {metadata['name']}, --mode {metadata['mode']}")
    except UserError as error:
        found.add("run.json", f"{error}; restore it: without it nothing can be done with the run", "")
        blockers["metadata"] = "run.json cannot be read"
    if (folder / "checkpoints").is_file():
        found.add("checkpoints", "is not a folder", "")
    newest = None  # whole checkpoint
    for path, checkpoint, damage in iter_checked_checkpoints(folder / "checkpoints"):
        if found.add(path.name, damage, "whole", path) and newest is None:
            newest, blockers["checkpoint"] = checkpoint, ""

    path, num_rows, last_line, problem, num_problems = folder / METRICS_FILE, 0, b"", "", 0
    try:
        for num_rows, line, line_problem in _parse_rows(path):
            if line_problem:
                problem, num_problems = problem or f"line {num_rows}: {line_problem}", num_problems + 1
            else:
                last_line = line
    except FileNotFoundError:
        problem = "is not there" if newest else ""
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValueError as error:
        problem = problem or str(error).removeprefix(f"{path}, ")
    problem += f" and {num_problems - 1} lines more" if num_problems > 1 else ""
    if last_line:
        last = from_line(last_line)
        has_finished = isinstance(last, EventRecord) and last.event == "finished"
        if has_finished or not blockers["running"]:  # where a launcher was killed its exit code does not tell
            unfinished = None if has_finished else f"not finished: its last row is of step {last.step}"
            found.add("end", unfinished, f"finished after step {last.step}", level=WARNING)
    found.add(METRICS_FILE, problem, f"{num_rows} rows", path if path.exists() else None)
    if problem and path.exists():
        blockers["rows"] = f"{METRICS_FILE} is damaged"

    damaged_evaluations = find_damaged_evaluations(folder / EVAL_RECORDS_FOLDER)
    for path, damage in damaged_evaluations.items():
        found.add(f"{EVAL_RECORDS_FOLDER}/{path.name}", damage, "", path)
    if (folder / EVAL_RECORDS_FOLDER).is_dir() and not damaged_evaluations:
        num_evaluations = len(list((folder / EVAL_RECORDS_FOLDER).glob("step-*")))
        found.add(EVAL_RECORDS_FOLDER, None, f"{num_evaluations} evaluations")
    changes = find_changed_records(folder, newest) if newest else {}
    if newest:
        changed = "; ".join(f"{name}: {change}" for name, change in changes.items())
        found.add("rows", changed, f"as they were when {newest.folder.name} was saved")
        edited = find_edited_settings(metadata, newest) if metadata else ""
        found.add("settings", edited, f"those of {newest.folder.name}")
    for path in sorted(path for name in ("model", "base") for path in (folder / name).glob("*.safetensors")):
        found.add(str(path.relative_to(folder)), weights_file_problem(path), "a whole safetensors file")
    for path in sorted(path for pattern in LEFTOVERS for path in folder.glob(pattern)):
        if not blockers["running"]:
            message = "left by a process that was killed; the next save or export removes it"
            found.add(path.name, message, "", path, WARNING)

    no_resume, origin = _check_resume(folder, metadata)
    to_compare = blockers["metadata"] or blockers["rows"] or ("" if num_rows else "no rows")
    for use, blocker, message in (
        ("resume", blockers["running"] or no_resume, f"from {origin}"),
        ("export", blockers["metadata"] or blockers["checkpoint"], f"of {newest.folder.name if newest else ''}"),
        ("compare", to_compare, "yes"),
    ):
        found.uses.append(Check(ERROR, use, f"not possible: {blocker}") if blocker else Check(OK, use, message))
    return found


def _check_resume(folder: Path, metadata: dict[str, Any]) -> tuple[str, str]:
    """(why --resume would refuse the run, from where it would go on), by the functions that --resume asks."""
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


def _parse_rows(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """(number, line, what is wrong with it or "") of every whole line; one cut off by a kill is none."""
    for number, line, record in iter_records(path):
        if record is not None:
            yield number, line, str(record) if isinstance(record, ValueError) else ""


def move_aside(folder: Path, damaged: Iterable[Path]) -> list[str]:
    """Move what is damaged to `damaged/` of the run folder, never deleting it; of metrics.jsonl the readable rows stay.

    Returns a line for each. UserError where a run is writing there.
    """
    lines = []
    lock = RunLock(folder)
    lock.acquire()
    try:
        for path in damaged:
            (folder / DAMAGED_FOLDER).mkdir(exist_ok=True)
            target = free_path(folder / DAMAGED_FOLDER / path.name.lstrip("."))
            if path.name != METRICS_FILE or not path.is_file():  # a named pipe would be waited for
                path.rename(target)
                lines.append(f"{path} moved to {target}")
                continue
            shutil.copyfile(path, target)
            num_readable = 0
            with replace_atomically(path) as file:
                for _, line, problem in _parse_rows(target):
                    if not problem:
                        file.write(line)
                        num_readable += 1
            lines.append(f"{path} copied to {target}; its {num_readable} readable rows stay")
        return lines
    except OSError as error:
        raise UserError(f"{folder}: cannot move what is damaged: {error.strerror}") from error
    finally:
        lock.release()


def run_check(folder: Path, *, as_json: bool = False, should_move: bool = False) -> int:
    """Print what a run folder holds and is good for; 0, or 1 where something in it is damaged."""
    found = inspect_run(folder)
    checks = [*found.checks, *found.uses]
    moved = move_aside(folder, found.damaged) if should_move and found.damaged else []
    if as_json:
        content = {"run": str(folder), "checks": [check._asdict() for check in checks], "moved": moved}
        print(json.dumps(content, indent=1))
    else:
        lines = [f"{check.level:<8} {check.name:<20} {check.message}" for check in checks]
        lines += [f"moved    {line}" for line in moved]
        if found.damaged and not moved:
            names = ", ".join(path.name for path in found.damaged)
            lines.append(f"remedy   --move-aside puts {names} into {folder / DAMAGED_FOLDER}; nothing is deleted")
        print("\n".join(map(escape_controls, lines)))
    return int(any(check.level == ERROR for check in found.checks))
