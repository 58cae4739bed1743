"""One run as the report sees it, read back from its folder row by row, in bounded memory."""

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ValidationError

from trainer.config.errors import UserError, escape_controls
from trainer.config.fields import Float
from trainer.config.run_metadata import read_run_metadata
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, score_name
from trainer.tracking.records import (
    FINAL_EVALUATIONS,
    EpochRecord,
    EvalRecord,
    EventRecord,
    OtherEvalRecord,
    StepRecord,
    from_line,
    is_number,
    iter_lines,
)

#: columns of one kind of row, each an array of float64 of the same length; NaN where a row lacks the value
Series = dict[str, NDArray[np.float64]]
COLUMN_NAMES: dict[type, list[str]] = {
    kind: [column.name for column in fields(kind) if column.name != "row_nll"]
    for kind in (StepRecord, EvalRecord, EpochRecord)
}
TRAINER_MODE = "trainer"  # of a run of Hugging Face's Trainer: its rows are plotted, and nothing else is known of it
MAX_STEP_ROWS = 2**18  # of a run in memory; of more, every 2nd, 4th, 8th ... step is read
STOP_EVENTS = ("interrupted", "not_finite")  # events after which a run goes on only when it is resumed
RUNNING_TIMEOUT_SECONDS = 600.0  # an unfinished run whose last row is younger than this may still be going


#: a text without what a terminal would act on
Text = Annotated[str, AfterValidator(lambda text: "\n".join(map(escape_controls, text.strip().splitlines())))]


class SampleText(BaseModel):
    """A completion of a validation prompt beside its reference, and what the base made of it where that was asked."""

    prompt: Text
    reference: Text
    completion: Text
    base: Text | None = None


class Samples(BaseModel):
    """What an evaluation generated."""

    texts: list[SampleText]
    epoch: Float


@dataclass(kw_only=True, eq=False)
class RunData:
    """One run: what it was (`metadata`, the content of run.json), what it left, and what is wrong with it (`notes`)."""

    source: str  #: as the user gave it
    run_id: str
    name: str
    mode: str  #: full, lora or TRAINER_MODE
    metadata: Mapping[str, Any]
    steps: Series
    evals: Series
    epochs: Series
    summary: Mapping[str, Any] = field(default_factory=dict)  #: the numbers of the `finished` event
    state: str = "finished"  #: finished (also where it was stopped after the evaluation at its end), going or stopped
    has_diverged: bool = False  #: whether it was stopped by a loss or gradient that was not finite
    diagnostics: Sequence[tuple[int, str]] = ()  #: (step, line) of what the run noticed of itself
    samples: Samples | None = None  #: of its last evaluation that generated texts
    forgetting: float | None = None  #: rise of the retained text's loss (nats per token); None where not measured twice
    #: of the test and retain splits at the end, where the run reported them
    final_losses: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    #: {name: evaluations} of the further sets of --val-data, which are only plotted
    val_sets: Mapping[str, Series] = field(default_factory=dict)
    #: {`score_name` of a scorer: mean over the test records, from 0 to 1}
    scores: Mapping[str, float] = field(default_factory=dict)
    eval_records_path: Path | None = None  #: loss (and text and scores) of each record, None where the run left none

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    @property
    def is_judged(self) -> bool:
        """Whether it is a model that somebody trained (launch/judge.py), of whose training nothing is known."""
        return "judged" in self.metadata

    def get(self, path: str) -> Any:
        """The value at a dotted path of run.json, None where there is none."""
        value: Any = self.metadata
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def initial_loss(self) -> float | None:
        """Validation loss before the first step, in nats per token."""
        losses = self.evals["loss"][self.evals["step"] == 0]
        return float(losses[0]) if len(losses) and np.isfinite(losses[0]) else None

    @property
    def best_eval(self) -> dict[str, float] | None:
        """Step, epoch and loss of the lowest validation loss after step 0."""
        trained = np.flatnonzero((self.evals["step"] > 0) & np.isfinite(self.evals["loss"]))
        return self._eval_at(trained[np.argmin(self.evals["loss"][trained])]) if len(trained) else None

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

    def index_at_epoch(self, series: Series, epoch: float) -> int | None:
        """The row of `series` nearest to `epoch`, None where none lies within half a step of it."""
        distances, steps_per_epoch = np.abs(series["epoch"] - epoch), self.get("resolved.steps_per_epoch")
        max_distance = 0.5 / steps_per_epoch if steps_per_epoch else 1e-3
        return int(np.argmin(distances)) if np.any(distances <= max_distance) else None


class RunRows:
    """The rows of a run by kind, added one by one; of a very long run every so many-th step, and the last."""

    def __init__(self) -> None:
        self.events: list[EventRecord] = []
        self.notes: list[str] = []  #: what could not be read
        self.val_sets: dict[str, RunRows] = {}  #: {name: rows} of the further sets of --val-data
        self.step_stride = 1
        self._num_steps = 0
        self._last_step: list[float] = []
        self._rows = {kind: array("d") for kind in COLUMN_NAMES}  # row after row

    def add(self, kind: type, row: Mapping[str, Any]) -> None:
        """Take the next row of a kind; what it lacks, or is no number, becomes NaN."""
        if kind is OtherEvalRecord:
            self.val_sets.setdefault(escape_controls(str(row["val_set"])), RunRows()).add(EvalRecord, row)
            return
        values = [to_float(row.get(name)) for name in COLUMN_NAMES[kind]]
        if kind is StepRecord:
            self._num_steps += 1
            self._last_step = values if self._num_steps % self.step_stride else []
            if self._last_step:
                return
        self._rows[kind].extend(values)
        if kind is StepRecord and len(self._rows[kind]) >= MAX_STEP_ROWS * len(values):
            self._rows[kind] = array("d", np.array(self._rows[kind]).reshape(-1, len(values))[1::2].tobytes())
            self.step_stride *= 2

    def series(self, kind: Any) -> Series:
        """The columns of the rows, without those that a later row steps back behind: done again after a resume."""
        values = np.append(self._rows[kind], self._last_step if kind is StepRecord else [])
        columns = values.reshape(-1, len(COLUMN_NAMES[kind])).T
        step = columns[COLUMN_NAMES[kind].index("step")]
        columns, step = columns[:, np.isfinite(step)], step[np.isfinite(step)]
        min_later_step = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)[: len(step)]
        if num_repeated := int(np.sum(step >= min_later_step)):
            are = f"{num_repeated} {kind.kind} row{'s are' if num_repeated > 1 else ' is'}"
            self.notes.append(f"{are} there again behind later ones; the last ones count")
        return dict(zip(COLUMN_NAMES[kind], np.ascontiguousarray(columns[:, step < min_later_step]), strict=True))


def to_float(value: Any) -> float:
    """A number of JSON, NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


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
                    rows.add(type(record), vars(record))
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
    metadata = _escape_strings(metadata)
    steps, evals, epochs = (rows.series(kind) for kind in COLUMN_NAMES)
    if not len(steps["step"]) and not len(evals["step"]):
        raise UserError("no metrics: neither a step nor an evaluation was written")
    events = [EventRecord(**_escape_strings(vars(event))) for event in rows.events]
    ends = [event.facts for event in events if event.event == "finished"]
    other_losses: dict[str, list[float]] = {"test": [], "retain": []}
    for event in events:
        if event.event in FINAL_EVALUATIONS and is_number(event.facts.get("loss")):
            other_losses[event.event.removesuffix("_evaluation")].append(event.facts["loss"])
    retained = other_losses["retain"]
    run = RunData(
        source=source,
        run_id=metadata["run_id"],
        name=metadata["name"],
        mode=metadata["mode"],
        metadata=metadata,
        steps=steps,
        evals=evals,
        epochs=epochs,
        val_sets={name: other.series(EvalRecord) for name, other in rows.val_sets.items()},
        summary={n: x for n, x in ends[-1].items() if is_number(x) or isinstance(x, bool)} if ends else {},
        diagnostics=tuple((event.step, event.message) for event in events if event.event == "diagnosis"),
        samples=_last_samples(rows.events),
        scores=_last_scores(rows.events),
        forgetting=float(retained[-1] - retained[0]) if len(retained) > 1 else None,
        final_losses={split: float(losses[-1]) for split, losses in other_losses.items() if losses},
        eval_records_path=eval_records_path if eval_records_path and eval_records_path.exists() else None,
    )
    total_steps, final_eval, notes = run.get("resolved.total_steps"), run.final_eval, list(rows.notes)
    if rows.step_stride > 1:
        notes.append(f"every {rows.step_stride}th of its steps is read")
    if not ends and (final_eval is None or final_eval["step"] != total_steps):
        was_stopped = bool(events) and events[-1].event in STOP_EVENTS
        run.has_diverged = was_stopped and events[-1].event == "not_finite"
        run.state = "stopped" if was_stopped or age_seconds > RUNNING_TIMEOUT_SECONDS else "going"
        last_step = max(float(series["step"][-1]) for series in (steps, evals) if len(series["step"]))
        progress = f"step {last_step:,.0f}" + (f" of {total_steps:,}" if total_steps else "")
        reason = f": {events[-1].message}" if was_stopped else ""
        status = "still going" if run.state == "going" else "stopped before its end"
        notes.append(f"{status} ({progress}){reason}; left out of the verdict")
    elif not run.summary:
        notes.append("evaluated to its end but not closed: its time and memory are unknown")
    changes = sorted(run.changed_on_resume.items())
    notes += [f"{name} was changed on resume, from {old} to {new}" for name, (old, new) in changes]
    if run.best_eval is None:
        notes.append("no evaluation after step 0: no validation loss to compare")
    elif run.initial_loss is None:
        notes.append("no evaluation at step 0: how far it improved on its base is unknown")
    run.notes = tuple(notes)
    return run


def _last_samples(events: Sequence[EventRecord]) -> Samples | None:
    for event in reversed(events):
        if event.event == "samples":
            try:
                return Samples.model_validate(event.facts)
            except ValidationError:  # somebody edited the row: its texts are not shown
                continue
    return None


def _last_scores(events: Sequence[EventRecord]) -> dict[str, float]:
    """Of the last scoring of the test records; what is no number is left out."""
    found = [event.facts.get("scores") for event in events if event.event == "test_scores"]
    scores = found[-1] if found and isinstance(found[-1], Mapping) else {}
    return {score_name(name): float(value) for name, value in scores.items() if is_number(value)}


def _escape_strings(value: Any) -> Any:
    """`value`, of JSON, with each string in one line that a terminal can show."""
    if isinstance(value, str):
        return escape_controls(value)
    if isinstance(value, Mapping):
        return {_escape_strings(key): _escape_strings(item) for key, item in value.items()}
    return [_escape_strings(item) for item in value] if isinstance(value, list | tuple) else value
