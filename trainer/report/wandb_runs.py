"""Runs read back from Weights & Biases: offline files, and the server. wandb is imported only when one is asked for."""

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.run_metadata import check_run_metadata
from trainer.report.run_data import RunData, RunReadError, build_run
from trainer.report.run_records import SERIES_CLASSES, RunRecords, split_rows, to_float, to_series
from trainer.tracking.records import EventRecord
from trainer.tracking.wandb_file import WandbFile
from trainer.tracking.wandb_keys import AXES, COLUMNS, RETAIN_KEYS

_ROW_BYTES = 800  # of a row of W&B in memory, about
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
    run = WandbRun()
    records = collect_rows(run.read_history(files))
    if not run.config:
        raise RunReadError("the .wandb file holds no run (a killed process leaves it empty)")
    records.age_seconds = time.time() - max(file.stat().st_mtime for file in files)
    return to_run_data(source, run, records)


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
    exit_code = {"finished": 0, "running": None}.get(run.state, 1)
    return to_run_data(path, WandbRun(config=run.config, summary=summary, exit_code=exit_code), records)


@dataclass(kw_only=True)
class WandbRun:
    """What W&B keeps of one run beside its rows."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None  #: None while it goes on
    is_truncated: bool = False

    def read_history(self, paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
        """The rows of .wandb files, one at a time, the rest kept here; RunReadError where one is no such file."""
        for path in paths:
            file, self.exit_code = WandbFile(path), None
            try:
                for record in file:
                    content = record.get(record["type"], {})
                    if record["type"] == "history":
                        yield {key: _to_number(value) for key, value in content["item"].items()}
                    elif record["type"] == "run":
                        self.config.update(content.get("config", {}).get("update", {}))
                    elif record["type"] == "config":
                        self.config.update(content.get("update", {}))
                    elif record["type"] == "summary":
                        self.summary.update(content.get("update", {}))
                    elif record["type"] == "exit":
                        self.exit_code = content.get("exit_code", 0)
            except ValueError as error:
                raise RunReadError(str(error)) from error
            self.is_truncated |= file.is_truncated


def to_run_data(source: str, run: WandbRun, records: RunRecords) -> RunData:
    """The run as the report sees it; RunReadError where another program logged it, or it has no row."""
    summary = run.summary
    records.events += [
        EventRecord(event="diagnosis", step=0, message=str(line), time=0.0)  # of which the summary keeps no step
        for key, line in summary.items()
        if key.startswith("event/diagnosis/")
    ]
    records.events += [
        EventRecord(event="retain_evaluation", step=0, message="", time=0.0, facts={"loss": summary[key]})
        for key in RETAIN_KEYS
        if key in summary
    ]
    if run.exit_code == 0:
        facts = {key: value for key, value in summary.items() if not re.search("^_|/", key) and key not in AXES}
        records.events.append(EventRecord(event="finished", step=0, message="", time=0.0, facts=facts))
    if run.exit_code:
        records.age_seconds = math.inf
    if run.is_truncated:
        records.notes.append("the end of its .wandb file was cut off and is left out")
    return build_run(source, metadata_from_config(run.config), records)


def collect_rows(rows: Iterable[Mapping[str, Any]]) -> RunRecords:
    """Rows of W&B by kind, in bounded memory; `train/*` and `val/*` of one step may share a row or have their own."""
    records, start_time = RunRecords(), math.nan
    for portion in split_rows(rows, lambda row: _ROW_BYTES):
        if math.isnan(start_time):
            times = (to_float(row.get("_timestamp")) for row in portion)
            start_time = min(filter(math.isfinite, times), default=math.nan)
        for kind, record_class in SERIES_CLASSES.items():
            series = to_series(_select_rows(portion, COLUMNS[record_class]), kind)
            series["time"] -= start_time
            records.add(kind, series)
    return records


def _select_rows(rows: Iterable[Mapping[str, Any]], keys: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        values = {column: row[key] for key, column in keys.items() if row.get(key) is not None}
        if values:
            yield {
                "step": row.get("_step"),
                "time": row.get("_timestamp"),
                **{axis: row.get(axis) for axis in AXES},
            } | values


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
