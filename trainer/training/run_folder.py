"""The run folder: what may be in it before a run, its run.json, what a resume may not change, and the events that say
where a run went on and how it ended."""

import contextlib
import json
import re
import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs
from trainer.config.errors import UserError
from trainer.config.files import folder_size, remove_leftovers, require_utf8_path, write_atomically
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings, apply_overrides, fields_fixed_on_resume
from trainer.distributed.preflight import refuse_full_disk
from trainer.distributed.process_group import DistContext
from trainer.model.build import save_base_model
from trainer.tracking.eval_records import (
    EVAL_RECORDS_FOLDER,
    EvaluationsDigest,
    find_changed_evaluations,
    find_damaged_evaluations,
)
from trainer.tracking.jsonl import METRICS_FILE, RowsDigest, find_changed_rows
from trainer.tracking.records import EventRecord, read_records
from trainer.tracking.run_lock import LOCK_FILE
from trainer.tracking.wandb_logger import wandb_block
from trainer.training import checkpoint
from trainer.training.checkpoint import Checkpoint
from trainer.training.run_plan import RunPlan
from trainer.training.train_state import TrainState

METADATA_FILE = "run.json"
REQUEUE_FILE = "requeue"  # says by which signals the run was stopped; there while it may go on


def resolve_output_dir(args: CliArgs, ignored_files: Collection[str] = ()) -> tuple[Settings, dict[str, Any] | None]:
    """The settings of the run and, where one is resumed, its run.json; UserError where the folder is not as asked.

    `ignored_files`: what may lie in the folder of a new run.
    """
    settings = args.settings
    folder = Path(settings.run_folder)
    require_utf8_path(folder, f"--output-dir {folder}")
    if args.resume is not None and not (args.resume == "auto" and is_unused(folder, ignored_files)):
        return _resume_settings(args, folder)
    if args.allow_change and args.resume is None:
        raise UserError(f"--allow-change {args.allow_change[0]}: goes with --resume; a new run may have any")
    if args.runs_finder:  # they only put their own files beside whatever is there
        return settings, None
    if not is_unused(folder, ignored_files):
        raise UserError(f"{folder} is not empty: pass --resume to go on with that run, or another --output-dir")
    return settings, None


def is_unused(folder: Path, ignored_files: Collection[str] = ()) -> bool:
    """Whether nothing of a run stands in the folder: it is missing, empty, or holds the leftovers of a killed start."""
    if not folder.is_dir():
        return not folder.exists()
    leftover = re.compile(rf"{re.escape(LOCK_FILE)}|\.{re.escape(METADATA_FILE)}\..*tmp")
    return all(path.name in ignored_files or leftover.fullmatch(path.name) for path in folder.iterdir())


def _resume_settings(args: CliArgs, folder: Path) -> tuple[Settings, dict[str, Any]]:
    if not (folder / METADATA_FILE).exists():
        raise UserError(f"--resume: no run in {folder} (no run.json there); name its folder with --output-dir")
    previous = read_run_metadata(folder / METADATA_FILE)
    saved = Settings.from_dict(previous.get("resumed", previous)["settings"])
    if saved.mode != args.settings.mode:
        raise UserError(
            f"--mode {args.settings.mode}: the run in {folder} is --mode {saved.mode}; a mode cannot change on resume"
        )
    output = {**args.overrides["output"], "output_dir": args.settings.run_folder}
    return apply_overrides(saved, {**args.overrides, "output": output}, args.settings.overridden), previous


def refuse_run_elsewhere(folder: Path, context: DistContext) -> None:
    """UserError where a run stands in this folder on another host only: --resume auto would begin a second one."""
    has_run = context.all_gather_object((folder / METADATA_FILE).exists())
    if any(has_run) and not has_run[0]:
        hosts = context.hosts
        raise UserError(
            f"--resume auto: the run in {folder} is on {hosts[has_run.index(True)]}, and rank 0 on {hosts[0]} has "
            "none there; name its host first, or another --output-dir"
        )


def begin_run(
    plan: RunPlan,
    model_metadata: Mapping[str, Any],
    previous: Mapping[str, Any] | None,
    resume: str | None,
    allowed_changes: tuple[str, ...],
) -> tuple[Checkpoint | None, dict[str, Any]]:
    """(the checkpoint to go on from, the content of run.json, which is written); on rank 0.

    None for a new run, and where the run ended before its first checkpoint. `previous`: run.json of the run that goes
    on; `resume`, `allowed_changes`: the flags. UserError for what a resume may not change, or where the disk is full.
    """
    folder, source = Path(plan.settings.run_folder), None
    if previous is not None:
        which = "latest" if resume in (None, "auto") else resume
        if which != "latest" or any((folder / "checkpoints").glob("step-*")):
            source = checkpoint.resolve_checkpoint(folder / "checkpoints", which)
            if source.metadata["base"] != model_metadata["fingerprint"]:
                raise UserError(
                    f"checkpoint {source.folder} is of a run on another base model ({source.metadata['base']}, "
                    f"here {model_metadata['fingerprint']})"
                )
    refuse_full_disk(folder, checkpoint.MIN_BYTES_PER_TRAINED_WEIGHT * model_metadata["trainable"])
    if previous is None:
        wandb = wandb_block(plan.settings.output, plan.data_info["source"])
        metadata = plan.to_metadata(run_id=wandb["id"], wandb=wandb)
    else:  # `settings` stay those it began with; the next resume takes these
        changes = validate_resume_overrides(previous, plan, allowed_changes)
        changes |= _validate_rows(folder, source, allowed_changes) if source is not None else {}
        resumed = {"settings": plan.settings.as_dict(), "changed": changes}
        entry = plan.execution_entry(source.step if source is not None else 0)
        is_new = entry["path"] != previous["execution"][-1]["path"]
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


def write_requeue_marker(folder: Path, signal_numbers: Collection[int]) -> None:
    """Say that the run was stopped by these signals and may go on: on SIGUSR1, SLURM's notice, a job requeues itself.

    A file, because torchrun turns every exit code into 1. A disk that takes none is left at that.
    """
    names = [signal.Signals(number).name for number in sorted(set(signal_numbers) - {0})]
    with contextlib.suppress(OSError):
        write_atomically(folder / REQUEUE_FILE, " ".join(names) + "\n")


def write_run_json(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Put run.json there, whole or not at all. OSError where it cannot be written."""
    remove_leftovers(folder)
    write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=1) + "\n")


def validate_resume_overrides(
    previous: Mapping[str, Any], plan: RunPlan, allowed_names: tuple[str, ...]
) -> dict[str, list[Any]]:
    """{name: [when the run began, now]} of what was allowed to change, also by an earlier resume.

    UserError for the first change since the run last went on that was not allowed.
    """
    initial = fields_fixed_on_resume(Settings.from_dict(previous["settings"]))
    initial |= {"data": previous["data"]["fingerprint"], "precision": previous["resolved"]["precision"]}
    last_resume = previous.get("resumed", {"settings": previous["settings"], "changed": {}})
    before = fields_fixed_on_resume(Settings.from_dict(last_resume["settings"]))
    before |= {name: last_resume["changed"].get(name, [initial[name]])[-1] for name in ("data", "precision")}
    current = fields_fixed_on_resume(plan.settings)
    current |= {"data": plan.data_info["fingerprint"], "precision": plan.precision}
    known_names = sorted((*current, "records"))
    for name in allowed_names:
        if name not in known_names:
            raise UserError(f"--allow-change {name}: expected one of {', '.join(known_names)}")
    for name in current:
        if current[name] != before[name] and name not in allowed_names:
            raise UserError(
                f"--resume: {name} is {current[name]} and was {before[name]} in this run; "
                f"restore it, or pass --allow-change {name} as well"
            )
    return {name: [initial[name], current[name]] for name in current if current[name] != initial[name]}


def _validate_rows(folder: Path, source: Checkpoint, allowed_names: tuple[str, ...]) -> dict[str, list[Any]]:
    """{"records": [as written, how they differ]} where rows of metrics.jsonl or evaluations were changed
    since the checkpoint was saved and that is allowed; UserError where it is not."""
    changes = find_changed_records(folder, source)
    for name, damage in changes.items():
        if unreadable := _find_unreadable(folder / name):
            raise UserError(
                f"--resume: {folder / name}: {unreadable}; restore it, or have `python launch/doctor.py --check-run "
                f"{folder} --move-aside` put aside what cannot be read"
            )
        if "records" not in allowed_names:
            raise UserError(
                f"--resume: {folder / name} is not as it was when {source.folder.name} was saved: {damage}; "
                "restore it, or pass --allow-change records to go on with the rows that are there"
            )
    differences = "; ".join(f"{name}: {damage}" for name, damage in changes.items())
    return {"records": ["as written", differences]} if changes else {}


def find_changed_records(run_folder: Path, source: Checkpoint) -> dict[str, str]:
    """{name: how it differs from when the checkpoint was saved} of metrics.jsonl and eval_records/."""
    changes = {}
    if "records" in source.metadata:
        digest = RowsDigest(**source.metadata["records"])
        changes[METRICS_FILE] = find_changed_rows(run_folder / METRICS_FILE, digest)
    if "evaluations" in source.metadata:
        changes[EVAL_RECORDS_FOLDER] = find_changed_evaluations(
            run_folder / EVAL_RECORDS_FOLDER,
            EvaluationsDigest(**source.metadata["evaluations"]),
            source.step,
            eval_pending=source.train_state.eval_pending,
        )
    return {name: change for name, change in changes.items() if change is not None}


def _find_unreadable(path: Path) -> str | None:
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


def resumed_event(
    plan: RunPlan, state: TrainState, changes: Mapping[str, Any], source: Checkpoint | None, num_truncated: int
) -> EventRecord:
    """From where a run goes on, how many rows after it were cut off, and what changed: {name: [old, new]}."""
    origin = source.folder.name if source else "the start: the run had no checkpoint"
    message = f"resumed from {origin}" + (f", {num_truncated} rows after it cut off" if num_truncated else "")
    message += "".join(f"; passed over: {reason}" for reason in (source.skipped_reasons if source else ()))
    message += "".join(f"; {name} changed from {old} to {new}" for name, (old, new) in changes.items())
    facts = {
        "checkpoint": origin,
        "rows_cut": num_truncated,
        "changed": changes,
        "resolved": plan.resolved(),
        "execution": plan.execution_entry(state.step),
    }
    return EventRecord(event="resumed", step=state.step, message=message, time=state.elapsed_seconds, facts=facts)


def finished_event(
    plan: RunPlan,
    state: TrainState,
    *,
    elapsed_seconds: float,
    measurements: Mapping[str, Any],
    choice: Mapping[str, Any] | None,
    export_summary: str,
) -> EventRecord:
    """The end of a run: what it took, its last and best losses, and what was exported.

    `choice`: which weights were exported (`which`, `step`, `loss`), None for none. Parameters: one a fact.
    """
    folder, schedule = Path(plan.settings.run_folder), plan.schedule
    facts = {
        "wall_seconds": elapsed_seconds,
        "device_hours": elapsed_seconds * plan.dist_context.world_size / 3600,
        **measurements,
        "checkpoint_bytes": folder_size(max((folder / "checkpoints").glob("step-*"), default=None)),
        "export_bytes": folder_size(folder / "model"),
        "best": vars(state.best) if state.best else None,
        "final": {"step": state.step, "epoch": schedule.record_axes(state)["epoch"], "loss": state.val_loss},
        "early_stop": schedule.is_stopped_early(state) and state.step < schedule.total_steps,
        "exported": choice,
        "export": export_summary,
    }
    where = f"{folder / 'model'} " if choice else ""
    if choice and choice["step"] != state.step:
        where += f"holds step {choice['step']}, the best, "
    message = f"finished after {state.step} steps; {where}{export_summary}"
    return EventRecord(event="finished", step=state.step, message=message, time=elapsed_seconds, facts=facts)
