"""The run folder: what may be in it before a run, its run.json, and what a resume may not change."""

import json
import re
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs
from trainer.config.errors import UserError
from trainer.config.files import remove_leftovers, require_utf8_path, write_atomically
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings
from trainer.distributed.preflight import refuse_full_disk
from trainer.distributed.process_group import DistContext
from trainer.model.build import save_base_model
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, find_changed_evaluations, find_damaged_evaluations
from trainer.tracking.jsonl import METRICS_FILE, find_changed_rows
from trainer.tracking.records import read_records
from trainer.tracking.run_lock import LOCK_FILE
from trainer.tracking.wandb_logger import wandb_block
from trainer.training.checkpoint import MIN_BYTES_PER_TRAINED_WEIGHT, Checkpoint, resolve_checkpoint
from trainer.training.run_plan import RunPlan

METADATA_FILE = "run.json"
REQUEUE_FILE = "requeue"  # says by which signals the run was stopped; there while it may go on


def resolve_output_dir(args: CliArgs, ignored_files: Collection[str] = ()) -> tuple[Settings, dict[str, Any] | None]:
    """The settings of the run and, where one is resumed, its run.json; UserError where the folder is not as asked.

    `ignored_files`: what may lie in the folder of a new run.
    """
    settings = args.settings
    folder = Path(settings.run_folder)
    require_utf8_path(folder, f"--output-dir {folder}")
    if args.resume is None:
        if args.allow_change:
            raise UserError(f"--allow-change {args.allow_change[0]}: goes with --resume; a new run may have any")
        if not args.runs_finder and not is_unused(folder, ignored_files):  # finders only put their own files there
            raise UserError(f"{folder} is not empty: pass --resume to go on with that run, or another --output-dir")
        return settings, None
    if args.resume == "auto" and is_unused(folder, ignored_files):
        return settings, None
    if not (folder / METADATA_FILE).exists():
        raise UserError(f"--resume: no run in {folder} (no run.json there); name its folder with --output-dir")
    previous = read_run_metadata(folder / METADATA_FILE)
    saved = Settings.from_dict(previous.get("resumed", previous)["settings"])
    if saved.mode != settings.mode:
        raise UserError(
            f"--mode {settings.mode}: the run in {folder} is --mode {saved.mode}; a mode cannot change on resume"
        )
    return saved.resumed_with(settings), previous


def is_unused(folder: Path, ignored_files: Collection[str] = ()) -> bool:
    """Whether nothing of a run stands in the folder: it is missing, empty, or holds the leftovers of a killed start."""
    if not folder.is_dir():
        return not folder.exists()
    leftover = re.compile(rf"{re.escape(LOCK_FILE)}|\.{re.escape(METADATA_FILE)}\..*tmp")
    return all(path.name in ignored_files or leftover.fullmatch(path.name) for path in folder.iterdir())


def refuse_run_elsewhere(folder: Path, context: DistContext) -> None:
    """UserError where a run stands in this folder on another host only: --resume auto would begin a second one."""
    has_run, hosts = context.all_gather_object((folder / METADATA_FILE).exists()), context.hosts
    if any(has_run) and not has_run[0]:
        raise UserError(
            f"--resume auto: the run in {folder} is on {hosts[has_run.index(True)]}, and rank 0 on {hosts[0]} has "
            "none there; name its host first, or another --output-dir"
        )


def begin_run(
    plan: RunPlan, previous: Mapping[str, Any] | None, resume: str | None, allowed_changes: tuple[str, ...]
) -> tuple[Checkpoint | None, dict[str, Any]]:
    """(the checkpoint to go on from, the content of run.json, which is written); on rank 0.

    None for a new run, and where the run ended before its first checkpoint. `previous`: run.json of the run that goes
    on; `resume`, `allowed_changes`: the flags. UserError for what a resume may not change, or where the disk is full.
    """
    folder, source = Path(plan.settings.run_folder), None
    if previous is not None:
        which = "latest" if resume in (None, "auto") else resume
        if which != "latest" or any((folder / "checkpoints").glob("step-*")):
            source = resolve_checkpoint(folder / "checkpoints", which)
            if source.metadata["base"] != plan.model_info["fingerprint"]:
                raise UserError(
                    f"checkpoint {source.folder} is of a run on another base model ({source.metadata['base']}, "
                    f"here {plan.model_info['fingerprint']})"
                )
    refuse_full_disk(folder, MIN_BYTES_PER_TRAINED_WEIGHT * plan.model_info["trainable"])
    if previous is None:
        wandb = wandb_block(plan.settings.output, plan.data_info["source"])
        metadata = plan.to_metadata(run_id=wandb["id"], wandb=wandb)
    else:  # `settings` stay those it began with; the next resume takes these
        changes = _allowed_changes(previous, plan, source, allowed_changes)
        entry = plan.execution_entry(source.step if source is not None else 0)
        is_new = entry["path"] != previous["execution"][-1]["path"]
        resumed = {"settings": plan.settings.as_dict(), "changed": changes}
        metadata = {**previous, "resumed": resumed, "execution": [*previous["execution"], *[entry] * is_new]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REQUEUE_FILE).unlink(missing_ok=True)
        write_run_json(folder, metadata)
        if plan.settings.mode == "lora" and plan.settings.model.init == "random":
            save_base_model(plan.settings, folder / "base")  # again on resume: a kill may have cut it off
    except OSError as error:
        message = f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
        raise UserError(message) from error
    return source, metadata


def write_run_json(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Put run.json there, whole or not at all. OSError where it cannot be written."""
    remove_leftovers(folder)
    write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=1) + "\n")


def _allowed_changes(
    previous: Mapping[str, Any], plan: RunPlan, source: Checkpoint | None, allowed_names: tuple[str, ...]
) -> dict[str, list[Any]]:
    """{name: [when the run began, now]} of what was allowed to change, also by an earlier resume; `records` are the
    rows and evaluations written until `source` was saved. UserError for the first change that was not allowed."""

    def fixed_values(settings: Settings, data: str, precision: str) -> dict[str, Any]:
        return {**settings.fixed_on_resume(), "data": data, "precision": precision}

    data, precision = previous["data"]["fingerprint"], previous["resolved"]["precision"]
    initial = fixed_values(Settings.from_dict(previous["settings"]), data, precision)
    last = previous.get("resumed", {"settings": previous["settings"], "changed": {}})
    data, precision = (last["changed"].get(name, [initial[name]])[-1] for name in ("data", "precision"))
    before = fixed_values(Settings.from_dict(last["settings"]), data, precision)
    current = fixed_values(plan.settings, plan.data_info["fingerprint"], plan.precision)
    for name in allowed_names:
        if name not in (*current, "records"):
            raise UserError(f"--allow-change {name}: expected one of {', '.join(sorted((*current, 'records')))}")
    for name in current:
        if current[name] != before[name] and name not in allowed_names:
            raise UserError(
                f"--resume: {name} is {current[name]} and was {before[name]} in this run; "
                f"restore it, or pass --allow-change {name} as well"
            )
    changes = {name: [initial[name], current[name]] for name in current if current[name] != initial[name]}
    folder = Path(plan.settings.run_folder)
    if source is None:
        return changes
    changed_records = find_changed_records(folder, source)
    for name, difference in changed_records.items():
        if unreadable := _find_unreadable(folder / name):
            raise UserError(
                f"--resume: {folder / name}: {unreadable}; restore it, or have `python launch/doctor.py --check-run "
                f"{folder} --move-aside` put aside what cannot be read"
            )
        if "records" not in allowed_names:
            raise UserError(
                f"--resume: {folder / name} is not as it was when {source.folder.name} was saved: {difference}; "
                "restore it, or pass --allow-change records to go on with the rows that are there"
            )
    if changed_records:
        differences = "; ".join(f"{name}: {difference}" for name, difference in changed_records.items())
        changes["records"] = ["as written", differences]
    return changes


def find_changed_records(run_folder: Path, source: Checkpoint) -> dict[str, str]:
    """{name: how it differs from when the checkpoint was saved} of metrics.jsonl and eval_records/."""
    rows, evaluations = source.metadata["records"], source.metadata["evaluations"]
    is_pending, folder = source.train_state.eval_pending, run_folder / EVAL_RECORDS_FOLDER
    changes = {
        METRICS_FILE: find_changed_rows(run_folder / METRICS_FILE, rows),
        EVAL_RECORDS_FOLDER: find_changed_evaluations(folder, evaluations, source.step, eval_pending=is_pending),
    }
    return {name: change for name, change in changes.items() if change is not None}


def _find_unreadable(path: Path) -> str | None:
    """What in metrics.jsonl or eval_records/ cannot be read; None where all can, or nothing is there."""
    try:
        if path.name == EVAL_RECORDS_FOLDER:
            return next((f"{file.name}: {what}" for file, what in find_damaged_evaluations(path).items()), None)
        if path.exists():
            deque(read_records(path), maxlen=0)
    except (OSError, ValueError) as error:
        return str(error).removeprefix(str(path)).lstrip(":, ")
    return None
