"""One run as the report sees it, read back from its folder.

The rows of a run are read one by one, in bounded memory: of a long run the steps are kept as means of several each.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.errors import UserError
from trainer.config.run_metadata import read_run_metadata
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER
from trainer.tracking.records import (
    EpochRecord,
    EvalRecord,
    EventRecord,
    StepRecord,
    from_line,
    is_number,
    iter_lines,
)

#: columns of one kind of row, each an array of float64 of the same length; NaN where a row lacks the value
Series = dict[str, NDArray[np.float64]]
ROW_CLASSES: dict[str, type] = {"step": StepRecord, "eval": EvalRecord, "epoch": EpochRecord}
KINDS = {row_class: kind for kind, row_class in ROW_CLASSES.items()}
COLUMN_NAMES = {
    kind: tuple(column.name for column in fields(row_class) if column.name != "row_nll")
    for kind, row_class in ROW_CLASSES.items()
}
PORTION_ROWS = 2**13  # of steps that wait to become columns
MAX_STEP_ROWS = 2**18  # of a run in memory (19 MB); of more, so many means of 2, 4, 8 ... steps each
MEAN_COLUMNS = ("loss", "lr", "grad_norm", "tokens_per_second")  # of the others the last of the steps stands
STOP_EVENTS = ("interrupted", "not_finite")  # events after which a run goes on only when it is resumed
RUNNING_TIMEOUT_SECONDS = 600.0  # an unfinished run whose last row is younger than this may still be going


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run: what it was (`metadata`, the content of run.json), what it left, and what is wrong with it (`notes`)."""

    source: str  #: as the user gave it
    run_id: str
    name: str
    mode: str
    metadata: Mapping[str, Any]
    steps: Series
    evals: Series
    epochs: Series
    summary: Mapping[str, Any] = field(default_factory=dict)  #: the numbers of the `finished` event
    state: str = "finished"  #: finished, going or stopped
    diagnostics: tuple[tuple[int, str], ...] = ()  #: (step, line) of what the run noticed of itself
    generations: tuple[Mapping[str, Any], ...] = ()  #: of each evaluation: epoch, texts, and scores where asked for
    retained: tuple[float, ...] = ()  #: losses of the retained text (--retain-data), before training and after
    notes: tuple[str, ...] = ()
    eval_records_path: Path | None = None  #: the losses of each record, None where the run left none

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its own end, or was evaluated at its last step and stopped after."""
        return self.state == "finished"

    def get(self, path: str) -> Any:
        """The value at a dotted path of run.json, None where there is none."""
        value: Any = self.metadata
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def initial_loss(self) -> float | None:
        """Validation loss before the first step, in nats per token."""
        indices = np.flatnonzero(self.evals["step"] == 0)
        return float(self.evals["loss"][indices[0]]) if len(indices) else None

    @property
    def best_eval(self) -> dict[str, float] | None:
        """Step, epoch and loss of the lowest validation loss after step 0."""
        trained_indices = np.flatnonzero((self.evals["step"] > 0) & np.isfinite(self.evals["loss"]))
        if not len(trained_indices):
            return None
        return self._eval_at(trained_indices[np.argmin(self.evals["loss"][trained_indices])])

    @property
    def final_eval(self) -> dict[str, float] | None:
        """Step, epoch and loss of the last evaluation after step 0."""
        return self._eval_at(-1) if np.any(self.evals["step"][-1:] > 0) else None

    def _eval_at(self, index: int) -> dict[str, float]:
        return {name: float(self.evals[name][index]) for name in ("step", "epoch", "loss")}

    @property
    def improvement(self) -> float | None:
        """By how much the best evaluation is below the one before the first step; None where either is missing."""
        best, initial = self.best_eval, self.initial_loss
        return None if best is None or initial is None else initial - best["loss"]

    @property
    def changed_on_resume(self) -> Mapping[str, Any]:
        """{setting or `data`: [when the run began, now]} of what a resume was allowed to change."""
        return self.get("resumed.changed") or {}

    @property
    def forgetting(self) -> float | None:
        """By how much the loss of the retained text rose, in nats per token; None where it was not measured twice."""
        return self.retained[-1] - self.retained[0] if len(self.retained) > 1 else None

    def index_at_epoch(self, series: Series, epoch: float) -> int | None:
        """The row of `series` nearest to `epoch`, None where none lies within half a step of it."""
        if not len(series["epoch"]):
            return None
        steps_per_epoch = self.get("resolved.steps_per_epoch")
        max_distance = 0.5 / steps_per_epoch if steps_per_epoch else 1e-3
        index = int(np.argmin(np.abs(series["epoch"] - epoch)))
        return index if abs(series["epoch"][index] - epoch) <= max_distance else None


# --- rows ---


class RunRows:
    """The rows of a run by kind, added one by one; of a long run the means of several steps each."""

    def __init__(self) -> None:
        self.events: list[EventRecord] = []
        self.notes: list[str] = []  #: what could not be read
        self.start_time = 0.0  #: what the times of the rows begin with
        self.steps_per_row = 1
        self._rows: dict[str, list[list[float]]] = {kind: [] for kind in COLUMN_NAMES}
        self._thinned = np.empty((0, len(COLUMN_NAMES["step"])))  # the steps before those in `_rows`

    def add(self, kind: str, row: Mapping[str, Any]) -> None:
        """Take the next row of a kind; what it lacks, or is no number, becomes NaN."""
        self._rows[kind].append([to_float(row.get(name)) for name in COLUMN_NAMES[kind]])
        if kind == "step" and len(self._rows["step"]) >= PORTION_ROWS:
            self._thinned = self._all_rows("step")
            self._rows["step"].clear()
            if len(self._thinned) > MAX_STEP_ROWS:
                self._thinned = _average(_drop_superseded("step", self._thinned), 2)
                self.steps_per_row *= 2

    def _all_rows(self, kind: str) -> NDArray[np.float64]:
        rows = np.array(self._rows[kind]).reshape(-1, len(COLUMN_NAMES[kind]))
        return np.concatenate([self._thinned, _average(rows, self.steps_per_row)]) if kind == "step" else rows

    def series(self, kind: str) -> Series:
        """The columns of the rows that stand."""
        rows = _drop_superseded(kind, self._all_rows(kind))
        series = dict(zip(COLUMN_NAMES[kind], np.ascontiguousarray(rows.T), strict=True))
        series["time"] -= self.start_time
        return series


def _drop_superseded(kind: str, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without the rows that a later row steps back behind: they were done again after a resume."""
    step = rows[:, COLUMN_NAMES[kind].index("step")]
    rows, step = rows[np.isfinite(step)], step[np.isfinite(step)]
    min_later_step = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)[: len(step)]
    return rows[step < min_later_step]


def _average(steps: NDArray[np.float64], steps_per_row: int) -> NDArray[np.float64]:
    """A row for so many steps, and one for the rest at the end."""
    if steps_per_row == 1 or not len(steps):
        return steps
    starts = np.arange(0, len(steps), steps_per_row)
    ends = np.minimum(starts + steps_per_row, len(steps))
    rows = steps[ends - 1]
    is_mean = [name in MEAN_COLUMNS for name in COLUMN_NAMES["step"]]
    rows[:, is_mean] = np.add.reduceat(steps[:, is_mean], starts) / (ends - starts)[:, None]
    return rows


def to_float(value: Any) -> float:
    """A number of JSON, NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


# --- a run folder ---


def read_folder(folder: Path) -> RunData:
    """The run of a run folder; UserError where settings or rows are missing."""
    path, rows, num_bad = folder / "metrics.jsonl", RunRows(), 0
    metadata = read_run_metadata(folder / "run.json")
    try:
        age_seconds = time.time() - path.stat().st_mtime
        for line in iter_lines(path):
            if not line.endswith(b"\n"):  # rows are written newline last
                rows.notes.append("its last row was cut off and is left out")
            elif line.strip():
                try:
                    record = from_line(line)
                except ValueError:
                    num_bad += 1
                    continue
                if isinstance(record, EventRecord):
                    rows.events.append(record)
                else:
                    rows.add(KINDS[type(record)], vars(record))
    except OSError as error:
        raise UserError(f"no metrics: cannot read metrics.jsonl ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"no metrics: {error}") from error
    if num_bad:
        are = "rows could not be read and are" if num_bad > 1 else "row could not be read and is"
        rows.notes.append(f"{num_bad} {are} left out")
    return build_run(str(folder), metadata, rows, age_seconds, folder / EVAL_RECORDS_FOLDER)


def build_run(
    source: str, metadata: Mapping[str, Any], rows: RunRows, age_seconds: float, eval_records_path: Path | None = None
) -> RunData:
    """A run of valid metadata, with what is missing said in its notes; UserError where there is no row at all."""
    metadata = escape_control(metadata)
    steps, evals, epochs = (rows.series(kind) for kind in ROW_CLASSES)
    if not len(steps["step"]) and not len(evals["step"]):
        raise UserError("no metrics: neither a step nor an evaluation was written")
    events = [EventRecord(**escape_control(vars(event))) for event in rows.events]
    facts: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        facts.setdefault(event.event, []).append(event.facts)
    end_facts = facts.get("finished", [{}])[-1]
    run = RunData(
        source=source,
        run_id=metadata["run_id"],
        name=metadata["name"],
        mode=metadata["mode"],
        metadata=metadata,
        steps=steps,
        evals=evals,
        epochs=epochs,
        summary={name: value for name, value in end_facts.items() if is_number(value) or isinstance(value, bool)},
        diagnostics=tuple((event.step, event.message) for event in events if event.event == "diagnosis"),
        generations=tuple(map(_read_generations, facts.get("samples", ()))),
        retained=tuple(float(f["loss"]) for f in facts.get("retain_evaluation", ()) if is_number(f.get("loss"))),
        eval_records_path=eval_records_path if eval_records_path and eval_records_path.exists() else None,
    )
    total_steps, final_eval, notes = run.get("resolved.total_steps"), run.final_eval, list(rows.notes)
    if rows.steps_per_row > 1:
        notes.append(f"its steps are read as means of {rows.steps_per_row} each")
    state = "finished"
    is_evaluated_to_end = final_eval is not None and final_eval["step"] == total_steps
    if not is_evaluated_to_end and "finished" not in facts:  # whatever came after its last evaluation
        was_stopped = bool(events) and events[-1].event in STOP_EVENTS
        state = "stopped" if was_stopped or age_seconds > RUNNING_TIMEOUT_SECONDS else "going"
        last_step = max(float(series["step"][-1]) for series in (steps, evals) if len(series["step"]))
        progress = f"step {last_step:,.0f}" + (f" of {total_steps:,}" if total_steps else "")
        reason = f": {events[-1].message}" if was_stopped else ""
        status = "still going" if state == "going" else "stopped before its end"
        notes.append(f"{status} ({progress}){reason}; left out of the verdict")
    elif not run.summary:
        notes.append("evaluated to its end but not closed: its time and memory are unknown")
    changes = sorted(run.changed_on_resume.items())
    notes += [f"{name} was changed on resume, from {old} to {new}" for name, (old, new) in changes]
    if run.best_eval is None:
        notes.append("no evaluation after step 0: no validation loss to compare")
    elif run.initial_loss is None:
        notes.append("no evaluation at step 0: how far it improved on its base is unknown")
    return dataclasses.replace(run, state=state, notes=tuple(notes))


def _read_generations(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an evaluation generated: epoch, texts, and scores where asked for; what is not of that form is left out."""
    texts, scores = facts.get("texts"), facts.get("scores")
    names = ("prompt", "completion", "reference")

    def is_whole(text: Any) -> bool:
        return isinstance(text, Mapping) and all(isinstance(text.get(name), str) for name in names)

    return {
        **{name: facts[name] for name in ("epoch", "scored") if is_number(facts.get(name))},
        "texts": list(filter(is_whole, texts if isinstance(texts, list) else [])),
        "scores": {name: x for name, x in scores.items() if is_number(x)} if isinstance(scores, Mapping) else {},
    }


def escape_control(value: Any) -> Any:
    """`value`, of JSON, with what is neither printable nor a space, line or tab in its strings as an escape: `\\x1b`.

    Names and texts of a run reach terminals and pages: no control sequence and no change of writing direction does.
    """
    if isinstance(value, str):
        if value.isprintable():
            return value
        return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in value)
    if isinstance(value, Mapping):
        return {escape_control(key): escape_control(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [escape_control(item) for item in value]
    return value
