"""What a run wrote, by kind of record: columns, collected portion by portion in bounded memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, StepRecord

#: columns of one kind of record, each an array of float64 of the same length; NaN where a row lacks the value
Series = dict[str, NDArray[np.float64]]
SERIES_CLASSES: dict[str, type] = {"step": StepRecord, "eval": EvalRecord, "epoch": EpochRecord}
COLUMN_NAMES = {
    kind: tuple(column.name for column in fields(record_class) if column.name != "row_nll")
    for kind, record_class in SERIES_CLASSES.items()
}
PORTION_BYTES = 8_000_000  # of rows at a time
MAX_STEP_ROWS = 2**18  # of a run in memory (19 MB); of more, so many means of 2, 4, 8 ... steps each
_MEAN_COLUMNS = ("loss", "lr", "grad_norm", "tokens_per_second")  # of the others the last of the steps stands
Row = TypeVar("Row")


@dataclass(kw_only=True)
class RunRecords:
    """Takes portions of a run's rows in their order; of a long run it keeps the means of several steps each."""

    events: list[EventRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  #: what could not be read
    age_seconds: float = 0.0  #: since the last of it was written
    eval_records_path: Path | None = None

    def __post_init__(self) -> None:
        self._portions: dict[str, list[Series]] = {kind: [] for kind in COLUMN_NAMES}
        self.steps_per_row = 1

    def add(self, kind: str, rows: Series) -> None:
        """Take the next rows of a kind."""
        portions = self._portions[kind]
        portions.append(_average(rows, self.steps_per_row) if kind == "step" else rows)
        if kind == "step" and sum(len(portion["step"]) for portion in portions) > MAX_STEP_ROWS:
            portions[:] = [_average(self.series("step"), 2)]
            self.steps_per_row *= 2

    def series(self, kind: str) -> Series:
        """The rows of a kind that stand, without those that were done again after a resume."""
        columns = {
            name: np.concatenate([[], *(portion[name] for portion in self._portions[kind])])
            for name in COLUMN_NAMES[kind]
        }
        return drop_superseded_rows(columns)


def split_rows(rows: Iterable[Row], get_size: Callable[[Row], int]) -> Iterator[list[Row]]:
    """The rows, some megabytes at a time."""
    portion: list[Row] = []
    num_bytes = 0
    for row in rows:
        portion.append(row)
        num_bytes += get_size(row)
        if num_bytes > PORTION_BYTES:
            yield portion
            portion, num_bytes = [], 0
    if portion:
        yield portion


def to_series(rows: Iterable[Mapping[str, Any]], kind: str) -> Series:
    """Columns of `rows`; what a row lacks, or is no number, becomes NaN."""
    names = COLUMN_NAMES[kind]
    table = [[to_float(row.get(name)) for name in names] for row in rows]
    columns = np.array(table, dtype=np.float64).reshape(len(table), len(names)).T
    return {name: np.ascontiguousarray(column) for name, column in zip(names, columns, strict=True)}


def to_float(value: Any) -> float:
    """A number of JSON, NaN for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def drop_superseded_rows(series: Series) -> Series:
    """The rows that stand: one that a later row steps back behind was done again after a resume, and is left out."""
    series = {name: column[np.isfinite(series["step"])] for name, column in series.items()}
    step = series["step"]
    min_later_step = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)[: len(step)]
    return {name: column[step < min_later_step] for name, column in series.items()}


def _average(steps: Series, steps_per_row: int) -> Series:
    """A row for so many steps, and one for the rest at the end."""
    num_rows = len(steps["step"])
    if steps_per_row == 1 or not num_rows:
        return steps
    starts = np.arange(0, num_rows, steps_per_row)
    ends = np.minimum(starts + steps_per_row, num_rows)
    return {
        name: np.add.reduceat(column, starts) / (ends - starts) if name in _MEAN_COLUMNS else column[ends - 1]
        for name, column in steps.items()
    }
