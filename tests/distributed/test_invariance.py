"""One run, one set of numbers: whatever the ranks, micro-batches, accumulation and ZeRO stage.

Every cell is held against a plain PyTorch loop (`matrix.train_plain_loop`), to the rounding of sums in another order
(`helpers/tolerances.py`). The keys' biases are left out: softmax does not see them, their gradient is nothing but
rounding. Offload computes the same sums on the host: the same bounds.

`pytest tests/distributed/test_invariance.py -m sweep -n 0 -s` prints the largest differences of every cell.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers.matrix import (
    GLOBAL_BATCH,
    RunDifference,
    launch_by_ranks,
    launch_jobs,
    make_argv,
    make_job,
    read_job_result,
    train_plain_loop,
)
from helpers.tolerances import NORM_TOLERANCE
from safetensors.numpy import load_file

from trainer.config.choices import DS_CONFIG_NAMES

Cell = tuple[int, str, str, str, str]
ALL_CELLS: list[Cell] = list(
    itertools.product((1, 2, 3), ("micro", "accumulate"), DS_CONFIG_NAMES, ("full", "lora"), ("blocks", "completion"))
)
# The default run takes each value of each axis, ragged steps and unequal token counts with every stage.
SAMPLE_CELLS = [
    (1, "accumulate", "zero0", "full", "blocks"),
    (1, "micro", "zero2", "lora", "completion"),
    (2, "micro", "zero0", "lora", "blocks"),
    (2, "accumulate", "zero1", "full", "completion"),
    (2, "accumulate", "zero2_offload", "lora", "completion"),
    (2, "accumulate", "zero3", "full", "completion"),
    (2, "micro", "zero3", "lora", "blocks"),
    (2, "accumulate", "zero3_offload", "full", "blocks"),
    (3, "accumulate", "zero2", "full", "completion"),
]


def assert_cells_match(cells: list[Cell], tiny_model: str, data_files: tuple[str, str], out: Path) -> None:
    references = {
        (mode, objective): train_plain_loop(make_argv(tiny_model, data_files, mode, objective))
        for mode, objective in sorted({cell[3:] for cell in cells})
    }
    jobs = []
    for cell in cells:
        ranks, split, zero, mode, objective = cell
        micro_batch_size = GLOBAL_BATCH // ranks if split == "micro" else 1
        flags = ["--ds-config", zero, "--micro-batch", str(micro_batch_size)]
        argv = [*make_argv(tiny_model, data_files, mode, objective), *flags]
        jobs.append(make_job(out, "-".join(map(str, cell)), argv, ranks=ranks))
    launch_by_ranks(jobs)
    failures = []
    for cell in cells:
        records, weights = read_job_result(out, "-".join(map(str, cell)))
        records = [record for record in records if record["kind"] in ("step", "eval")]
        difference = RunDifference.between((records, weights), references[cell[3:]])
        print(*cell, difference)
        if not difference.is_rounding():
            failures.append((cell, difference))
    assert not failures


@pytest.mark.parametrize(
    "cells",
    [SAMPLE_CELLS, pytest.param(ALL_CELLS, marks=[pytest.mark.sweep, pytest.mark.timeout(3600)])],
    ids=["sample", "all"],
)
def test_ranks_batches_and_zero_files_equal_the_plain_loop(cells, tiny_model, data_files, tmp_path):
    assert_cells_match(cells, tiny_model, data_files, tmp_path)


def test_the_gradient_norm_is_reported_before_clipping_under_every_zero_stage(tiny_model, data_files, tmp_path):
    """AdamW's first moment after one step is a tenth of the clipped gradient, so it shows what clipping left."""
    clip = 0.01
    argv = make_argv(tiny_model, data_files, "full", "blocks")
    argv += f"--max-grad-norm {clip} --max-steps 1 --micro-batch 1".split()
    (_, expected, _), _ = train_plain_loop(argv)
    launch_jobs(2, [make_job(tmp_path, zero, [*argv, "--ds-config", zero]) for zero in DS_CONFIG_NAMES])
    assert expected["grad_norm"] > 100 * clip
    for zero in DS_CONFIG_NAMES:
        (step,) = [row for row in read_job_result(tmp_path, zero)[0] if row["kind"] == "step"]
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=NORM_TOLERANCE), zero
        state = load_file(tmp_path / f"{zero}/checkpoints/step-000001/state.safetensors")
        moments = [value.astype(np.float64) for name, value in state.items() if name.startswith("exp_avg/")]
        left = sum((value**2).sum() for value in moments) ** 0.5 / (1 - 0.9)
        assert left == pytest.approx(clip, rel=1e-5), zero
