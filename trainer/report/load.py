"""The runs that a command line names, each read from its folder; those of Hugging Face's Trainer from W&B too.

What cannot be read is one line (`LoadProblem`), not an exception. wandb is imported only when a run there is named.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.errors import UserError, escape_controls
from trainer.config.files import read_json_object
from trainer.config.text import shorten
from trainer.report.run_data import TRAINER_MODE, RunData, RunRows, read_folder
from trainer.tracking.records import EvalRecord, StepRecord
from trainer.tracking.wandb_logger import is_logged_in


class LoadProblem(NamedTuple):
    """One line on a run that is not, or not wholly, in the comparison."""

    source: str
    text: str

    def __str__(self) -> str:
        return escape_controls(f"{self.source}: {self.text}")

    @property
    def without_place(self) -> str:
        """The line for a page that is passed on: it names no folder of this machine."""
        return escape_controls(f"{Path(self.source).name or self.source}: {self.text}")


def load_runs(sources: Sequence[str]) -> tuple[list[RunData], list[LoadProblem]]:
    """The runs that can be read, with names of their own, and what is wrong with these and the others. UserError for a
    run that does not exist, or that W&B does not give: without it the comparison is another one."""
    runs: list[RunData] = []
    problems: list[LoadProblem] = []
    for source in sources:
        is_wandb_path = re.fullmatch(r"[\w-][\w.-]*/[\w. -]+/[\w.-]+", source) and is_logged_in()
        if not Path(source).exists() and not is_wandb_path:
            expected = "expected one, an output folder of HF's Trainer, or entity/project/run_id on W&B if logged in"
            raise UserError(f"{source}: no such run folder: {expected}")
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
            problems.append(LoadProblem(source, f"{error}; left out"))
            continue
        runs.append(run)
        problems += [LoadProblem(source, note) for note in run.notes]
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
        histories = [read_json_object(file).get("log_history") for file in states]
        return _trainer_run(source, path.name, max((h for h in histories if isinstance(h, list)), key=len, default=[]))
    if path.exists():
        raise UserError("holds neither run.json and metrics.jsonl nor a trainer_state.json of Hugging Face's Trainer")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        run = wandb.Api(timeout=30).run(source)
        history = list(run.scan_history())
    except Exception as error:  # whatever the client raises: this run cannot be had, others may
        raise UserError(f"W&B does not give it: {shorten(str(error), 200)}") from error
    names = {"train/global_step": "step", "eval/loss": "eval_loss"}
    rows = [{names.get(key, key.removeprefix("train/")): value for key, value in row.items()} for row in history]
    return _trainer_run(source, run.name, rows)


def _trainer_run(source: str, name: str, history: Sequence[Any]) -> RunData:
    rows = RunRows()
    for row in (row for row in history if isinstance(row, dict)):
        if row.get("eval_loss") is not None:
            rows.add(EvalRecord, row | {"loss": row["eval_loss"]})
        if row.get("loss") is not None:
            rows.add(StepRecord, row | {"lr": row.get("learning_rate")})
    steps, evals, epochs = rows.all_series()
    name = escape_controls(name)
    return RunData(
        source=source, run_id=source, name=name, mode=TRAINER_MODE, metadata={}, steps=steps, evals=evals, epochs=epochs
    )
