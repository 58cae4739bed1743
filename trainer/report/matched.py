"""The losses and scores of single records of runs paired by seed, each held against the row that its run reported."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from trainer.config.choices import MAX_SHARED_FRACTION
from trainer.config.errors import UserError
from trainer.report.interval import Matrix, sum_by_unit
from trainer.report.run_data import RunData
from trainer.tracking.eval_records import SCORE_PREFIX, read_evaluations, score_name

LOSS = "loss"  # the measure beside `score:NAME`
UNIT = "nats per token"
SPLIT_NAMES = {"test": "test", "val": "validation", "retain": "retained"}
_RECORD_KEY = ["id", "occurrence"]
Pairs = Sequence[tuple[RunData, RunData]]  # (full, LoRA) of one seed each


@dataclass(frozen=True, kw_only=True)
class MatchedRecords:
    """What is worse the larger it is, summed a seed and unit, of both modes and of the base where it was evaluated.

    Of a loss the negative log-likelihoods (nats), of a score what is missing to full marks (points, 0 to 100 a record).
    A unit is a record, a block, or a cluster of records that share a meaning.
    """

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
    has_clusters: bool  #: whether units are clusters of records that share a meaning
    are_blocks: bool  #: whether a row is a block of joined texts, not a record

    @property
    def unit_name(self) -> str:
        """What the sentence calls the units."""
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
    """No answer can be drawn: too many of the records were trained on, or they are not those that a run reported."""


def read_records(pairs: Pairs) -> list[pd.DataFrame]:
    """The records of each run, full and LoRA by turns: at its chosen checkpoint, at its end and of its base.

    MatchError where a run left none, or they are damaged.
    """
    frames, runs = [], [run for pair in pairs for run in pair]
    for run in runs:  # whole records, even where rows are blocks
        for split in SPLIT_NAMES:
            _check_shared(split, run.get(f"data.num_seen.{split}"), run.get(f"data.{split}.records"))
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


def judged_split(frames: Sequence[pd.DataFrame]) -> str:
    """The test split where all runs have it, else the validation split."""
    return "test" if all((frame["split"] == "test").any() for frame in frames) else "val"


def match_records(pairs: Pairs, frames: Sequence[pd.DataFrame], split: str, measure: str = LOSS) -> MatchedRecords:
    """The records of `split` that all runs evaluated at their chosen checkpoints; `frames`: of `read_records`.

    MatchError where records or their targets differ, or too many were seen before; UserError where a run has no such
    score.
    """
    runs = [run for pair in pairs for run in pair]
    trained = [_select(frame, split, run) for frame, run in zip(frames, runs, strict=True)]
    base = [_select(frame, split) for frame in frames[::2]]
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
        has_clusters=bool(has_group.any()),
        are_blocks=split == "retain" or runs[0].get("data.objective") == "blocks",
    )


def _check_shared(split: str, number: Any, total: Any) -> None:
    if isinstance(number, int) and isinstance(total, int) and number > MAX_SHARED_FRACTION * total:
        records = f"{number:,} of {total:,} {SPLIT_NAMES[split]} records"
        raise RefusedError(f"{records} are not new, over {MAX_SHARED_FRACTION:.0%}")


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
    """The records of the run's chosen checkpoint, of its base where `run` is None, by (id, occurrence).

    The chosen one is the best of validation; test records are evaluated at it alone.
    """
    rows = frame[(frame["split"] == split) & (frame["targets"] > 0)]
    trained_steps = rows.loc[rows["step"] > 0, "step"]
    step = 0 if run is None else _best_step(run) if split == "val" else trained_steps.max()
    rows = rows[rows["step"] == step]
    return rows.drop_duplicates(_RECORD_KEY, keep="last").set_index(_RECORD_KEY).sort_index()
