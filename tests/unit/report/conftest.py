"""What the tests of the report share."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_runs import make_metadata, make_reference_like_metadata, make_run_folder, write_eval_records

from trainer.report.run_data import RunData, read_folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunData]:
    """Makes runs, one after the other: `make_run(mode, losses, ...)`."""
    numbers = itertools.count()

    def make_run(
        mode: str = "full",
        losses: Sequence[float] = (4.0, 2.0),
        *,
        like_card: bool = False,
        record_losses: Mapping[int, Sequence[float]] | None = None,
        record_options: Mapping[str, Any] | None = None,
        how: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> RunData:
        """A run with these validation losses at epoch 0, 1, ...; `record_losses` of each record by step."""
        content = (make_reference_like_metadata if like_card else make_metadata)(mode, **overrides)
        content["resolved"]["total_steps"] = content["resolved"]["steps_per_epoch"] * (len(losses) - 1)
        by_epoch = {float(i): loss for i, loss in enumerate(losses)}
        for step, values in (record_losses or {}).items():  # the run's rows are the means of its records
            mean = float(np.average(values, weights=(record_options or {})["targets"]))
            by_epoch[step / content["resolved"]["steps_per_epoch"]] = mean
        options = {"losses": by_epoch, "every": 500, "epochs": len(losses) - 1, **(how or {})}
        folder = make_run_folder(tmp_path / str(next(numbers)), metadata=content, **options)
        if record_losses is not None:
            write_eval_records(folder, record_losses, **(record_options or {}))
        return read_folder(folder)

    return make_run
