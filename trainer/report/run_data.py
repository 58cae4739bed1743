"""Runs as the report sees them: rows and records read back from their folders, and records paired over runs."""

import contextlib
import itertools
import math
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError

from trainer.config.choices import MAX_SHARED_FRACTION
from trainer.config.errors import UserError, escape_controls, first_line
from trainer.config.run_metadata import read_run_metadata
from trainer.report.interval import Matrix, sum_by_unit
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, SCORE_PREFIX, read_evaluations, score_name
from trainer.tracking.records import (
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
STOP_EVENTS = ("interrupted", "not_finite")  # events after which a run goes on only when it is resumed
RUNNING_TIMEOUT_SECONDS = 600.0  # an unfinished run whose last row is younger than this may still be going
LOSS = "loss"  # the measure beside `score:NAME`
UNIT = "nats per token"
SPLIT_NAMES = {"test": "test", "val": "validation", "retain": "retained"}
_RECORD_KEY = ["id", "occurrence"]

#: a text without what a terminal would act on
Text = Annotated[str, AfterValidator(lambda text: "\n".join(map(escape_controls, text.strip().splitlines())))]


class SampleText(BaseModel):
    """A completion of a validation prompt beside its reference, and what the base made of it where that was asked."""

    prompt: Text
    reference: Text
    completion: Text
    base: Text | None = None


SAMPLES = TypeAdapter(list[SampleText])


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
    samples: Sequence[SampleText] = ()  #: of its last evaluation that generated texts
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

    def index_at_epoch(self, series: Series, epoch: float) -> int | None:
        """The row of `series` nearest to `epoch`, None where none lies within half a step of it."""
        distances, steps_per_epoch = np.abs(series["epoch"] - epoch), self.get("resolved.steps_per_epoch")
        max_distance = 0.5 / steps_per_epoch if steps_per_epoch else 1e-3
        return int(np.argmin(distances)) if np.any(distances <= max_distance) else None


class RunRows:
    """The rows of a run by kind, added one by one."""

    def __init__(self) -> None:
        self.notes: list[str] = []  #: what could not be read
        self.val_sets: dict[str, RunRows] = {}  #: {name: rows} of the further sets of --val-data
        self._rows = {kind: array("d") for kind in COLUMN_NAMES}  # row after row

    def add(self, kind: type, row: Mapping[str, Any]) -> None:
        """Take the next row of a kind; what it lacks, or is no number, becomes NaN."""
        if kind is OtherEvalRecord:
            self.val_sets.setdefault(escape_controls(str(row["val_set"])), RunRows()).add(EvalRecord, row)
            return
        for name in COLUMN_NAMES[kind]:
            value = row.get(name)
            self._rows[kind].append(value if is_number(value) else np.nan)

    def series(self, kind: Any) -> Series:
        """The columns of the rows, without those that a later row steps back behind: done again after a resume."""
        names = COLUMN_NAMES[kind]
        columns = np.array(self._rows[kind]).reshape(-1, len(names)).T
        columns = columns[:, np.isfinite(columns[names.index("step")])]
        step = columns[names.index("step")]
        min_later_step = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)[: len(step)]
        if num_repeated := int(np.sum(step >= min_later_step)):
            self.notes.append(f"{num_repeated} {kind.kind} rows are there again behind later ones; the last ones count")
        return dict(zip(names, np.ascontiguousarray(columns[:, step < min_later_step]), strict=True))

    def all_series(self) -> list[Series]:
        """Steps, evaluations and epochs; UserError where there is neither a step nor an evaluation."""
        steps, evals, epochs = map(self.series, COLUMN_NAMES)
        if not len(steps["step"]) and not len(evals["step"]):
            raise UserError("no metrics: neither a step nor an evaluation was written")
        return [steps, evals, epochs]


def read_folder(folder: Path) -> RunData:
    """The run of a run folder, with what is missing said in its notes; UserError where settings or rows are missing."""
    path, rows, events, num_bad = folder / "metrics.jsonl", RunRows(), list[EventRecord](), 0
    metadata = _escape_strings(read_run_metadata(folder / "run.json"))
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
                    events.append(record)
                else:
                    rows.add(type(record), vars(record))
    except (OSError, ValueError) as error:
        raise UserError(f"no metrics: cannot read metrics.jsonl ({first_line(error)})") from error
    if num_bad:
        rows.notes.append(f"{num_bad} rows could not be read and are left out")
    steps, evals, epochs = rows.all_series()
    eval_records_path = folder / EVAL_RECORDS_FOLDER
    run = RunData(
        source=str(folder),
        run_id=metadata["run_id"],
        name=metadata["name"],
        mode=metadata["mode"],
        metadata=metadata,
        steps=steps,
        evals=evals,
        epochs=epochs,
        val_sets={name: other.series(EvalRecord) for name, other in rows.val_sets.items()},
        eval_records_path=eval_records_path if eval_records_path.exists() else None,
    )
    _add_events(run, events)
    _add_notes(run, events, rows.notes, age_seconds)
    return run


def _add_events(run: RunData, events: Sequence[EventRecord]) -> None:
    """Add to `run` what its events say, the last of each kind; what somebody edited into another shape is left out."""
    retained = []
    for event in events:
        kind, facts, loss = event.event, event.facts, event.facts.get("loss")
        if kind == "finished":
            run.summary = {escape_controls(n): x for n, x in facts.items() if is_number(x) or isinstance(x, bool)}
        elif kind == "diagnosis":
            run.diagnostics = (*run.diagnostics, (event.step, escape_controls(event.message)))
        elif kind == "samples":
            with contextlib.suppress(ValidationError):
                run.samples = SAMPLES.validate_python(facts.get("texts"))
        elif kind == "test_scores" and isinstance(scores := facts.get("scores"), Mapping):
            run.scores = {score_name(name): float(value) for name, value in scores.items() if is_number(value)}
        elif kind in ("test_evaluation", "retain_evaluation") and is_number(loss):
            run.final_losses = {**run.final_losses, kind.removesuffix("_evaluation"): float(loss)}
            retained += [float(loss)] * (kind == "retain_evaluation")
    run.forgetting = retained[-1] - retained[0] if len(retained) > 1 else None


def _add_notes(run: RunData, events: Sequence[EventRecord], notes: list[str], age_seconds: float) -> None:
    """Add to `run` its state, these notes and what is missing."""
    total_steps, final_eval = run.get("resolved.total_steps"), run.final_eval
    events = [event for event in events if event.event != "diagnosis"]  # one may follow the event that stopped the run
    is_ended = any(event.event == "finished" for event in events)
    if not is_ended and (final_eval is None or final_eval["step"] != total_steps):
        was_stopped = bool(events) and events[-1].event in STOP_EVENTS
        run.has_diverged = was_stopped and events[-1].event == "not_finite"
        run.state = "stopped" if was_stopped or age_seconds > RUNNING_TIMEOUT_SECONDS else "going"
        last_step = max(float(series["step"][-1]) for series in (run.steps, run.evals) if len(series["step"]))
        progress = f"step {last_step:,.0f}" + (f" of {total_steps:,}" if total_steps else "")
        reason = f": {escape_controls(events[-1].message)}" if was_stopped else ""
        status = "still going" if run.state == "going" else "stopped before its end"
        outcome = "so its setting is not judged" if run.has_diverged else "left out of the verdict"
        notes.append(f"{status} ({progress}){reason}; {outcome}")
    elif not run.summary:
        notes.append("evaluated to its end but not closed: its time and memory are unknown")
    changes = sorted((run.get("resumed.changed") or {}).items())
    notes += [f"{name} was changed on resume, from {old} to {new}" for name, (old, new) in changes]
    if run.best_eval is None:
        notes.append("no evaluation after step 0: no validation loss to compare")
    elif run.initial_loss is None:
        notes.append("no evaluation at step 0: how far it improved on its base is unknown")
    run.notes = tuple(notes)


def _escape_strings(value: Any) -> Any:
    """`value`, of JSON, with each string in one line that a terminal can show."""
    if isinstance(value, str):
        return escape_controls(value)
    if isinstance(value, Mapping):
        return {_escape_strings(key): _escape_strings(item) for key, item in value.items()}
    return [_escape_strings(item) for item in value] if isinstance(value, list | tuple) else value


# --- the records of runs paired by seed ---

Pairs = Sequence[tuple[RunData, RunData]]  # (full, LoRA) of one seed each


@dataclass(frozen=True, kw_only=True)
class MatchedRecords:
    """What is worse the larger it is, summed a seed and unit, of both modes and of the base where it was evaluated. Of
    a loss the negative log-likelihoods (nats), of a score what is missing to full marks (points, 0 to 100 a record). A
    unit is a record, a block, or a cluster of records that share a meaning."""

    measure: str  #: loss or score:NAME
    unit: str  #: nats per token, bits per byte of models with different tokenizers, or points
    split: str  #: test, val or retain
    lora: Matrix  #: (seeds, units)
    full: Matrix  #: (seeds, units)
    base: Matrix | None  #: (seeds, units), of full's base before the first step
    units: NDArray[np.str_]  #: (units,), ids of records, or of what records of a cluster share
    weights: NDArray[np.float64]  #: (units,), target tokens of a loss, records of a score
    num_bytes: NDArray[np.float64]  #: (units,), UTF-8 bytes of the targets, 0 where the text is not known
    num_records: int
    num_seen: int  #: further records, left out because they were seen before
    excerpts: Mapping[str, str]  #: {unit: a line of one of its records}, where the base was evaluated
    has_clusters: bool  #: whether units are clusters of records that share a meaning
    are_blocks: bool  #: whether a row is a block of joined texts, not a record

    @property
    def unit_name(self) -> str:
        split_name = SPLIT_NAMES[self.split]
        if self.has_clusters:
            return f"clusters of {split_name} records"
        return f"{split_name} {'blocks' if self.are_blocks else 'records'}"

    @property
    def is_of_right_answers(self) -> bool:
        """Whether each record is right or wrong, so that a score is a share of right answers."""
        return not self.has_clusters and bool(np.isin((self.full, self.lora), (0.0, 100.0)).all())

    def score(self, mode: str) -> float:
        """The mean score of `full` or `lora`, 0 to 100; of a score alone."""
        return 100 - self.mean(getattr(self, mode))

    def mean(self, values: Matrix) -> float:
        """Nats per token, or missing points, over all seeds and units."""
        return math.fsum(values.ravel()) / (len(values) * math.fsum(self.weights))


class MatchError(Exception):
    """The records of these runs cannot be paired; its text is the reason."""


class RefusedError(MatchError):
    """No answer can be drawn: the records are not those that a run reported, or not new."""


class NotNewError(RefusedError):
    """Too many of the records were trained on."""


def read_records(pairs: Pairs) -> list[pd.DataFrame]:
    """The records of each run, full and LoRA by turns: at its chosen checkpoint, at its end and of its base. MatchError
    where a run left none, or they are damaged."""
    frames, runs = [], [run for pair in pairs for run in pair]
    for run, split in itertools.product(runs, SPLIT_NAMES):  # whole records, even where rows are blocks
        number, total = run.get(f"data.num_seen.{split}"), run.get(f"data.{split}.records")
        if isinstance(number, int) and isinstance(total, int) and number > MAX_SHARED_FRACTION * total:
            raise NotNewError(
                f"{number:,} of {total:,} {SPLIT_NAMES[split]} records are not new, over {MAX_SHARED_FRACTION:.0%}"
            )
    for run in runs:
        if run.eval_records_path is None:
            raise MatchError(f"{run.name} left no losses of single records")
        try:
            frames.append(read_evaluations(run.eval_records_path, val_steps=(0, _best_step(run))))
        except UserError as error:  # this pair has no interval, others may
            text = str(error).replace(f"{run.eval_records_path}/", "")  # a page that is passed on says it
            raise MatchError(f"{run.name}: {text}") from error
        _check_mean(run, frames[-1])
    return frames


def match_records(pairs: Pairs, frames: Sequence[pd.DataFrame], split: str, measure: str = LOSS) -> MatchedRecords:
    """The records of `split` that all runs evaluated at their chosen checkpoints; `frames`: of `read_records`.
    MatchError where records or their targets differ, or too many were seen; UserError where a run has no such score."""
    runs = [run for pair in pairs for run in pair]
    trained = [_select(frame, split, run) for frame, run in zip(frames, runs, strict=True)]
    base = [_select(frame, split) for frame in frames[::2]]
    before = base[0]
    column = "nll" if measure == LOSS else SCORE_PREFIX + score_name(measure.partition(":")[2])
    if measure != LOSS:
        for run, frame in zip(runs, trained, strict=True):
            if column not in frame or not frame[column].notna().any():
                known = [name.removeprefix(SCORE_PREFIX) for name in frame if name.startswith(SCORE_PREFIX)]
                has = f"scores {', '.join(known)}" if known else "no scores; train with --score"
                raise UserError(f"--decide-by {measure}: the test records of {run.name} have {has}")
        trained, base = [frame[frame[column].notna()] for frame in trained], [frame[:0] for frame in base]
    num_seen = int(trained[0]["is_seen"].sum())
    trained, base = ([frame[~frame["is_seen"]] for frame in members] for members in (trained, base))
    first = trained[0]
    if not len(first):
        raise MatchError(f"{runs[0].name} left no losses of {SPLIT_NAMES[split]} records at its chosen step")
    has_group = first["group"].notna()
    units = first["group"].where(has_group, first.index.get_level_values("id")).to_numpy(dtype=str)
    if len(set(units)) < 2:
        raise MatchError(f"the {SPLIT_NAMES[split]} records are one, or share one meaning")

    def stack(frames: Sequence[pd.DataFrame]) -> Matrix:
        for frame in frames:
            num_unshared = len(first.index.symmetric_difference(frame.index))
            if num_unshared:
                raise MatchError(f"other evaluation records ({num_unshared:,} are not in both runs)")
            if not np.array_equal(first["targets"].to_numpy(), frame["targets"].to_numpy()):
                raise MatchError("other targets in the same records")
            if not np.isfinite(frame[column].to_numpy()).all():
                raise MatchError("a record's loss is not finite")
        values = np.stack([frame[column].to_numpy(np.float64) for frame in frames])
        return sum_by_unit(values if measure == LOSS else 100 * (1 - values), units)

    weights = first["targets"].to_numpy(np.float64) if measure == LOSS else np.ones(len(first))
    excerpts = before["excerpt"].reindex(first.index) if "excerpt" in before else ()
    return MatchedRecords(
        measure=measure,
        unit=(runs[0].get("judged.unit") or UNIT) if measure == LOSS else "points",
        split=split,
        full=stack(trained[::2]),
        lora=stack(trained[1::2]),
        base=stack(base) if all(map(len, base)) else None,
        units=np.unique(units),
        weights=sum_by_unit(weights, units),
        num_bytes=sum_by_unit(first["bytes"].to_numpy(np.float64), units),
        num_records=len(first),
        num_seen=num_seen,
        excerpts={
            unit: escape_controls(text) for unit, text in zip(units, excerpts, strict=False) if isinstance(text, str)
        },
        has_clusters=bool(has_group.any()),
        are_blocks=split == "retain" or runs[0].get("data.objective") == "blocks",
    )


def _check_mean(run: RunData, frame: pd.DataFrame) -> None:
    """RefusedError where the losses of the records are not those that the run reported: a row or a file was changed."""
    reported = [("val", step, loss) for step, loss in zip(run.evals["step"], run.evals["loss"], strict=True)]
    reported += [(split, frame.loc[frame["split"] == split, "step"].max(), x) for split, x in run.final_losses.items()]
    for split, step, loss in reported:
        rows = frame[(frame["split"] == split) & (frame["step"] == step)]
        if len(rows) and not math.isclose(mean := rows["nll"].sum() / rows["targets"].sum(), loss, rel_tol=1e-6):
            place = f"the {SPLIT_NAMES[split]} records of {run.name} at step {step:.0f}"
            raise RefusedError(f"{place} have loss {mean:.4f}, its row in metrics.jsonl says {loss:.4f}")


def _best_step(run: RunData) -> int:
    return int(run.best_eval["step"]) if run.best_eval else -1


def _select(frame: pd.DataFrame, split: str, run: RunData | None = None) -> pd.DataFrame:
    """The records of the run's chosen checkpoint, of its base where `run` is None, by (id, occurrence). The chosen one
    is the best of validation; test records are evaluated at it alone."""
    rows = frame[(frame["split"] == split) & (frame["targets"] > 0)]
    trained_steps = rows.loc[rows["step"] > 0, "step"]
    step = 0 if run is None else _best_step(run) if split == "val" else trained_steps.max()
    rows = rows[rows["step"] == step]
    return rows.drop_duplicates(_RECORD_KEY, keep="last").set_index(_RECORD_KEY).sort_index()
