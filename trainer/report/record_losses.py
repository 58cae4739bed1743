"""Losses of single records (eval_records/) of runs paired by seed, matched record by record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from trainer.config.choices import MAX_SHARED_FRACTION
from trainer.config.errors import UserError
from trainer.report.paired_interval import Matrix, sum_by_unit
from trainer.report.run_data import RunData
from trainer.tracking.eval_records import read_evaluations

SPLIT_NAMES = {"test": "test", "val": "validation"}
_KEY = ["id", "occurrence"]


class MatchError(Exception):
    """The records of these runs cannot be paired; its text is the reason."""


class SharedRecordsError(Exception):
    """So many of the records equal a training record that no answer can be drawn from them; its text says it."""

    def __init__(self, split: str, number: int, total: int):
        super().__init__(
            f"{number:,} of {total:,} {SPLIT_NAMES[split]} records also stand in the training data, over "
            f"{MAX_SHARED_FRACTION:.0%}"
        )


def refuse_shared_records(pairs: Sequence[tuple[RunData, RunData]]) -> None:
    """SharedRecordsError by what run.json counts, of whole records even where rows are blocks."""
    for run in (run for pair in pairs for run in pair):
        for split in ("val", "test"):
            number, total = run.get(f"data.equal_to_train.{split}"), run.get(f"data.{split}.records")
            if isinstance(number, int) and isinstance(total, int) and number > MAX_SHARED_FRACTION * total:
                raise SharedRecordsError(split, number, total)


@dataclass(frozen=True, kw_only=True)
class MatchedLosses:
    """Summed negative log-likelihoods (nats) a seed and unit, of both modes and of the base where it was evaluated."""

    split: str  #: test or val
    lora: Matrix  #: (seeds, units)
    full: Matrix  #: (seeds, units)
    base: Matrix | None  #: (seeds, units), of full's base before the first step
    targets: NDArray[np.float64]  #: (units,)
    num_bytes: NDArray[np.float64]  #: (units,), UTF-8 bytes of the targets, 0 where the text is not known
    num_records: int
    num_in_train: int  #: further records, left out because they equal a training record
    has_groups: bool  #: whether units are groups of records that share a meaning
    are_blocks: bool  #: whether a row is a block of joined texts, not a record

    @property
    def unit_name(self) -> str:
        """What the sentence calls the units."""
        kind = "groups" if self.has_groups else "blocks" if self.are_blocks else "records"
        return f"{SPLIT_NAMES[self.split]} {kind}"

    @property
    def has_bytes(self) -> bool:
        """Whether the bytes of every unit's targets are known."""
        return bool(self.num_bytes.all())

    def to_bits_per_byte(self, nats_per_token: float) -> float | None:
        """The same summed loss over these records' bytes; None where they are not known."""
        if not self.has_bytes:
            return None
        return nats_per_token * math.fsum(self.targets) / (math.log(2) * math.fsum(self.num_bytes))

    def mean_loss(self, values: Matrix) -> float:
        """Nats per token over all seeds and units."""
        return math.fsum(values.ravel()) / (len(values) * math.fsum(self.targets))


def match_losses(pairs: Sequence[tuple[RunData, RunData]]) -> MatchedLosses:
    """The losses of (full, LoRA) pairs at each run's chosen checkpoint: on test records where all have them, else val.

    MatchError where a run left no losses, or records or their targets differ; SharedRecordsError.
    """
    runs = [run for pair in pairs for run in pair]  # full and LoRA by turns
    frames = [_read(run) for run in runs]
    split = "test" if all((frame["split"] == "test").any() for frame in frames) else "val"
    trained = [_at_step(frame, run, split) for frame, run in zip(frames, runs, strict=True)]
    base = [_select(frame, split, 0) for frame in frames[::2]]
    num_in_train, num_all = int(trained[0]["in_train"].sum()), len(trained[0])
    if num_in_train > MAX_SHARED_FRACTION * num_all:
        raise SharedRecordsError(split, num_in_train, num_all)
    trained, base = ([frame[~frame["in_train"]] for frame in members] for members in (trained, base))
    reference = trained[0]
    if not len(reference):
        raise MatchError(f"{runs[0].name} left no losses of {SPLIT_NAMES[split]} records at its chosen step")
    has_group = reference["group"].notna()
    units = reference["group"].where(has_group, reference.index.get_level_values("id")).to_numpy(dtype=str)
    if len(set(units)) < 2:
        raise MatchError(f"the {SPLIT_NAMES[split]} records are one, or share one meaning")

    def stack(rows: Sequence[pd.DataFrame]) -> Matrix:
        for frame in rows:
            _check_same_records(reference, frame)
        return sum_by_unit(np.stack([frame["nll"].to_numpy(np.float64) for frame in rows]), units)

    return MatchedLosses(
        split=split,
        full=stack(trained[::2]),
        lora=stack(trained[1::2]),
        base=stack(base) if all(map(len, base)) else None,
        targets=sum_by_unit(reference["targets"].to_numpy(np.float64), units),
        num_bytes=sum_by_unit(reference["bytes"].to_numpy(np.float64), units),
        num_records=len(reference),
        num_in_train=num_in_train,
        has_groups=bool(has_group.any()),
        are_blocks=runs[0].get("data.objective") == "blocks",
    )


def _read(run: RunData) -> pd.DataFrame:
    if run.eval_records_path is None:
        raise MatchError(f"{run.name} left no losses of single records")
    try:
        best_step = int(run.best_eval["step"]) if run.best_eval else -1
        return read_evaluations(run.eval_records_path, val_steps=(0, best_step))
    except UserError as error:  # this pair has no interval, others may
        raise MatchError(f"{run.name}: {error}") from error


def _at_step(frame: pd.DataFrame, run: RunData, split: str) -> pd.DataFrame:
    """The rows of the run's chosen checkpoint: the best of validation; test records are evaluated at it alone."""
    if split == "test":
        steps = frame.loc[(frame["split"] == "test") & (frame["step"] > 0), "step"]
        return _select(frame, split, int(steps.max()) if len(steps) else -1)
    return _select(frame, split, int(run.best_eval["step"]) if run.best_eval else -1)


def _select(frame: pd.DataFrame, split: str, step: int) -> pd.DataFrame:
    """Rows of one evaluation by (id, occurrence); where a resume wrote them twice the last stand."""
    rows = frame[(frame["split"] == split) & (frame["step"] == step) & (frame["targets"] > 0)]
    return rows.drop_duplicates(_KEY, keep="last").set_index(_KEY).sort_index()


def _check_same_records(reference: pd.DataFrame, frame: pd.DataFrame) -> None:
    num_unshared = len(reference.index.symmetric_difference(frame.index))
    if num_unshared:
        raise MatchError(f"other evaluation records ({num_unshared:,} are not in both runs)")
    if not np.array_equal(reference["targets"].to_numpy(), frame["targets"].to_numpy()):
        raise MatchError("other targets in the same records")
    if not np.isfinite(frame["nll"].to_numpy()).all():
        raise MatchError("a record's loss is not finite")
