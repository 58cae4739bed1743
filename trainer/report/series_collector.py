"""The rows of one run, collected portion by portion in bounded memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.report.run_data import EPOCH_FIELDS, EVAL_FIELDS, STEP_FIELDS, RunRecords, Series, drop_superseded_rows

MAX_STEP_ROWS = 2**18  # of a run in memory (19 MB); of more, so many means of 2, 4, 8 ... steps each
_MEAN_COLUMNS = ("loss", "lr", "grad_norm", "tokens_per_second")  # of the others the last of the steps stands


class SeriesCollector:
    """Takes portions of a run's rows in their order; of a long run it keeps the means of several steps each."""

    def __init__(self) -> None:
        self._steps: list[Series] = []
        self._evals: list[Series] = []
        self._epochs: list[Series] = []
        self._num_step_rows, self._stride = 0, 1

    def add(self, *, steps: Series, evals: Series, epochs: Series) -> None:
        """Take the next rows of each kind."""
        self._steps.append(_average(steps, self._stride))
        self._evals.append(evals)
        self._epochs.append(epochs)
        self._num_step_rows += len(self._steps[-1]["step"])
        if self._num_step_rows > MAX_STEP_ROWS:
            self._steps = [_average(drop_superseded_rows(_concatenate(self._steps, STEP_FIELDS)), 2)]
            self._num_step_rows, self._stride = len(self._steps[0]["step"]), 2 * self._stride

    def to_records(self, events: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> RunRecords:
        """All that was taken, with a note where steps were averaged."""
        averaged = [f"its steps are read as means of {self._stride} each"] if self._stride > 1 else []
        return RunRecords(
            steps=_concatenate(self._steps, STEP_FIELDS), evals=_concatenate(self._evals, EVAL_FIELDS),
            epochs=_concatenate(self._epochs, EPOCH_FIELDS), events=list(events), notes=[*notes, *averaged],
            age_seconds=0.0,
        )  # fmt: skip


def _concatenate(chunks: list[Series], column_names: tuple[str, ...]) -> Series:
    return {name: np.concatenate([[], *(chunk[name] for chunk in chunks)]) for name in column_names}


def _average(steps: Series, stride: int) -> Series:
    """A row for so many steps, and one for the rest at the end."""
    num_rows = len(steps["step"])
    if stride == 1 or not num_rows:
        return steps
    starts = np.arange(0, num_rows, stride)
    ends = np.minimum(starts + stride, num_rows)
    return {
        name: np.add.reduceat(column, starts) / (ends - starts) if name in _MEAN_COLUMNS else column[ends - 1]
        for name, column in steps.items()
    }
