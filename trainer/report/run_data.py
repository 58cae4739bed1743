"""One run as the report sees it."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.tracking.records import EpochRecord, EvalRecord, StepRecord, is_number

#: columns of one kind of record, each an array of float64 of the same length; NaN where a row lacks the value
Series = dict[str, NDArray[np.float64]]

STEP_FIELDS = tuple(f.name for f in dataclasses.fields(StepRecord))
EVAL_FIELDS = tuple(f.name for f in dataclasses.fields(EvalRecord) if f.name != "row_nll")
EPOCH_FIELDS = tuple(f.name for f in dataclasses.fields(EpochRecord))
STOP_EVENTS = ("interrupted", "not_finite")  # events after which a run goes on only when it is resumed
RUNNING_TIMEOUT_SECONDS = 600.0  # an unfinished run whose last row is younger than this may still be going


class RunReadError(Exception):
    """This run cannot be read; its text says why in one line."""


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
        best_index = trained_indices[np.argmin(self.evals["loss"][trained_indices])]
        return {name: float(self.evals[name][best_index]) for name in ("step", "epoch", "loss")}

    @property
    def final_eval(self) -> dict[str, float] | None:
        """Step, epoch and loss of the last evaluation after step 0."""
        if not len(self.evals["step"]) or self.evals["step"][-1] == 0:
            return None
        return {name: float(self.evals[name][-1]) for name in ("step", "epoch", "loss")}

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


def to_series(rows: Iterable[Mapping[str, Any]], column_names: tuple[str, ...]) -> Series:
    """Columns of `rows`; what a row lacks, or is no number, becomes NaN."""
    table = [[_to_float(row.get(name)) for name in column_names] for row in rows]
    columns = np.array(table, dtype=np.float64).reshape(len(table), len(column_names)).T
    return {name: np.ascontiguousarray(column) for name, column in zip(column_names, columns, strict=True)}


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def drop_superseded_rows(series: Series) -> Series:
    """The rows that stand: one that a later row steps back behind was done again after a resume, and is left out."""
    if not np.all(np.isfinite(series["step"])):
        series = {name: column[np.isfinite(series["step"])] for name, column in series.items()}
    step = series["step"]
    if len(step) < 2 or bool(np.all(np.diff(step) > 0)):
        return series
    min_later_step = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)
    return {name: column[step < min_later_step] for name, column in series.items()}


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """What a run wrote, by kind, and what could not be read of it."""

    steps: Series
    evals: Series
    epochs: Series
    events: list[Mapping[str, Any]]
    notes: list[str]
    age_seconds: float  #: since the last of it was written
    eval_records_path: Path | None = None


def build_run(source: str, metadata: Mapping[str, Any], records: RunRecords, run_id: str | None = None) -> RunData:
    """A RunData from its parts, with what is missing said in its notes; RunReadError where there is no row at all."""
    metadata, events = escape_control(metadata), escape_control(records.events)
    mode = metadata.get("mode")
    if mode not in ("full", "lora"):
        raise RunReadError(f"mode {mode!r} in its settings: expected full or lora")
    if not len(records.steps["step"]) and not len(records.evals["step"]):
        raise RunReadError("no metrics: neither a step nor an evaluation was written")
    facts = next((event.get("facts") for event in reversed(events) if event.get("event") == "finished"), None) or {}
    run = RunData(
        source=source,
        run_id=str(run_id or metadata.get("run_id") or source),
        name=str(metadata.get("name") or source),
        mode=mode,
        metadata=metadata,
        steps=drop_superseded_rows(records.steps),
        evals=drop_superseded_rows(records.evals),
        epochs=drop_superseded_rows(records.epochs),
        summary={name: value for name, value in facts.items() if is_number(value) or isinstance(value, bool)},
        diagnostics=tuple(
            (int(event.get("step") or 0), str(event.get("message")))
            for event in events
            if event.get("event") == "diagnosis"
        ),
        generations=tuple(_read_generations(event) for event in events if event.get("event") == "samples"),
        retained=tuple(
            float(loss)
            for event in events
            if event.get("event") == "retain_evaluation" and is_number(loss := (event.get("facts") or {}).get("loss"))
        ),
        notes=tuple(records.notes),
        eval_records_path=records.eval_records_path,
    )
    run = dataclasses.replace(run, state=_state(run, events, records.age_seconds))
    return dataclasses.replace(run, notes=(*run.notes, *_missing_data_notes(run, events)))


def _read_generations(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an evaluation generated: epoch, texts, and scores where asked for; what is not of that form is left out."""
    facts, names = event.get("facts") or {}, ("prompt", "completion", "reference")
    texts, scores = facts.get("texts"), facts.get("scores")
    texts = [text for text in texts if isinstance(text, Mapping)] if isinstance(texts, list) else []
    scores = scores if isinstance(scores, Mapping) else {}
    return {
        **{name: facts[name] for name in ("epoch", "scored") if is_number(facts.get(name))},
        "texts": [text for text in texts if all(isinstance(text.get(name), str) for name in names)],
        "scores": {name: value for name, value in scores.items() if is_number(value)},
    }


def _state(run: RunData, events: list[Mapping[str, Any]], age_seconds: float) -> str:
    """finished, going or stopped; a run that was evaluated at its last step is finished whatever came after."""
    final_eval = run.final_eval
    is_evaluated_to_end = final_eval is not None and final_eval["step"] == run.get("resolved.total_steps")
    if any(event.get("event") == "finished" for event in events) or is_evaluated_to_end:
        return "finished"
    was_stopped = bool(events) and events[-1].get("event") in STOP_EVENTS
    return "stopped" if was_stopped or age_seconds > RUNNING_TIMEOUT_SECONDS else "going"


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


def changed_on_resume(run: RunData) -> Mapping[str, Any]:
    """{setting or `data`: [when the run began, now]} of what a resume was allowed to change."""
    return run.get("resumed.changed") or {}


def _missing_data_notes(run: RunData, events: list[Mapping[str, Any]]) -> list[str]:
    """One line for each thing that keeps this run from being compared in full."""
    notes = []
    if not run.is_finished:
        last_step = max(
            (float(series["step"][-1]) for series in (run.steps, run.evals) if len(series["step"])), default=0.0
        )
        total_steps = run.get("resolved.total_steps")
        progress = f"step {last_step:,.0f}" + (f" of {total_steps:,}" if total_steps else "")
        status = "still going" if run.state == "going" else "stopped before its end"
        reason = f": {events[-1].get('message')}" if events and events[-1].get("event") in STOP_EVENTS else ""
        notes.append(f"{status} ({progress}){reason}; left out of the verdict")
    elif not run.summary:
        notes.append("evaluated to its end but not closed: its time and memory are unknown")
    notes += [
        f"{name} was changed on resume, from {old} to {new}"
        for name, (old, new) in sorted(changed_on_resume(run).items())
    ]
    if run.best_eval is None:
        notes.append("no evaluation after step 0: no validation loss to compare")
    elif run.initial_loss is None:
        notes.append("no evaluation at step 0: how far it improved on its base is unknown")
    return notes
