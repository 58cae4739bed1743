"""The validation loss is one number: whatever the evaluation batch, the ranks and the order of the rows.

Each row's sum is kept apart and all are added exactly, so only a row's own sum can move: where it is padded to another
width or stands among other rows, another kernel may add its products in another order. That is the rounding of float32,
2^-24 = 6e-8 relative, which averages out over tokens and rows: BOUND. Rows fed alone give bitwise one number.
"""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engines import context_of_hosts, prepare_data
from helpers.matrix import evaluate_jobs, launch_by_ranks, make_job, train_plain_loop
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv
from helpers.tolerances import EVAL_TOLERANCE

from trainer.data.dataset import load
from trainer.training.evaluation import evaluate

OBJECTIVES = ("blocks", "completion")
BATCHES = (1, 3, 4, 64)  # of 9 rows or 8 blocks: most leave a ragged or a missing batch on some rank


@pytest.fixture(scope="module")
def dropout_model(session_dir: Path) -> str:
    """Dropout that would show at once if it were left on."""
    return make_tiny_gpt2(session_dir / "half-dropped", dropout=0.5)


def make_argv(model: str, data_files: tuple[str, str], mode: str, objective: str) -> list[str]:
    block_size = "16" if objective == "blocks" else "32"
    text = f"--mode {mode} --objective {objective} --block-size {block_size} --global-batch 6 --micro-batch 1"
    return tiny_argv(model, data_files, f"{text} --max-steps 1 --lora-dropout 0.5")


def test_the_validation_loss_is_the_same_for_every_batch_size_ranks_and_order(
    dropout_model, tiny_model, data_files, tmp_path
):
    cells = ((1, "zero0", "full"), (2, "zero2", "lora"), (2, "zero3", "full"), (3, "zero1", "lora"))
    jobs = []
    for objective, (ranks, zero, mode) in itertools.product(OBJECTIVES, cells):
        flags = [*make_argv(dropout_model, data_files, mode, objective), "--ds-config", zero]
        jobs.append(make_job(tmp_path, f"{objective}-{ranks}-{zero}-{mode}", flags, ranks=ranks, batches=BATCHES))
    launch_by_ranks(jobs, evaluate_jobs)

    for objective in OBJECTIVES:
        # A plain loop over single rows of the same weights, without dropout; a fresh adapter changes nothing.
        argv = make_argv(tiny_model, data_files, "full", objective)
        assert len(load(prepare_data(argv)).val) % 2, "the rows must not divide among two ranks"
        plain = train_plain_loop(argv)[0][0]["loss"]
        actual: dict[int, set[float]] = {batch: set() for batch in BATCHES}
        files = list(tmp_path.glob(f"{objective}-*.json"))
        assert len(files) == len(cells)
        for file in files:
            for batch, losses in json.loads(file.read_text()).items():
                actual[int(batch)].update(losses)
        worst = max(abs(loss / plain - 1) for losses in actual.values() for loss in losses)
        print(f"{objective}: largest relative difference {worst:.1e}; values", {b: len(v) for b, v in actual.items()})
        assert worst <= EVAL_TOLERANCE, actual
        assert len(actual[1]) == 1, "rows fed alone: bitwise one number on any ranks, in any order"


def test_an_evaluation_waits_for_the_other_ranks_at_most_every_eighth_batch(tiny_model, data_files):
    """25 rows in batches of one: 4 questions whether to stop, and the losses; it was a question for each batch."""
    questions: list[object] = []
    context = context_of_hosts("a", gather=lambda value: questions.append(value) or [value])
    engine: Any = SimpleNamespace(dist_context=context, evaluate=lambda batch: torch.ones(len(batch.input_ids)))
    rows = load(prepare_data(make_argv(tiny_model, data_files, "full", "completion"))).train
    assert evaluate(engine, rows, 1).row_nll == [1.0] * 25
    assert questions[:-1] == [False] * 4
