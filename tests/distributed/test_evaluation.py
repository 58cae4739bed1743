"""The validation loss is one number: whatever the evaluation batch, the ranks and the order of the rows.

Each row's sum is kept apart and all are added exactly, so only a row's own sum can move: where it is padded to another
width or stands among other rows, another kernel may add its products in another order. That is the rounding of float32,
2^-24 = 6e-8 relative, which averages out over tokens and rows: BOUND. Rows fed alone give bitwise one number.
"""

import json
from pathlib import Path

import pytest
from helpers.matrix import evaluate_jobs, launch_jobs, train_plain_loop
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv
from helpers.tolerances import EVAL_TOLERANCE

from trainer.config import cli
from trainer.data.dataset import load, prepare

MODES, OBJECTIVES = ("full", "lora"), ("blocks", "completion")
BATCHES = (1, 2, 3, 4, 5, 8, 9, 64)  # of 9 rows or 8 blocks: most leave a ragged or a missing batch on some rank


@pytest.fixture(scope="module")
def dropout_model(tiny_model: str, session_dir: Path) -> str:
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
    names = {(*cell, objective): "-".join(map(str, (*cell, objective))) for cell in cells for objective in OBJECTIVES}
    folders = {}
    for objective in OBJECTIVES:
        settings = cli.parse_args(make_argv(dropout_model, data_files, "full", objective)).settings
        folders[objective] = prepare(settings.data, model=dropout_model, global_batch=6).folder
    for ranks in (1, 2, 3):
        jobs = [
            {
                "name": name, "data": str(folders[objective]), "out": str(tmp_path), "batches": BATCHES,
                "flags": [*make_argv(dropout_model, data_files, mode, objective), "--ds-config", zero],
            }
            for (r, zero, mode, objective), name in names.items()
            if r == ranks
        ]  # fmt: skip
        log = tmp_path / f"{ranks}.log"
        launch_jobs(ranks, jobs, log, evaluate_jobs)

    for objective in OBJECTIVES:
        assert len(load(folders[objective]).val) % 2, "the rows must not divide among two ranks"
        # A plain loop over single rows of the same weights, without dropout; a fresh adapter changes nothing.
        plain = train_plain_loop(make_argv(tiny_model, data_files, "full", objective), folders[objective])[0][0]["loss"]
        actual: dict[int, set[float]] = {batch: set() for batch in BATCHES}
        for (*_, other), name in names.items():
            if other == objective:
                for batch, losses in json.loads((tmp_path / f"{name}.json").read_text()).items():
                    actual[int(batch)].update(losses)
        worst = max(abs(loss / plain - 1) for losses in actual.values() for loss in losses)
        print(f"{objective}: largest relative difference {worst:.1e}; values", {b: len(v) for b, v in actual.items()})
        assert worst <= EVAL_TOLERANCE, actual
        assert len(actual[1]) == 1, "rows fed alone: bitwise one number on any ranks, in any order"


def test_evaluating_more_often_changes_no_training_step(dropout_model, data_files, tmp_path):
    argv = make_argv(dropout_model, data_files, "full", "blocks")
    folder = prepare(cli.parse_args(argv).settings.data, model=dropout_model, global_batch=6).folder
    jobs = [
        {
            "name": every, "data": str(folder), "out": str(tmp_path),
            "flags": [*argv, "--max-steps", "5", "--save-every", "never", "--eval-every", every],
        }
        for every in ("1", "never")
    ]  # fmt: skip
    launch_jobs(1, jobs, tmp_path / "log")
    often, never = (
        [json.loads(line) for line in (tmp_path / f"{every}.jsonl").read_text().splitlines()]
        for every in ("1", "never")
    )
    assert len([row for row in often if row["kind"] == "eval"]) == 6
    assert len([row for row in never if row["kind"] == "eval"]) == 2, "at the start and at the end"
    losses = [[row["loss"] for row in rows if row["kind"] == "step"] for rows in (often, never)]
    assert losses[0] == losses[1]
    assert [row["loss"] for row in often if row["kind"] == "eval"][-1] == never[-2]["loss"]
