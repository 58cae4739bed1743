"""One run, one set of numbers: whatever the ranks, micro-batches, accumulation and ZeRO stage.

Every cell is held against a plain PyTorch loop (`matrix.train_plain_loop`). The bounds are rounding. Float32 has
2^-24 = 6e-8 relative error an operation, and a batch fed whole is summed in another order than in parts: losses are
held to 2e-6 relative over the steps, gradient norms to 1e-5. AdamW divides the gradient by its own size, so where a
gradient is nearly nothing its rounding is scaled up: weights are held to a twentieth of one AdamW step (lr). The
keys' biases are left out: softmax does not see them, their gradient is nothing but rounding. Offload computes the
same sums on the host: the same bounds.

`pytest tests/distributed/test_invariance.py -m sweep -n 0 -s` prints the largest differences of every cell.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers.matrix import launch_jobs, read_job_result, train_plain_loop
from helpers.tiny_inputs import TEMPLATE_FLAGS
from safetensors.numpy import load_file

from trainer.config import cli
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.data.dataset import prepare

LOSS_TOLERANCE, NORM_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 1e-5, 0.05
LEARNING_RATE = 3e-3
GLOBAL_BATCH = 6  # divides by 1, 2 and 3 ranks
STEPS = 9  # two epochs and more: the last step of an epoch has fewer examples

Cell = tuple[int, str, str, str, str]
ALL_CELLS: list[Cell] = list(
    itertools.product((1, 2, 3), ("micro", "accumulate"), DS_CONFIG_NAMES, ("full", "lora"), ("blocks", "completion"))
)
# The default run takes each value of each axis, ragged steps and unequal token counts with every stage.
SAMPLE_CELLS = [
    (1, "accumulate", "zero0", "full", "blocks"),
    (1, "micro", "zero2", "lora", "completion"),
    (2, "micro", "zero0", "lora", "blocks"),
    (2, "accumulate", "zero0", "full", "completion"),
    (2, "accumulate", "zero1", "full", "completion"),
    (2, "micro", "zero2", "full", "blocks"),
    (2, "accumulate", "zero2_offload", "lora", "completion"),
    (2, "accumulate", "zero3", "full", "completion"),
    (2, "micro", "zero3", "lora", "blocks"),
    (2, "accumulate", "zero3_offload", "full", "blocks"),
    (3, "accumulate", "zero2", "full", "completion"),
    (3, "micro", "zero3", "full", "completion"),
]


@pytest.fixture(scope="module")
def data_dirs(tiny_model: str, data_files: tuple[str, str], session_dir: Path) -> dict[str, Path]:
    folders = {}
    for objective in ("blocks", "completion"):
        settings = cli.parse_args(make_argv(tiny_model, data_files, "full", objective)).settings
        folders[objective] = prepare(settings.data, model=tiny_model, global_batch=GLOBAL_BATCH).folder
    return folders


def make_argv(tiny_model: str, data_files: tuple[str, str], mode: str, objective: str) -> list[str]:
    block_size = "16" if objective == "blocks" else "32"
    flags = (
        f"--model {tiny_model} --data {data_files[0]} --val-data {data_files[1]} --objective {objective} "
        f"--block-size {block_size}"
    )
    flags += (
        f" --mode {mode} --lr {LEARNING_RATE} --max-grad-norm 1.0 --global-batch {GLOBAL_BATCH} --eval-batch 4 "
        f"--max-steps {STEPS}"
    )
    flags += " --save-every never"
    return [*flags.split(), *TEMPLATE_FLAGS]


def output_relevant_part(name: str, weight: np.ndarray) -> np.ndarray:
    """The part of a weight that the output depends on: of c_attn's bias [query, key, value] not the keys'."""
    return np.delete(weight, np.s_[len(weight) // 3 : 2 * len(weight) // 3]) if name.endswith("c_attn.bias") else weight


def assert_cells_match(
    cells: list[tuple[int, str, str, str, str]],
    tiny_model: str,
    data_files: tuple[str, str],
    data_dirs: dict[str, Path],
    out: Path,
) -> None:
    references = {
        (mode, objective): train_plain_loop(make_argv(tiny_model, data_files, mode, objective), data_dirs[objective])
        for mode, objective in sorted({cell[3:] for cell in cells})
    }
    for world_size in sorted({cell[0] for cell in cells}):
        jobs = []
        for cell in cells:
            if cell[0] == world_size:
                _, split, zero, mode, objective = cell
                micro_batch_size = GLOBAL_BATCH // world_size if split == "micro" else 1
                argv = [
                    *make_argv(tiny_model, data_files, mode, objective),
                    "--ds-config",
                    zero,
                    "--micro-batch",
                    str(micro_batch_size),
                ]
                name = "-".join(map(str, cell))
                jobs.append({"name": name, "flags": argv, "data": str(data_dirs[objective]), "out": str(out)})
        log = out / f"{world_size}.log"
        launch_jobs(world_size, jobs, log)
    failures = []
    for cell in cells:
        records, weights = read_job_result(out, "-".join(map(str, cell)))
        expected, expected_weights = references[cell[3:]]
        records = [record for record in records if record["kind"] in ("step", "eval")]
        assert [record["kind"] for record in records] == [record["kind"] for record in expected], cell
        loss_error = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(records, expected, strict=True))
        norm_error = max(
            abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(records, expected, strict=True) if "grad_norm" in b
        )
        assert set(weights) == set(expected_weights), cell
        weight_error = (
            max(
                np.abs(
                    output_relevant_part(name, weights[name]) - output_relevant_part(name, expected_weights[name])
                ).max()
                for name in expected_weights
            )
            / LEARNING_RATE
        )
        print(*cell, f"loss {loss_error:.1e} norm {norm_error:.1e} weights {weight_error:.1e}")
        if not (loss_error <= LOSS_TOLERANCE and norm_error <= NORM_TOLERANCE and weight_error <= WEIGHT_TOLERANCE):
            failures.append((cell, loss_error, norm_error, weight_error))
    assert not failures


def test_a_sample_of_ranks_batches_and_zero_files_equals_the_plain_loop(tiny_model, data_files, data_dirs, tmp_path):
    assert_cells_match(SAMPLE_CELLS, tiny_model, data_files, data_dirs, tmp_path)


def test_the_gradient_norm_is_reported_before_clipping_under_every_zero_stage(
    tiny_model, data_files, data_dirs, tmp_path
):
    """AdamW's first moment after one step is a tenth of the clipped gradient, so it shows what clipping left."""
    clip = 0.01
    words = [
        *make_argv(tiny_model, data_files, "full", "blocks"),
        "--max-grad-norm",
        str(clip),
        "--max-steps",
        "1",
        "--micro-batch",
        "1",
    ]
    (_, expected, _), _ = train_plain_loop(words, data_dirs["blocks"])
    jobs = [
        {"name": zero, "flags": [*words, "--ds-config", zero], "data": str(data_dirs["blocks"]), "out": str(tmp_path)}
        for zero in DS_CONFIG_NAMES
    ]
    launch_jobs(2, jobs, tmp_path / "log")
    assert expected["grad_norm"] > 100 * clip
    for zero in DS_CONFIG_NAMES:
        (step,) = [row for row in read_job_result(tmp_path, zero)[0] if row["kind"] == "step"]
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=NORM_TOLERANCE), zero
        state = load_file(tmp_path / f"{zero}-checkpoints/step-000001/state.safetensors")
        moments = [value.astype(np.float64) for name, value in state.items() if name.startswith("exp_avg/")]
        left = sum((value**2).sum() for value in moments) ** 0.5 / (1 - 0.9)
        assert left == pytest.approx(clip, rel=1e-5), zero


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_all_ranks_batches_and_zero_files_equal_the_plain_loop(tiny_model, data_files, data_dirs, tmp_path):
    assert_cells_match(ALL_CELLS, tiny_model, data_files, data_dirs, tmp_path)
