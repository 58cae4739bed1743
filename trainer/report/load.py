"""The runs that a command line names, each read from its folder, an offline W&B folder or the W&B server.

What cannot be read is one line (`LoadProblem`), not an exception. wandb is imported only when a run there is named.
"""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.errors import UserError, escape_controls
from trainer.config.files import read_json_object
from trainer.config.run_metadata import check_run_metadata
from trainer.config.settings import Settings
from trainer.config.text import shorten
from trainer.report.run_data import COLUMN_NAMES, TRAINER_MODE, RunData, RunRows, build_run, read_folder
from trainer.tracking.records import EvalRecord, EventRecord, OtherEvalRecord
from trainer.tracking.wandb_keys import AXES, COLUMNS, RETAIN_KEYS, SCORE_KEY
from trainer.tracking.wandb_logger import WandbFile, is_logged_in

API_TIMEOUT_SECONDS = 30  # a server that answers no request in this time is taken for dead


class LoadProblem(NamedTuple):
    """One line on a run that is not, or not wholly, in the comparison."""

    source: str
    text: str
    is_excluded: bool

    def __str__(self) -> str:
        return escape_controls(f"{self.source}: {self.text}")

    @property
    def without_place(self) -> str:
        """The line for a page that is passed on: it names no folder of this machine."""
        return escape_controls(f"{Path(self.source).name or self.source}: {self.text}")


def load_runs(sources: Sequence[str]) -> tuple[list[RunData], list[LoadProblem]]:
    """The runs that can be read, with names of their own, and what is wrong with these and the others.

    UserError for a run that does not exist, or that W&B does not give: without it the comparison is another one.
    """
    runs: list[RunData] = []
    problems: list[LoadProblem] = []
    for source in sources:
        if not Path(source).exists() and not (is_wandb_path(source) and is_logged_in()):
            expected = "a folder of a run, of W&B (offline) or of HF's Trainer, or entity/project/run_id if logged in"
            raise UserError(f"{source}: no such run folder: expected {expected}")
    for source in sources:
        try:
            run = read_run(source)
            if other := next((other for other in runs if other.run_id == run.run_id), None):
                raise UserError(
                    f"same run id as {Path(other.source).name} ({run.run_id}): the same run, or a copy of it"
                )
        except UserError as error:
            if not Path(source).exists():
                raise UserError(f"{source}: {error}") from error
            problems.append(LoadProblem(source, f"{error}; left out", is_excluded=True))
            continue
        runs.append(run)
        problems += [LoadProblem(source, note, is_excluded=False) for note in run.notes]
    namesakes = Counter(run.name for run in runs)
    for number, run in enumerate(runs, start=1):  # the id of a run of HF's Trainer is a path
        if namesakes[run.name] > 1:
            run.name += f" (run {number})" if run.mode == TRAINER_MODE else f" ({run.run_id})"
    return runs, problems


def read_run(source: str) -> RunData:
    """The run at one place; UserError where it cannot be read."""
    path = Path(source)
    if (path / "run.json").exists() or (path / "metrics.jsonl").exists():
        return read_folder(path)
    if states := [*path.glob("checkpoint-*/trainer_state.json"), *path.glob("trainer_state.json")]:
        return read_trainer_state(source, states)
    if path.suffix == ".wandb" and path.is_file():
        return read_offline(source, [path])
    if path.exists():  # one offline W&B folder, or a folder of such: the parts of one run, oldest first
        parts = sorted(path.glob("run-*.wandb")) or sorted(path.glob("*run-*/run-*.wandb"), key=lambda p: p.parent.name)
        return read_offline(source, [part for part in parts if part.is_file()])  # a named pipe would be waited for
    return read_online(source)


def read_trainer_state(source: str, files: Sequence[Path]) -> RunData:
    """The run of Hugging Face's Trainer in an output folder or one of its checkpoints: the file with the most steps."""
    histories = [read_json_object(file).get("log_history") for file in files]
    rows = [row for row in max((h for h in histories if isinstance(h, list)), key=len, default=[]) if type(row) is dict]
    names = {"step": "train/global_step", "eval_loss": "eval/loss"}
    return _trainer_run(source, collect_wandb_rows({names.get(k, f"train/{k}"): x for k, x in r.items()} for r in rows))


def _trainer_run(source: str, rows: RunRows) -> RunData:
    """A run of Hugging Face's Trainer, of which nothing but its rows is known; UserError where it has none."""
    steps, evals, epochs = (rows.series(kind) for kind in COLUMN_NAMES)
    if not len(steps["step"]) and not len(evals["step"]):
        raise UserError("holds neither a run of this program nor rows of Hugging Face's Trainer")
    return RunData(
        source=source,
        run_id=source,
        name=escape_controls(Path(source).name),
        mode=TRAINER_MODE,
        metadata={},
        steps=steps,
        evals=evals,
        epochs=epochs,
    )


def is_wandb_path(text: str) -> bool:
    """Whether `text` reads as entity/project/run_id."""
    return re.fullmatch(r"[\w.-]+/[\w. -]+/[\w.-]+", text) is not None and not text.startswith(".")


def read_offline(source: str, files: Sequence[Path]) -> RunData:
    """The run of `files`, parts of one run in order of time; UserError where they hold several runs or none."""
    if not files:
        raise UserError("holds neither run.json and metrics.jsonl nor a W&B run nor trainer_state.json")
    ids = list(dict.fromkeys(file.stem.removeprefix("run-") for file in files))
    if len(ids) > 1:
        raise UserError(f"holds {len(ids)} W&B runs ({', '.join(ids[:5])}); name one of their folders")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    exit_code: int | None = None
    is_truncated = False

    def iter_history() -> Iterator[dict[str, Any]]:
        nonlocal exit_code, is_truncated
        for path in files:
            file, exit_code = WandbFile(path), None
            for record in file:
                kind, content = record["type"], record.get(record["type"], {})
                if kind == "history":  # numbers that JSON does not know come as texts
                    special = ("NaN", "Infinity", "-Infinity")
                    yield {key: float(x) if x in special else x for key, x in content["item"].items()}
                elif kind in ("run", "config"):
                    config.update((content.get("config", {}) if kind == "run" else content).get("update", {}))
                elif kind == "summary":
                    summary.update(content.get("update", {}))
                elif kind == "exit":
                    exit_code = content.get("exit_code", 0)
            is_truncated |= file.is_truncated

    try:
        rows = collect_wandb_rows(iter_history())
    except ValueError as error:
        raise UserError(str(error)) from error
    if not config:
        raise UserError("the .wandb file holds no run (a killed process leaves it empty)")
    if is_truncated:
        rows.notes.append("the end of its .wandb file was cut off and is left out")
    age_seconds = time.time() - max(file.stat().st_mtime for file in files)
    return build_wandb_run(source, config, summary, exit_code, rows, age_seconds)


def read_online(path: str) -> RunData:
    """The run at entity/project/run_id on the server; UserError where it cannot be had."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        run = wandb.Api(timeout=API_TIMEOUT_SECONDS).run(path)
        rows = collect_wandb_rows(run.scan_history())
        summary = dict(run.summary_metrics)
    except Exception as error:  # whatever the client raises: this run cannot be had, others may
        raise UserError(f"W&B does not give it: {shorten(str(error), 200)}") from error
    exit_code = {"finished": 0, "running": None}.get(run.state, 1)
    return build_wandb_run(path, run.config, summary, exit_code, rows)


def collect_wandb_rows(history: Iterable[Mapping[str, Any]]) -> RunRows:
    """Rows of W&B by kind; `train/*` and `eval/*` of one step may share a row or have their own."""
    rows, axes = RunRows(), AXES | {"_timestamp": "time"}
    for row in history:
        for kind, columns in COLUMNS.items():
            if any(row.get(key) is not None for key in columns):
                rows.add(kind, {column: row.get(key) for key, column in (axes | columns).items()})
        for name in (key[5:-5] for key in row if re.fullmatch("eval_.+/loss", key)):
            columns = {key.replace("eval/", f"eval_{name}/"): column for key, column in COLUMNS[EvalRecord].items()}
            values = {column: row.get(key) for key, column in (axes | columns).items()}
            rows.add(OtherEvalRecord, {**values, "val_set": name})
    return rows


def build_wandb_run(
    source: str,
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    exit_code: int | None,  #: None while it goes on
    rows: RunRows,
    age_seconds: float = 0.0,
) -> RunData:
    """The run as the report sees it; UserError where it is the reference run, or has no row.

    A config without run.json is that of another program, whose rows are read as those of Hugging Face's Trainer.
    """
    if "run" not in config and config.get("mode") != "reference":
        return _trainer_run(source, rows)

    scores = {key.removeprefix(SCORE_KEY): x for key, x in summary.items() if key.startswith(SCORE_KEY)}
    events: list[tuple[str, str, dict[str, Any]]] = [
        *(("diagnosis", str(value), {}) for key, value in summary.items() if key.startswith("event/diagnosis/")),
        *(("retain_evaluation", "", {"loss": summary[key]}) for key in RETAIN_KEYS if key in summary),
        ("test_scores", "", {"scores": scores}),
    ]
    if exit_code == 0:
        facts = {key: value for key, value in summary.items() if not re.search("^_|/", key) and key not in AXES}
        events.append(("finished", "", facts))
    for name, message, facts in events:  # the summary keeps no step of them
        rows.events.append(EventRecord(event=name, step=0, message=message, time=0.0, facts=facts))
    return build_run(source, metadata_from_config(config), rows, math.inf if exit_code else age_seconds)


def metadata_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """run.json again, from the W&B config that carries it; UserError for another, and for the reference run."""
    if "run" not in config:
        raise UserError("is the card itself, which every comparison holds already")
    content = dict(config["run"]) if isinstance(config["run"], Mapping) else {}
    metadata = check_run_metadata(content, source="`run` of its W&B config")
    # W&B writes 1.0 as 1: without their own types equal settings read as other ones
    return {**metadata, "settings": json.loads(json.dumps(Settings.from_dict(metadata["settings"]).as_dict()))}
