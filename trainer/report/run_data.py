"""One run as the report sees it, and reading it back from a run folder."""

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.tracking.records import EpochRecord, EvalRecord, StepRecord

#: columns of one kind of record, each an array of float64 of the same length; NaN where a row lacks the value
Series = dict[str, NDArray[np.float64]]

STEP_FIELDS = tuple(f.name for f in dataclasses.fields(StepRecord))
EVAL_FIELDS = tuple(f.name for f in dataclasses.fields(EvalRecord))
EPOCH_FIELDS = tuple(f.name for f in dataclasses.fields(EpochRecord))
ENDS = ("interrupted", "not_finite")  # events after which a run goes on only when it is resumed
STILL_GOING_SECONDS = 600.0  # an unfinished run whose last row is younger than this may still be going
_NOT_A_STEP = b'\n{"kind": "e'  # how the rows of evaluations, epochs and events start


class Unreadable(Exception):
    """This run cannot be read; its text says why in one line."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: what it was (`facts`, the content of run.json), what it left, and what is wrong with it (`notes`)."""

    source: str  #: as the user gave it
    run_id: str
    name: str
    mode: str
    facts: Mapping[str, Any]
    steps: Series
    evals: Series
    epochs: Series
    end: Mapping[str, Any] = field(default_factory=dict)  #: the facts of the `finished` event
    state: str = "finished"  #: finished, going or stopped
    findings: tuple[tuple[int, str], ...] = ()  #: (step, line) of what the run noticed of itself
    samples: tuple[Mapping[str, Any], ...] = ()  #: of each evaluation: epoch, texts, and scores where asked for
    notes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether the run came to its own end."""
        return self.state == "finished"

    def fact(self, path: str) -> Any:
        """The value at a dotted path of run.json, None where there is none."""
        value: Any = self.facts
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def base_loss(self) -> float | None:
        """Validation loss before the first step, in nats per token."""
        at = np.flatnonzero(self.evals["step"] == 0)
        return float(self.evals["loss"][at[0]]) if len(at) else None

    @property
    def best(self) -> dict[str, float] | None:
        """Step, epoch and loss of the lowest validation loss after step 0."""
        trained = np.flatnonzero((self.evals["step"] > 0) & np.isfinite(self.evals["loss"]))
        if not len(trained):
            return None
        at = trained[np.argmin(self.evals["loss"][trained])]
        return {name: float(self.evals[name][at]) for name in ("step", "epoch", "loss")}

    @property
    def final(self) -> dict[str, float] | None:
        """Step, epoch and loss of the last evaluation after step 0."""
        if not len(self.evals["step"]) or self.evals["step"][-1] == 0:
            return None
        return {name: float(self.evals[name][-1]) for name in ("step", "epoch", "loss")}

    def at_epoch(self, series: Series, epoch: float) -> int | None:
        """The row of `series` nearest to `epoch`, None where none lies within half a step of it."""
        if not len(series["epoch"]):
            return None
        per_epoch = self.fact("resolved.steps_per_epoch")
        near = 0.5 / per_epoch if per_epoch else 1e-3
        at = int(np.argmin(np.abs(series["epoch"] - epoch)))
        return at if abs(series["epoch"][at] - epoch) <= near else None


def series(rows: Iterable[Mapping[str, Any]], fields: tuple[str, ...]) -> Series:
    """Columns of `rows`; what a row lacks, or is no number, becomes NaN."""
    table = [[_number(row.get(name)) for name in fields] for row in rows]
    columns = np.array(table, dtype=np.float64).reshape(len(table), len(fields)).T
    return {name: np.ascontiguousarray(column) for name, column in zip(fields, columns, strict=True)}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return np.nan


def in_order(rows: Series) -> Series:
    """The rows that stand: one that a later row steps back behind was done again after a resume, and is left out."""
    if not np.all(np.isfinite(rows["step"])):
        rows = {name: column[np.isfinite(rows["step"])] for name, column in rows.items()}
    step = rows["step"]
    if len(step) < 2 or bool(np.all(np.diff(step) > 0)):
        return rows
    later = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)
    return {name: column[step < later] for name, column in rows.items()}


def read_folder(folder: Path) -> Run:
    """The run of a run folder; Unreadable where settings or rows are missing."""
    facts = _read_facts(folder / "run.json")
    metrics = folder / "metrics.jsonl"
    try:
        content = metrics.read_bytes()
        age = time.time() - metrics.stat().st_mtime
    except OSError as problem:
        raise Unreadable(f"no metrics: cannot read metrics.jsonl ({problem.strerror})") from problem
    steps, others, notes = _parse(content)
    return build(
        source=str(folder),
        facts=facts,
        notes=notes,
        age=age,
        steps=steps,
        evals=series((row for row in others if row["kind"] == "eval"), EVAL_FIELDS),
        epochs=series((row for row in others if row["kind"] == "epoch"), EPOCH_FIELDS),
        events=[row for row in others if row["kind"] == "event"],
    )


def build(
    *,
    source: str,
    facts: Mapping[str, Any],
    steps: Series,
    evals: Series,
    epochs: Series,
    events: list[Mapping[str, Any]],
    notes: list[str],
    age: float,
    run_id: str | None = None,
) -> Run:
    """A Run from its parts, with what is missing said in its notes; Unreadable where there is no row at all."""
    mode = facts.get("mode")
    if mode not in ("full", "lora"):
        raise Unreadable(f"mode {mode!r} in its settings: expected full or lora")
    if not len(steps["step"]) and not len(evals["step"]):
        raise Unreadable("no metrics: neither a step nor an evaluation was written")
    end = next((event.get("facts") or {} for event in reversed(events) if event.get("event") == "finished"), None)
    ended = bool(events) and events[-1].get("event") in ENDS
    state = "finished" if end is not None else "stopped" if ended or age > STILL_GOING_SECONDS else "going"
    run = Run(
        source=source,
        run_id=str(run_id or facts.get("run_id") or source),
        name=str(facts.get("name") or source),
        mode=mode,
        facts=facts,
        steps=in_order(steps),
        evals=in_order(evals),
        epochs=in_order(epochs),
        end=end or {},
        state=state,
        findings=tuple(
            (int(event.get("step") or 0), str(event.get("message")))
            for event in events
            if event.get("event") == "diagnosis"
        ),
        samples=tuple(event.get("facts") or {} for event in events if event.get("event") == "samples"),
        notes=tuple(notes),
    )
    return dataclasses.replace(run, notes=(*run.notes, *_what_is_missing(run, events)))


def changed_on_resume(run: Run) -> Mapping[str, Any]:
    """{setting or `data`: [when the run began, now]} of what a resume was allowed to change."""
    return run.fact("resumed.changed") or {}


def _what_is_missing(run: Run, events: list[Mapping[str, Any]]) -> list[str]:
    """One line for each thing that keeps this run from being compared in full."""
    notes = []
    if not run.finished:
        last = max((float(rows["step"][-1]) for rows in (run.steps, run.evals) if len(rows["step"])), default=0.0)
        total = run.fact("resolved.total_steps")
        where = f"step {last:,.0f}" + (f" of {total:,}" if total else "")
        what = "still going" if run.state == "going" else "stopped before its end"
        why = f": {events[-1].get('message')}" if events and events[-1].get("event") in ENDS else ""
        notes.append(f"{what} ({where}){why}; left out of the verdict")
    notes += [
        f"{name} was changed on resume, from {old} to {new}"
        for name, (old, new) in sorted(changed_on_resume(run).items())
    ]
    if run.best is None:
        notes.append("no evaluation after step 0: no validation loss to compare")
    elif run.base_loss is None:
        notes.append("no evaluation at step 0: how far it improved on its base is unknown")
    return notes


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except OSError as problem:
        raise Unreadable(
            f"cannot read run.json ({problem.strerror}), so neither mode nor settings are known"
        ) from problem
    except ValueError as problem:
        raise Unreadable(f"run.json is not whole JSON ({problem})") from problem
    if not isinstance(facts, dict):
        raise Unreadable("run.json is not a JSON object")
    return facts


def _parse(content: bytes) -> tuple[Series, list[dict[str, Any]], list[str]]:
    """Step columns, the other rows, and notes on what could not be read."""
    notes = []
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):  # rows are written newline last
        notes.append("its last row was cut off and is left out")
    others = _other_lines(whole)
    steps = _fast_columns(whole, len(others))
    rows, broken = _slow_rows(whole.split(b"\n") if steps is None else others)
    if broken:
        notes.append(
            f"{broken} row{'s' if broken > 1 else ''} could not be read and {'are' if broken > 1 else 'is'} left out"
        )
    if steps is None:
        steps = series((row for row in rows if row["kind"] == "step"), STEP_FIELDS)
    return steps, rows, notes


def _other_lines(content: bytes) -> list[bytes]:
    """The lines that are no step rows, found without looking at each line."""
    content = b"\n" + content
    lines, start = [], content.find(_NOT_A_STEP)
    while start >= 0:
        end = content.find(b"\n", start + 1)
        lines.append(content[start + 1 : end])
        start = content.find(_NOT_A_STEP, end)
    return lines


def _fast_columns(content: bytes, others: int) -> Series | None:
    """Columns of the step rows, about five times as fast as `json`; None unless all but `others` rows are such."""
    if not content:
        return series([], STEP_FIELDS)
    import pyarrow
    import pyarrow.compute
    import pyarrow.json

    schema = pyarrow.schema([("kind", pyarrow.string()), *((name, pyarrow.float64()) for name in STEP_FIELDS)])
    try:
        table = pyarrow.json.read_json(
            pyarrow.BufferReader(content),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pyarrow.ArrowInvalid:
        return None
    kinds = pyarrow.compute.index_in(table["kind"], pyarrow.array(["step", "eval", "epoch", "event"])).to_numpy()
    if not np.all(np.isfinite(kinds)) or len(kinds) - np.sum(kinds == 0) != others:
        return None
    return {name: table[name].to_numpy().astype(np.float64, copy=False)[kinds == 0] for name in STEP_FIELDS}


def _slow_rows(lines: list[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The rows that can be read, one by one, and the number of those that cannot."""
    rows, broken = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(row, dict) and row.get("kind") in ("step", "eval", "epoch", "event"):
            rows.append(row)
        else:
            broken += 1
    return rows, broken
