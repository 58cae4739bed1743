"""One run, one set of numbers: whatever the ranks, micro-batches, accumulation and ZeRO stage.

Every cell is held against a plain PyTorch loop (`cells.reference`). The bounds are rounding. Float32 has 2^-24 = 6e-8
relative error an operation, and a batch fed whole is summed in another order than in parts: losses are held to 2e-6
relative over the steps, gradient norms to 1e-5. AdamW divides the gradient by its own size, so where a gradient is
nearly nothing its rounding is scaled up: weights are held to a twentieth of one AdamW step (lr). The keys' biases are
left out: softmax does not see them, their gradient is nothing but rounding. Offload computes the same sums on the
host: the same bounds.

`pytest tests/test_invariance.py -m sweep -n 0 -s` prints the largest differences of every cell.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from cells import on_cells, read_cell, reference
from conftest import TEMPLATES
from safetensors.numpy import load_file

from trainer.config import cli
from trainer.config.schema import DS_NAMES
from trainer.data.dataset import prepare

LOSS, NORM, WEIGHTS = 2e-6, 1e-5, 0.05
RATE = 3e-3
BATCH = 6  # divides by 1, 2 and 3 ranks
STEPS = 9  # two epochs and more: the last step of an epoch has fewer examples

Cell = tuple[int, str, str, str, str]
ALL: list[Cell] = list(
    itertools.product((1, 2, 3), ("micro", "accumulate"), DS_NAMES, ("full", "lora"), ("blocks", "completion"))
)
# The default run takes each value of each axis, ragged steps and unequal token counts with every stage.
SAMPLE = [
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
def prepared(tiny: str, records: tuple[str, str], shelf: Path) -> dict[str, Path]:
    folders = {}
    for objective in ("blocks", "completion"):
        settings = cli.read(arguments(tiny, records, "full", objective)).settings
        folders[objective] = prepare(settings.data, model=tiny, global_batch=BATCH).folder
    return folders


def arguments(tiny: str, records: tuple[str, str], mode: str, objective: str) -> list[str]:
    size = "16" if objective == "blocks" else "32"
    words = f"--model {tiny} --data {records[0]} --val-data {records[1]} --objective {objective} --block-size {size}"
    words += f" --mode {mode} --lr {RATE} --clip 1.0 --global-batch {BATCH} --eval-batch 4 --max-steps {STEPS}"
    words += " --save-every never"
    return [*words.split(), *TEMPLATES]


def seen(name: str, weight: np.ndarray) -> np.ndarray:
    """The part of a weight that the output depends on: of c_attn's bias [query, key, value] not the keys'."""
    return np.delete(weight, np.s_[len(weight) // 3 : 2 * len(weight) // 3]) if name.endswith("c_attn.bias") else weight


def check(
    cells: list[tuple[int, str, str, str, str]],
    tiny: str,
    records: tuple[str, str],
    prepared: dict[str, Path],
    out: Path,
) -> None:
    references = {
        (mode, objective): reference(arguments(tiny, records, mode, objective), prepared[objective])
        for mode, objective in sorted({cell[3:] for cell in cells})
    }
    for ranks in sorted({cell[0] for cell in cells}):
        jobs = []
        for cell in cells:
            if cell[0] == ranks:
                _, split, zero, mode, objective = cell
                micro = BATCH // ranks if split == "micro" else 1
                words = [*arguments(tiny, records, mode, objective), "--ds-config", zero, "--micro-batch", str(micro)]
                name = "-".join(map(str, cell))
                jobs.append({"name": name, "flags": words, "data": str(prepared[objective]), "out": str(out)})
        log = out / f"{ranks}.log"
        on_cells(ranks, jobs, log)
    wrong = []
    for cell in cells:
        rows, weights = read_cell(out, "-".join(map(str, cell)))
        expected, final = references[cell[3:]]
        rows = [row for row in rows if row["kind"] in ("step", "eval")]
        assert [row["kind"] for row in rows] == [row["kind"] for row in expected], cell
        loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows, expected, strict=True))
        norm = max(
            abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(rows, expected, strict=True) if "grad_norm" in b
        )
        assert set(weights) == set(final), cell
        moved = max(np.abs(seen(name, weights[name]) - seen(name, final[name])).max() for name in final) / RATE
        print(*cell, f"loss {loss:.1e} norm {norm:.1e} weights {moved:.1e}")
        if not (loss <= LOSS and norm <= NORM and moved <= WEIGHTS):
            wrong.append((cell, loss, norm, moved))
    assert not wrong


def test_a_sample_of_cells_equals_the_plain_loop(tiny, records, prepared, tmp_path):
    check(SAMPLE, tiny, records, prepared, tmp_path)


def test_the_norm_is_reported_before_clipping_under_every_stage(tiny, records, prepared, tmp_path):
    """AdamW's first moment after one step is a tenth of the clipped gradient, so it shows what clipping left."""
    clip = 0.01
    words = [*arguments(tiny, records, "full", "blocks"), "--clip", str(clip), "--max-steps", "1", "--micro-batch", "1"]
    (_, expected, _), _ = reference(words, prepared["blocks"])
    jobs = [
        {"name": zero, "flags": [*words, "--ds-config", zero], "data": str(prepared["blocks"]), "out": str(tmp_path)}
        for zero in DS_NAMES
    ]
    on_cells(2, jobs, tmp_path / "log")
    assert expected["grad_norm"] > 100 * clip
    for zero in DS_NAMES:
        (step,) = [row for row in read_cell(tmp_path, zero)[0] if row["kind"] == "step"]
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=NORM), zero
        state = load_file(tmp_path / f"{zero}-checkpoints/step-000001/state.safetensors")
        moments = [value.astype(np.float64) for name, value in state.items() if name.startswith("exp_avg/")]
        left = sum((value**2).sum() for value in moments) ** 0.5 / (1 - 0.9)
        assert left == pytest.approx(clip, rel=1e-5), zero


@pytest.mark.sweep
@pytest.mark.timeout(3600)
def test_every_cell_equals_the_plain_loop(tiny, records, prepared, tmp_path):
    check(ALL, tiny, records, prepared, tmp_path)
