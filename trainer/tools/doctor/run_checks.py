"""`launch/doctor.py --check-run RUN`: a run folder read whole, what is damaged in it, and what it is still good for."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError, escape_controls
from trainer.config.files import replace_atomically, write_all
from trainer.config.run_metadata import read_run_metadata
from trainer.model.model_files import weights_file_problem
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, make_result, ok_result
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, find_damaged_evaluations
from trainer.tracking.jsonl import METRICS_FILE
from trainer.tracking.records import EventRecord, Record, from_line, iter_lines
from trainer.tracking.run_lock import LOCK_FILE, RunLock
from trainer.training.checkpoint import Checkpoint, iter_checked_checkpoints
from trainer.training.record_checks import find_changed_records

DAMAGED_FOLDER = "damaged"  #: in the run folder: what was moved aside


@dataclass(kw_only=True)
class RunInspection:
    """What was found in a run folder."""

    folder: Path
    results: list[CheckResult] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)  #: what may be moved aside without losing anything whole
    newest: Checkpoint | None = None  #: the newest whole checkpoint
    metadata: dict[str, Any] | None = None
    num_rows: int | None = None  #: readable rows of metrics.jsonl, where all are
    is_running: bool = False
    has_changed_rows: bool = False  #: against what the newest checkpoint knows of them
    has_whole_evaluations: bool = True

    def add(self, name: str, problem: str | None, message: str, path: Path | None = None, remedy: str = "") -> None:
        """One thing that was looked at: `problem`, or None and what there is to say of it."""
        self.results.append(make_result(problem is not None, ERROR, name, problem or message, remedy))
        if problem is not None and path is not None:
            self.damaged.append(path)

    def warn(self, name: str, message: str) -> None:
        """Something that damages nothing."""
        self.results.append(CheckResult(WARNING, name, message))


def inspect_run(folder: Path) -> RunInspection:
    """Read everything in a run folder; UserError where there is no such folder. Nothing is changed."""
    if not folder.is_dir():
        raise UserError(f"--check-run {folder}: no such folder; expected a run folder, for instance runs/<run name>")
    inspection = RunInspection(folder=folder)
    _check_running(inspection)
    try:
        inspection.metadata = read_run_metadata(folder / "run.json")
        inspection.add("run.json", None, f"run {inspection.metadata['name']}, --mode {inspection.metadata['mode']}")
    except UserError as error:
        inspection.add("run.json", str(error), "", remedy="put it back: nothing can be done with the run without it")
    for path, checkpoint, damage in iter_checked_checkpoints(folder / "checkpoints"):
        inspection.add(path.name, damage, "whole", path)
        if damage is None and inspection.newest is None:
            inspection.newest = checkpoint
    _check_rows(inspection)
    _check_eval_records(inspection)
    _check_unchanged(inspection)
    for path in sorted(path for name in ("model", "base") for path in (folder / name).glob("*.safetensors")):
        problem = weights_file_problem(path)
        inspection.add(str(path.relative_to(folder)), problem, "a whole safetensors file", remedy="export again")
    for path in sorted(
        (*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp"), *folder.glob("eval_records/.*.tmp"))
    ):
        if not inspection.is_running:
            inspection.warn(path.name, "left by a process that was killed; the next save or export removes it")
            inspection.damaged.append(path)
    return inspection


def _check_running(inspection: RunInspection) -> None:
    if not (inspection.folder / LOCK_FILE).exists():
        return
    lock = RunLock(inspection.folder)
    try:
        lock.acquire()
    except UserError as error:
        inspection.is_running = True
        inspection.warn("running", str(error))
    finally:
        lock.release()


def _check_rows(inspection: RunInspection) -> None:
    path = inspection.folder / METRICS_FILE
    first_problem, num_problems, num_rows, last = None, 0, 0, None
    try:
        for num_rows, line, reason in _parse_rows(path):
            if reason:
                first_problem, num_problems = first_problem or f"line {num_rows}: {reason}", num_problems + 1
            else:
                last = line
    except FileNotFoundError:
        first_problem = "is not there" if inspection.newest else None
    except OSError as error:
        first_problem = f"cannot be read: {error.strerror}"
    except ValueError as error:
        first_problem = str(error).removeprefix(f"{path}, ")
    if last is not None:
        _describe_end(inspection, from_line(last))
    more = f" and {num_problems - 1} lines more" if num_problems > 1 else ""
    problem = first_problem + more if first_problem else None
    inspection.add(METRICS_FILE, problem, f"{num_rows} rows", path if path.is_file() else None)
    inspection.num_rows = None if problem and path.exists() else num_rows


def _describe_end(inspection: RunInspection, last: Record) -> None:
    """Whether the run came to its end: where a launcher was killed its exit code does not tell."""
    if isinstance(last, EventRecord) and last.event == "finished":
        inspection.results.append(ok_result("end", f"finished after step {last.step}"))
    elif not inspection.is_running:
        inspection.warn("end", f"not finished: its last row is of step {last.step}")


def _parse_rows(path: Path) -> Iterator[tuple[int, bytes, str]]:
    """(number, line, what is wrong with it or "") of every whole line; one cut off by a kill is none."""
    for number, line in enumerate(iter_lines(path), start=1):
        if line.endswith(b"\n"):
            try:
                from_line(line)
                yield number, line, ""
            except ValueError as error:
                yield number, line, str(error)


def _check_eval_records(inspection: RunInspection) -> None:
    folder = inspection.folder / EVAL_RECORDS_FOLDER
    damaged = find_damaged_evaluations(folder)
    for path, damage in damaged.items():
        inspection.add(f"{EVAL_RECORDS_FOLDER}/{path.name}", damage, "", path)
    inspection.has_whole_evaluations = not damaged
    if folder.is_dir() and not damaged:
        inspection.add(EVAL_RECORDS_FOLDER, None, f"{len(list(folder.glob('step-*')))} evaluations")


def _check_unchanged(inspection: RunInspection) -> None:
    """Whether the rows are those that the newest checkpoint knows."""
    if inspection.newest is None:
        return
    changes = find_changed_records(inspection.folder, inspection.newest)
    inspection.has_changed_rows = bool(changes)
    message = f"as they were when {inspection.newest.folder.name} was saved"
    inspection.add("rows", "; ".join(f"{name}: {change}" for name, change in changes.items()) or None, message)


def judge_uses(inspection: RunInspection) -> list[CheckResult]:
    """Whether the run can be resumed, exported and compared, each with the reason why not."""
    newest = inspection.newest
    source = newest.folder.name if newest else ""
    rows_note = " with --allow-change records" * inspection.has_changed_rows
    no_metadata = "run.json cannot be read" * (inspection.metadata is None)
    no_checkpoint = "no whole checkpoint" * (newest is None)
    unreadable = f"{METRICS_FILE} has lines that are no records" * (inspection.num_rows is None)
    damaged = unreadable or f"{EVAL_RECORDS_FOLDER} is damaged" * (not inspection.has_whole_evaluations)
    running = "it is running" * inspection.is_running
    blockers = {
        "resume": (no_metadata or running or no_checkpoint or damaged, f"from {source}{rows_note}"),
        "export": (no_metadata or no_checkpoint, f"of {source}"),
        "compare": (no_metadata or ("" if inspection.num_rows else unreadable or "no rows"), "yes"),
    }
    return [
        CheckResult(ERROR, name, f"not possible: {blocker}") if blocker else ok_result(name, message)
        for name, (blocker, message) in blockers.items()
    ]


def move_aside(inspection: RunInspection) -> list[str]:
    """Move what is damaged to `damaged/` of the run folder, never deleting it; of metrics.jsonl the readable rows stay.

    Returns a line for each. UserError where a run is writing there.
    """
    lock = RunLock(inspection.folder)
    lock.acquire()
    try:
        return [_move_one(inspection.folder, path) for path in inspection.damaged]
    except OSError as error:
        raise UserError(f"{inspection.folder}: cannot move what is damaged: {error.strerror}") from error
    finally:
        lock.release()


def _move_one(folder: Path, path: Path) -> str:
    (folder / DAMAGED_FOLDER).mkdir(exist_ok=True)
    number = 1
    while os.path.lexists(target := folder / DAMAGED_FOLDER / f"{path.name.lstrip('.')}.{number}"):
        number += 1
    if path.name != METRICS_FILE:
        path.rename(target)
        return f"{path} moved to {target}"
    shutil.copyfile(path, target)
    num_readable = 0
    with replace_atomically(path) as file:
        for _, line, problem in _parse_rows(target):
            if not problem:
                write_all(file, line)
                num_readable += 1
    return f"{path} copied to {target}; its {num_readable} readable rows stay"


def run_check(folder: Path, *, as_json: bool = False, should_move: bool = False) -> int:
    """Print what a run folder holds and is good for; 0, or 1 where something in it is damaged."""
    inspection = inspect_run(folder)
    results = [*inspection.results, *judge_uses(inspection)]
    moved = move_aside(inspection) if should_move and inspection.damaged else []
    if as_json:
        print(
            json.dumps({"run": str(folder), "checks": [vars(result) for result in results], "moved": moved}, indent=1)
        )
    else:
        lines = [f"{result.level:<8} {result.name:<20} {result.message}" for result in results]
        lines += [f"moved    {line}" for line in moved]
        if inspection.damaged and not moved:
            names = ", ".join(path.name for path in inspection.damaged)
            lines.append(f"remedy   --move-aside puts {names} into {folder / DAMAGED_FOLDER}; nothing is deleted")
        print("\n".join(map(escape_controls, lines)))
    return int(any(result.level == ERROR for result in inspection.results))
