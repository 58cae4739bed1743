"""Runs read back from Weights & Biases: offline files, and the server. wandb is imported only when one is asked for."""

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.report.run_data import EPOCH_FIELDS, EVAL_FIELDS, STEP_FIELDS, Run, Unreadable, build, series
from trainer.report.wandb_file import RecordReader

API_SECONDS = 30  # a server that answers no request in this time is taken for dead

#: our column names by the keys of a history row, for each kind of row
_STEP_KEYS = {
    "train/loss": "loss",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second",
}
_EVAL_KEYS = {"val/loss": "loss", "val/perplexity": "perplexity"}
_EPOCH_KEYS = {"train/loss_epoch": "train_loss"}
_AXES = ("epoch", "samples", "tokens")


def offline_files(path: Path) -> list[Path]:
    """The .wandb files that `path` stands for, oldest first: itself, one offline folder, or a folder of such."""
    if path.is_file():
        return [path] if path.suffix == ".wandb" else []
    return sorted(path.glob("run-*.wandb")) or sorted(
        path.glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name
    )


def read_offline(source: str, files: list[Path]) -> Run:
    """The run of `files`, parts of one run in order of time; Unreadable where they hold several runs or none."""
    ids = list(dict.fromkeys(file.stem.removeprefix("run-") for file in files))
    if len(ids) > 1:
        raise Unreadable(f"holds {len(ids)} W&B runs ({', '.join(ids[:5])}); name one of their folders")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    name, exit_code, torn = "", None, False
    for file in files:
        reader = RecordReader(file)
        exit_code = None
        for record in reader:
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.append({_key(item): _value(item.value_json) for item in record.history.item})
            elif kind == "run":
                name = record.run.display_name or name
                _merge(config, record.run.config.update)
            elif kind == "config":
                _merge(config, record.config.update)
            elif kind == "summary":
                _merge(summary, record.summary.update)
            elif kind == "exit":
                exit_code = record.exit.exit_code
        torn = torn or reader.torn
    if not config and not rows:
        raise Unreadable("the .wandb file holds no run (a killed process leaves it empty)")
    age = math.inf if exit_code else time.time() - max(file.stat().st_mtime for file in files)
    notes = ["the end of its .wandb file was cut off and is left out"] if torn else []
    return from_rows(source, ids[0], name, config, rows, summary, finished=exit_code == 0, age=age, notes=notes)


def read_online(path: str) -> Run:
    """The run at entity/project/run_id on the server; Unreadable where it cannot be had. Asks for no login."""
    from trainer.tracking.wandb_logger import logged_in

    if not logged_in():
        raise Unreadable("no such folder; and to read it from W&B, run `wandb login` or set WANDB_API_KEY first")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        run = wandb.Api(timeout=API_SECONDS).run(path)
        rows = list(run.scan_history())
        summary = dict(run.summary_metrics)
    except Exception as problem:  # whatever the client raises: this run cannot be had, others may
        raise Unreadable(f"W&B does not give it: {' '.join(str(problem).split())[:200]}") from problem
    stamps = [row["_timestamp"] for row in rows if isinstance(row.get("_timestamp"), int | float)]
    age = 0.0 if run.state == "running" else math.inf
    return from_rows(
        path,
        run.id,
        run.name,
        run.config,
        rows,
        summary,
        finished=run.state == "finished",
        age=age,
        start=min(stamps, default=0.0),
    )


def from_rows(
    source: str,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    summary: Mapping[str, Any],
    *,
    finished: bool,
    age: float,
    start: float | None = None,
    notes: Iterable[str] = (),
) -> Run:
    """A Run from what W&B keeps of one. `train/*` and `val/*` of one step may share a row or have their own."""
    rows = list(rows)
    start = min((row["_timestamp"] for row in rows if "_timestamp" in row), default=0.0) if start is None else start
    ended = {"event": "finished", "facts": _end_facts(summary)}
    return build(
        source=source,
        run_id=run_id,
        facts={"run_id": run_id, "name": name, **run_facts(config)},
        steps=series(_pick(rows, _STEP_KEYS, start), STEP_FIELDS),
        evals=series(_pick(rows, _EVAL_KEYS, start), EVAL_FIELDS),
        epochs=series(_pick(rows, _EPOCH_KEYS, start), EPOCH_FIELDS),
        events=[*_findings(summary), *([ended] if finished else [])],
        notes=list(notes),
        age=age,
    )


def _pick(rows: Iterable[Mapping[str, Any]], keys: Mapping[str, str], start: float) -> Iterator[dict[str, Any]]:
    for row in rows:
        found = {ours: row[theirs] for theirs, ours in keys.items() if row.get(theirs) is not None}
        if found:
            yield {
                "step": row.get("_step"),
                "time": row.get("_timestamp", math.nan) - start,
                **{axis: row.get(axis) for axis in _AXES},
                **found,
            }


def _findings(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the run noticed of itself; the summary keeps no step of it."""
    said = nested({key: value for key, value in summary.items() if key.startswith("event/diagnosis/")}, "/")
    return [{"event": "diagnosis", "message": line} for line in said.get("event", {}).get("diagnosis", {}).values()]


def _end_facts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the end of the run, which the summary keeps as a, b/c."""
    rows = ("_", "train/", "val/", "event/")
    return nested({key: value for key, value in summary.items() if not key.startswith(rows) and key not in _AXES}, "/")


def nested(flat: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """{"a/b": 1} as {"a": {"b": 1}}."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        where = result
        *groups, last = path.split(separator)
        for group in groups:
            inner = where.setdefault(group, {})
            where = inner if isinstance(inner, dict) else where
        where[last] = value
    return result


def run_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """run.json again, from the W&B config that carries it; Unreadable where another program logged the run."""
    facts = config.get("run")
    if isinstance(facts, Mapping) and "settings" in facts:
        return dict(facts)
    if config.get("mode") == "card":
        raise Unreadable("is the card itself, which every comparison holds already")
    raise Unreadable("was logged by another program: its W&B config has no `run`")


def is_wandb_path(text: str) -> bool:
    """Whether `text` reads as entity/project/run_id."""
    return re.fullmatch(r"[\w.-]+/[\w. -]+/[\w.-]+", text) is not None and not text.startswith(".")


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _merge(into: dict[str, Any], items: Iterable[Any]) -> None:
    """Put the updated items of a config or summary record in their places."""
    for item in items:
        where = into
        *groups, last = list(item.nested_key) or [item.key]
        for group in groups:
            where = where.setdefault(group, {})
        where[last] = _value(item.value_json)
