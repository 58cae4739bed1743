"""One run as the report sees it."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.report.run_records import RunRecords, Series
from trainer.tracking.records import EventRecord, is_number

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
        return self._eval_at(trained_indices[np.argmin(self.evals["loss"][trained_indices])])

    @property
    def final_eval(self) -> dict[str, float] | None:
        """Step, epoch and loss of the last evaluation after step 0."""
        return self._eval_at(-1) if np.any(self.evals["step"][-1:] > 0) else None

    def _eval_at(self, index: int) -> dict[str, float]:
        return {name: float(self.evals[name][index]) for name in ("step", "epoch", "loss")}

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


def build_run(source: str, metadata: Mapping[str, Any], records: RunRecords) -> RunData:
    """A run of valid metadata, with what is missing said in its notes; RunReadError where there is no row at all."""
    metadata = escape_control(metadata)
    steps, evals, epochs = (records.series(kind) for kind in ("step", "eval", "epoch"))
    if not len(steps["step"]) and not len(evals["step"]):
        raise RunReadError("no metrics: neither a step nor an evaluation was written")
    events = [EventRecord(**escape_control(vars(event))) for event in records.events]
    facts: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        facts.setdefault(event.event, []).append(event.facts)
    notes = list(records.notes)
    if records.steps_per_row > 1:
        notes.append(f"its steps are read as means of {records.steps_per_row} each")
    run = RunData(
        source=source,
        run_id=metadata["run_id"],
        name=metadata["name"],
        mode=metadata["mode"],
        metadata=metadata,
        steps=steps,
        evals=evals,
        epochs=epochs,
        summary={
            name: value
            for name, value in facts.get("finished", [{}])[-1].items()
            if is_number(value) or isinstance(value, bool)
        },
        diagnostics=tuple((event.step, event.message) for event in events if event.event == "diagnosis"),
        generations=tuple(map(_read_generations, facts.get("samples", ()))),
        retained=tuple(
            float(fact["loss"]) for fact in facts.get("retain_evaluation", ()) if is_number(fact.get("loss"))
        ),
        notes=tuple(notes),
        eval_records_path=records.eval_records_path,
    )
    run = dataclasses.replace(run, state=_state(run, events, records.age_seconds))
    return dataclasses.replace(run, notes=(*run.notes, *_missing_data_notes(run, events)))


def _read_generations(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an evaluation generated: epoch, texts, and scores where asked for; what is not of that form is left out."""
    names = ("prompt", "completion", "reference")
    texts, scores = facts.get("texts"), facts.get("scores")
    texts = [text for text in texts if isinstance(text, Mapping)] if isinstance(texts, list) else []
    scores = scores if isinstance(scores, Mapping) else {}
    return {
        **{name: facts[name] for name in ("epoch", "scored") if is_number(facts.get(name))},
        "texts": [text for text in texts if all(isinstance(text.get(name), str) for name in names)],
        "scores": {name: value for name, value in scores.items() if is_number(value)},
    }


def _state(run: RunData, events: Sequence[EventRecord], age_seconds: float) -> str:
    """finished, going or stopped; a run that was evaluated at its last step is finished whatever came after."""
    final_eval = run.final_eval
    is_evaluated_to_end = final_eval is not None and final_eval["step"] == run.get("resolved.total_steps")
    if is_evaluated_to_end or any(event.event == "finished" for event in events):
        return "finished"
    was_stopped = bool(events) and events[-1].event in STOP_EVENTS
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


def _missing_data_notes(run: RunData, events: Sequence[EventRecord]) -> list[str]:
    """One line for each thing that keeps this run from being compared in full."""
    notes = []
    if not run.is_finished:
        last_step = max(float(series["step"][-1]) for series in (run.steps, run.evals) if len(series["step"]))
        total_steps = run.get("resolved.total_steps")
        progress = f"step {last_step:,.0f}" + (f" of {total_steps:,}" if total_steps else "")
        status = "still going" if run.state == "going" else "stopped before its end"
        reason = f": {events[-1].message}" if events and events[-1].event in STOP_EVENTS else ""
        notes.append(f"{status} ({progress}){reason}; left out of the verdict")
    elif not run.summary:
        notes.append("evaluated to its end but not closed: its time and memory are unknown")
    notes += [
        f"{name} was changed on resume, from {old} to {new}"
        for name, (old, new) in sorted(run.changed_on_resume.items())
    ]
    if run.best_eval is None:
        notes.append("no evaluation after step 0: no validation loss to compare")
    elif run.initial_loss is None:
        notes.append("no evaluation at step 0: how far it improved on its base is unknown")
    return notes
