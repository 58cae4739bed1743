"""Runs read back from Weights & Biases: offline files, and the server. wandb is imported only when one is asked for."""

import itertools
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.config.run_metadata import check_run_metadata
from trainer.report.run_data import (
    EPOCH_FIELDS,
    EVAL_FIELDS,
    STEP_FIELDS,
    RunData,
    RunReadError,
    RunRecords,
    build_run,
    to_series,
)
from trainer.report.series_collector import SeriesCollector
from trainer.tracking.records import EpochRecord, EvalRecord, StepRecord
from trainer.tracking.wandb_file import WandbFile
from trainer.tracking.wandb_keys import AXES, COLUMNS, RETAIN_KEYS

_NUM_ROWS_AT_A_TIME = 10_000
API_TIMEOUT_SECONDS = 30  # a server that answers no request in this time is taken for dead


def offline_files(path: Path) -> list[Path]:
    """The .wandb files that `path` stands for, oldest first: itself, one offline folder, or a folder of such."""
    if path.is_file():
        return [path] if path.suffix == ".wandb" else []
    return sorted(path.glob("run-*.wandb")) or sorted(
        path.glob("*run-*/run-*.wandb"), key=lambda file: file.parent.name
    )


def read_offline(source: str, files: list[Path]) -> RunData:
    """The run of `files`, parts of one run in order of time; RunReadError where they hold several runs or none."""
    ids = list(dict.fromkeys(file.stem.removeprefix("run-") for file in files))
    if len(ids) > 1:
        raise RunReadError(f"holds {len(ids)} W&B runs ({', '.join(ids[:5])}); name one of their folders")
    content = _FileContent()
    records = collect_rows(content.history(files))
    if not content.config and not content.num_rows:
        raise RunReadError("the .wandb file holds no run (a killed process leaves it empty)")
    run = WandbRun(
        run_id=ids[0],
        name=content.name,
        config=content.config,
        summary=content.summary,
        is_finished=content.exit_code == 0,
        age_seconds=math.inf if content.exit_code else time.time() - max(file.stat().st_mtime for file in files),
        notes=("the end of its .wandb file was cut off and is left out",) if content.is_truncated else (),
    )
    return to_run_data(source, run, records)


@dataclass
class _FileContent:
    """What .wandb files say of one run beside its rows, once these were read."""

    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    is_truncated: bool = False
    num_rows: int = 0

    def history(self, paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        """The rows of the files, one at a time; RunReadError where one is no such file."""
        for path in paths:
            file, self.exit_code = WandbFile(path), None
            try:
                for record in file:
                    content = record.get(record["type"], {})
                    if record["type"] == "history":
                        self.num_rows += 1
                        yield {key: _to_number(value) for key, value in content["item"].items()}
                    else:
                        self._take(record["type"], content)
            except ValueError as error:
                raise RunReadError(str(error)) from error
            self.is_truncated |= file.is_truncated

    def _take(self, kind: str, content: Mapping[str, Any]) -> None:
        if kind == "run":
            self.name = content.get("display_name") or self.name
            _merge(self.config, content.get("config", {}).get("update", {}))
        elif kind == "config":
            _merge(self.config, content.get("update", {}))
        elif kind == "summary":
            _merge(self.summary, content.get("update", {}))
        elif kind == "exit":
            self.exit_code = content.get("exit_code", 0)


def read_online(path: str) -> RunData:
    """The run at entity/project/run_id on the server; RunReadError where it cannot be had. Asks for no login."""
    from trainer.tracking.wandb_environment import is_logged_in

    if not is_logged_in():
        raise RunReadError("no such folder; and to read it from W&B, run `wandb login` or set WANDB_API_KEY first")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        run = wandb.Api(timeout=API_TIMEOUT_SECONDS).run(path)
        records = collect_rows(run.scan_history())
        summary = dict(run.summary_metrics)
    except Exception as error:  # whatever the client raises: this run cannot be had, others may
        raise RunReadError(f"W&B does not give it: {' '.join(str(error).split())[:200]}") from error
    wandb_run = WandbRun(
        run_id=run.id,
        name=run.name,
        config=run.config,
        summary=summary,
        is_finished=run.state == "finished",
        age_seconds=0.0 if run.state == "running" else math.inf,
    )
    return to_run_data(path, wandb_run, records)


@dataclass(frozen=True, kw_only=True)
class WandbRun:
    """What W&B keeps of one run beside its rows, from its file or its server."""

    run_id: str
    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    is_finished: bool
    age_seconds: float  #: since the last row
    notes: tuple[str, ...] = ()


def to_run_data(source: str, run: WandbRun, records: RunRecords) -> RunData:
    """The run as the report sees it; RunReadError where another program logged it, or it has no row."""
    finished_event = {"event": "finished", "facts": _run_summary(run.summary)}
    events: list[Mapping[str, Any]] = [*_events(run.summary), *([finished_event] if run.is_finished else [])]
    records = replace(records, events=events, notes=[*run.notes, *records.notes], age_seconds=run.age_seconds)
    metadata = {"run_id": run.run_id, "name": run.name, **metadata_from_config(run.config)}
    return build_run(source, metadata, records, run.run_id)


def collect_rows(rows: Iterable[Mapping[str, Any]]) -> RunRecords:
    """Rows of W&B by kind, in bounded memory; `train/*` and `val/*` of one step may share a row or have their own."""
    rows, series = (row for row in rows), SeriesCollector()  # a generator stays at its end, W&B's own scan need not
    while portion := list(itertools.islice(rows, _NUM_ROWS_AT_A_TIME)):
        series.add(
            steps=to_series(_select_rows(portion, COLUMNS[StepRecord]), STEP_FIELDS),
            evals=to_series(_select_rows(portion, COLUMNS[EvalRecord]), EVAL_FIELDS),
            epochs=to_series(_select_rows(portion, COLUMNS[EpochRecord]), EPOCH_FIELDS),
        )
    records = series.to_records((), ())
    kinds = (records.steps, records.evals, records.epochs)
    start_time = np.nanmin(np.concatenate([*(kind["time"] for kind in kinds), [np.inf]]))
    for kind in kinds:
        kind["time"] -= start_time
    return records


def _select_rows(rows: Iterable[Mapping[str, Any]], keys: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        values = {column: row[key] for key, column in keys.items() if row.get(key) is not None}
        if values:
            yield {
                "step": row.get("_step"),
                "time": row.get("_timestamp"),
                **{axis: row.get(axis) for axis in AXES},
                **values,
            }


def _events(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the run noticed of itself, of which the summary keeps no step, and the losses of retained text."""
    diagnostics = unflatten({key: value for key, value in summary.items() if key.startswith("event/diagnosis/")}, "/")
    events = [
        {"event": "diagnosis", "message": line} for line in diagnostics.get("event", {}).get("diagnosis", {}).values()
    ]
    losses = [summary[key] for key in RETAIN_KEYS if key in summary]
    return events + [{"event": "retain_evaluation", "facts": {"loss": loss}} for loss in losses]


def _run_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the end of the run, which the summary keeps as a, b/c."""
    ignored_prefixes = ("_", "train/", "val/", "test/", "retain/", "event/")
    return unflatten(
        {key: value for key, value in summary.items() if not key.startswith(ignored_prefixes) and key not in AXES}, "/"
    )


def unflatten(flat: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """{"a/b": 1} as {"a": {"b": 1}}."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        node = result
        *parents, leaf_key = path.split(separator)
        for parent in parents:
            child = node.setdefault(parent, {})
            node = child if isinstance(child, dict) else node
        node[leaf_key] = value
    return result


def metadata_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """run.json again, from the W&B config that carries it; RunReadError where another program logged the run."""
    metadata = config.get("run")
    if isinstance(metadata, Mapping):
        try:
            return check_run_metadata(dict(metadata), source="`run` of its W&B config")
        except UserError as error:
            raise RunReadError(str(error)) from error
    if config.get("mode") == "card":
        raise RunReadError("is the card itself, which every comparison holds already")
    raise RunReadError("was logged by another program: its W&B config has no `run`")


def is_wandb_path(text: str) -> bool:
    """Whether `text` reads as entity/project/run_id."""
    return re.fullmatch(r"[\w.-]+/[\w. -]+/[\w.-]+", text) is not None and not text.startswith(".")


def _to_number(value: Any) -> Any:
    """Numbers that JSON does not know come as texts."""
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _merge(target: dict[str, Any], update: Mapping[str, Any]) -> None:
    """Put what a later record updates in its place, nested values one by one."""
    for key, value in update.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value
