"""The run folder: what may be in it before a run, its run.json, and what a resume may not change."""

import json
import os
import re
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.cli import CliArgs
from trainer.config.errors import UserError
from trainer.config.files import (
    free_path,
    remove_leftovers,
    require_place_for_folder,
    require_utf8_path,
    write_atomically,
)
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import Settings
from trainer.config.text import list_some
from trainer.data.dataset import resolve_cache_dir
from trainer.distributed.joining import MAX_HOSTS_SHOWN
from trainer.distributed.machine import refuse_full_disk
from trainer.distributed.process_group import DistContext
from trainer.model.build import save_base_model
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, find_changed_evaluations, find_damaged_evaluations
from trainer.tracking.records import METRICS_FILE, EventRecord, find_changed_rows, read_records
from trainer.tracking.run_lock import LOCK_FILE, lock_identity
from trainer.tracking.wandb_logger import wandb_block, wandb_mode
from trainer.training.checkpoint import MIN_BYTES_PER_TRAINED_WEIGHT, Checkpoint, any_checkpoint, resolve_checkpoint
from trainer.training.run_plan import RunPlan

METADATA_FILE = "run.json"
MAX_CLOCK_SECONDS = 5.0  # by which clocks may differ; a busy host may be late itself
REQUEUE_FILE = "requeue"  # says by which signals the run was stopped; there while it may go on
#: files beside which a run may begin: those of a start that was killed
NO_RUN = re.compile(rf"{re.escape(LOCK_FILE)}|\.{re.escape(METADATA_FILE)}\..*tmp")


def resolve_output_dir(args: CliArgs) -> tuple[Settings, dict[str, Any] | None]:
    """The settings of the run and, where one is resumed, its run.json; UserError where the folder is not as asked."""
    settings = args.settings
    folder = Path(settings.run_folder)
    require_utf8_path(folder, f"--output-dir {folder}")
    require_place_for_folder(folder, f"--output-dir {folder}")
    if args.resume is None:
        if args.allow_change:
            raise UserError(f"--allow-change {args.allow_change[0]}: goes with --resume; a new run may have any")
        if not (args.find_batch or args.dry_run) and (problem := describe_use(folder)):
            raise UserError(problem)
        return settings, None
    if args.resume == "auto" and not describe_use(folder):
        return settings, None
    if not (folder / METADATA_FILE).exists():
        raise UserError(f"--resume: no run in {folder} (no run.json there); name its folder with --output-dir")
    previous = read_run_metadata(folder / METADATA_FILE)
    saved = Settings(**previous.get("resumed", previous)["settings"])
    if saved.mode != settings.mode:
        raise UserError(
            f"--mode {settings.mode}: the run in {folder} is --mode {saved.mode}; a mode cannot change on resume"
        )
    return saved.resumed_with(settings), previous


def describe_use(folder: Path) -> str:
    """What stands in the way of a new run in a folder, and what to do; empty where nothing of a run is there."""
    if (folder / METADATA_FILE).exists():
        return f"{folder} already holds a run; add --resume to continue it, or --run-name for a new one"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    is_free = all(map(NO_RUN.fullmatch, names)) and (folder.is_dir() or not folder.exists())
    return "" if is_free else f"{folder} is not empty; expected another --output-dir"


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

    None for a new run, and where the run ended before its first checkpoint: its rows are then set aside. `previous`:
    run.json of the run that goes on; `resume`, `allowed_changes`: the flags. UserError for what a resume may not
    change, or where the disk is full.
    """
    folder, source, changes = Path(plan.settings.run_folder), None, {}
    if previous is not None:
        which = "latest" if resume in (None, "auto") else str(resume)
        base, allows_records = plan.model_info["fingerprint"], "records" in allowed_changes
        if (recorded := previous["model"]["fingerprint"]) != base:
            raise UserError(f"--resume: by run.json the base model is {recorded} and is {base} here; restore it")
        source, changed_records = find_resume_source(folder, which, base=base, allows_records=allows_records)
        changes = _allowed_changes(previous, plan, source, allowed_changes)
        if changed_records:
            changes["records"] = ["as written", changed_records]
    refuse_full_disk(folder, MIN_BYTES_PER_TRAINED_WEIGHT * plan.model_info["trainable"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REQUEUE_FILE).unlink(missing_ok=True)
        if previous is None:
            wandb = wandb_block(plan.settings.output, plan.data_info["source"])
            metadata = plan.to_metadata(run_id=wandb["id"], wandb=wandb)
        else:  # `settings` stay those it began with; the next resume takes these
            entry = plan.execution.as_entry(source.step if source is not None else 0, "as planned")
            is_new = entry["path"] != previous["execution"][-1]["path"]
            set_aside = list[str]()
            if source is None:
                remove_leftovers(folder / EVAL_RECORDS_FOLDER)  # of the process that was killed
                paths = [folder / name for name in (METRICS_FILE, EVAL_RECORDS_FOLDER) if (folder / name).exists()]
                set_aside = [path.rename(free_path(path)).name for path in paths]
            resumed = {"settings": plan.settings.as_dict(), "changed": changes, "set_aside": set_aside}
            metadata = {**previous, "resumed": resumed, "execution": [*previous["execution"], *[entry] * is_new]}
        write_run_json(folder, metadata)
        if plan.settings.mode == "lora" and plan.settings.model.init == "random":
            save_base_model(plan.settings, folder / "base")  # again on resume: a kill may have cut it off
    except OSError as error:
        message = f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
        raise UserError(message) from error
    return source, metadata


def write_run_json(folder: Path, metadata: Mapping[str, Any]) -> None:
    remove_leftovers(folder)
    write_atomically(folder / METADATA_FILE, json.dumps(metadata, indent=1) + "\n")


def refuse_unreadable(path: Path) -> None:
    """UserError where the rows or the evaluations cannot be read whole."""
    problem = ""
    try:
        if path.name == EVAL_RECORDS_FOLDER:
            problem = "; ".join(f"{file.name}: {what}" for file, what in find_damaged_evaluations(path).items())
        elif path.exists():
            deque(read_records(path), maxlen=0)
    except (OSError, ValueError) as error:
        problem = str(error).removeprefix(str(path)).lstrip(":, ")
    if problem:
        raise UserError(f"--resume: {path}: {problem}; restore it, or move it out of the folder")


def find_resume_source(folder: Path, which: str, *, base: str, allows_records: bool) -> tuple[Checkpoint | None, str]:
    """(the checkpoint that --resume goes on from, how rows and evaluations differ from when it was saved).

    None for a run that ended before its first checkpoint. UserError where none is whole, the one found is of another
    model than `base`, its fingerprint, or rows cannot be read; or, unless `allows_records` (--allow-change records),
    where rows differ, or there was a checkpoint and none is there.
    """
    if (folder / REQUEUE_FILE).is_dir():
        raise UserError(f"--resume: {folder / REQUEUE_FILE} is a folder, where a file is written; move it away")
    rows = folder / METRICS_FILE
    if which == "latest" and not any_checkpoint(folder / "checkpoints"):
        refuse_unreadable(rows)
        records = read_records(rows, with_steps=False) if rows.exists() else ()
        saved = [r.step for r in records if isinstance(r, EventRecord) and r.event in ("checkpoint", "finished")]
        trace = f"by its rows it saved one after step {saved[-1]}" if saved else ""
        trace = trace or "it has exported a model" * (folder / "model").exists()
        if trace and not allows_records:
            raise UserError(
                f"--resume: {folder} has no checkpoint, and {trace}; restore it, or pass --allow-change records to "
                "begin again with the rows that are there set aside"
            )
        return None, ""
    source = resolve_checkpoint(folder / "checkpoints", which)
    if source.metadata["base"] != base:
        raise UserError(
            f"checkpoint {source.folder} is of a run on another base model ({source.metadata['base']}, here {base})"
        )
    changes = find_changed_records(folder, source)
    for name, difference in changes.items():
        refuse_unreadable(folder / name)
        if not allows_records:
            raise UserError(
                f"--resume: {folder / name} is not as it was when {source.folder.name} was saved: {difference}; "
                "restore it, or pass --allow-change records to go on with the rows that are there"
            )
    return source, "; ".join(f"{name}: {difference}" for name, difference in changes.items())


def find_changed_records(run_folder: Path, source: Checkpoint) -> dict[str, str]:
    changes = {}
    for name, find_change, digest in (
        (METRICS_FILE, find_changed_rows, "records"),
        (EVAL_RECORDS_FOLDER, find_changed_evaluations, "evaluations"),
    ):
        is_pending, path = source.train_state.eval_pending, run_folder / name
        if change := find_change(path, source.metadata[digest], source.step, eval_pending=is_pending):
            changes[name] = change
    return changes


def find_edited_settings(metadata: Mapping[str, Any], source: Checkpoint) -> str:
    """How the settings of run.json differ from those that its checkpoint was trained with, with the remedy, or ""."""
    resumed, saved = metadata.get("resumed", {"changed": {}, **metadata}), _fixed_facts(source.metadata)
    current = _fixed_facts({**source.metadata, "fixed": Settings(**resumed["settings"]).fixed_on_resume()})
    current |= {name: now for name, (_, now) in resumed["changed"].items() if name in saved}
    changed = {name: value for name, value in current.items() if value != saved.get(name)}
    differences = ", ".join(f"{name} is {value} and was {saved.get(name)}" for name, value in changed.items())
    remedy = f"restore it, or pass --allow-change {','.join(changed)}"
    return f"by run.json {differences} when {source.folder.name} was saved; {remedy}" if changed else ""


def _fixed_facts(identity: Mapping[str, Any]) -> dict[str, Any]:
    facts = {**identity["fixed"], "data": identity["data"], "precision": identity["precision"]}
    return dict(json.loads(json.dumps(facts)))


def _allowed_changes(
    previous: Mapping[str, Any], plan: RunPlan, source: Checkpoint | None, allowed_names: tuple[str, ...]
) -> dict[str, list[Any]]:
    """{name: [when the run began, now]} of what was allowed to change, also by an earlier resume. UserError for the
    first difference from the checkpoint, without one from the run's beginning, that is not allowed: run.json may have
    been edited since it was saved."""
    current = _fixed_facts(plan.checkpoint_identity())
    names = sorted({*current, "records"} - {"data"})  # losses on other data are those of another run
    for name in allowed_names:
        if name not in names:
            raise UserError(f"--allow-change {name}: expected one of {', '.join(names)}")
    settings = Settings(**previous["settings"]).fixed_on_resume()
    settings["model_config"] = previous["model"].get("config")
    data, precision = previous["data"]["fingerprint"], previous["resolved"]["precision"]
    initial = _fixed_facts({"fixed": settings, "data": data, "precision": precision})
    saved = initial if source is None else _fixed_facts(source.metadata)
    changed = {name: saved.get(name) for name, value in current.items() if value != saved.get(name)}
    for name, value in changed.items():
        if name not in allowed_names:
            remedy = f", or pass --allow-change {name} as well" if name in names else ""
            raise UserError(f"--resume: {name} is {current[name]} and was {value} in this run; restore it{remedy}")
    records = {n: change for n, change in previous.get("resumed", {}).get("changed", {}).items() if n == "records"}
    return records | {
        name: [initial[name] if value != initial[name] else changed[name], value]
        for name, value in current.items()
        if value != initial[name] or name in changed
    }


def describe_hosts(settings: Settings, context: DistContext) -> list[tuple[str, str]]:
    """(what, value) lines of the plan on folders and clocks, of several hosts; all ranks must call. Rank 0 must hold
    the run folder: the others see its lock file, or not."""
    if context.num_nodes == 1:
        return []
    lock = lock_identity(Path(settings.run_folder))
    # `deepspeed` forwards no variable for these.
    folders = f"cache {resolve_cache_dir()}, HF home {os.environ.get('HF_HOME') or '~/.cache/huggingface'}"
    by_host, here = dict(zip(context.hosts, context.all_gather_object((folders, lock)), strict=True)), context.hosts[0]
    if len({other for other, _ in by_host.values()}) > 1:
        folders = list_some([f"on {host} {other}" for host, (other, _) in by_host.items()], MAX_HOSTS_SHOWN)
    mode, clocks = context.on_rank_zero(lambda: wandb_mode(settings.output.wandb)), describe_clocks(context)
    lines = [("environment", f"W&B {mode}; {folders}")] + ([("note", clocks)] if clocks else [])
    if without := list_some([h for h, (_, other) in by_host.items() if other != by_host[here][1]], MAX_HOSTS_SHOWN):
        only_here = f"only {here} holds the checkpoints and can be the first to resume"
        lines.append(("note", f"{settings.run_folder} of {here} is not seen on {without}: {only_here}"))
    return lines


def describe_clocks(context: DistContext) -> str | None:
    """Which two hosts' clocks differ by more than their answers take; the rows have rank 0's."""
    context.all_gather_object(None)  # all go on from here at nearly one moment
    times = dict(zip(context.hosts, context.all_gather_object(time.time()), strict=True))
    early, late = min(times, key=times.__getitem__), max(times, key=times.__getitem__)
    seconds = times[late] - times[early]
    return f"the clock of {late} is {seconds:,.0f} s ahead of that of {early}" if seconds > MAX_CLOCK_SECONDS else None
