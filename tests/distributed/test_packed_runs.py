"""Real ranks: packed rows give the losses, norms and weights of one example a row; what they cost is said."""

import re

import numpy as np
import pytest
from helpers.engines import plan_run, prepare_data
from helpers.matrix import launch_jobs, make_job, output_relevant_part, read_job_result
from helpers.tiny_inputs import tiny_argv

from trainer.config.errors import UserError
from trainer.distributed.process_group import simulated_context

TOLERANCE = 2e-5  # float32 sums in another order, over 8 steps


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    flags = "--mode full --objective completion --block-size 32 --global-batch 8 --epochs 8 --lr 1e-3"
    return tiny_argv(tiny_model, data_files, f"{flags} --dropout 0 --save-every never")


def test_a_packed_run_follows_the_run_of_single_rows_step_by_step(argv, tmp_path):
    argv = [*argv, "--max-samples", "24", "--global-batch", "24"]  # all in every step, as the orders differ
    data = prepare_data(argv)
    cases = {"single": [], "packed": ["--packing"]}
    launch_jobs(2, [make_job(tmp_path, name, [*argv, *more], data=data) for name, more in cases.items()])
    (single_records, single_weights), (packed_records, packed_weights) = (
        read_job_result(tmp_path, name) for name in ("single", "packed")
    )
    assert [record["kind"] for record in packed_records] == [record["kind"] for record in single_records]
    for single, packed in zip(single_records, packed_records, strict=True):
        for key in ("step",) if single["kind"] == "event" else ("step", "samples", "tokens"):
            assert packed[key] == single[key]
        if single["kind"] in ("step", "eval"):
            assert packed["loss"] == pytest.approx(single["loss"], abs=TOLERANCE)
        if single["kind"] == "step":
            assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)
    for name, weight in single_weights.items():
        both = (output_relevant_part(name, values) for values in (packed_weights[name], weight))
        np.testing.assert_allclose(*both, atol=5e-4, err_msg=name)


def test_a_validation_set_that_was_trained_on_is_a_warning_of_the_plan_and_no_groups(argv, data_files):
    train_data, val_data = data_files
    leaked = [train_data if flag == val_data else flag for flag in argv] + ["--allow-leakage"]
    lines = plan_run(leaked, simulated_context(1), on_meta=True).plan.summary_lines()
    validation = dict(lines)["validation"]
    assert validation.startswith("25 examples (25 of 25 records are not new), ")
    kind, warning = lines[-1]
    assert kind == "warning"
    assert re.fullmatch("25 of 25 validation records are not new: .*, so the validation loss means nothing", warning)
    with pytest.raises(UserError, match=r"25 of 25 validation records .* expected under 50%, or --allow-leakage"):
        plan_run(leaked[:-1], simulated_context(1), on_meta=True)


def test_the_plan_marks_the_lines_that_follow_from_a_flag(argv):
    plan = plan_run([*argv, "--test-fraction", "0.2", "--score", "f1"], simulated_context(1), on_meta=True).plan
    unmarked = {name for name, _ in plan.summary_lines()} - plan.set_by_user()
    assert unmarked == {
        *("run", "you set (*)", "trainable", "example", "precision", "ZeRO file", "execution", "output")
    }


def test_the_plan_says_that_rows_are_packed(argv):
    lines = dict(plan_run([*argv, "--packing"], simulated_context(1), on_meta=True).plan.summary_lines())
    assert lines["batch"].endswith("packed into rows of at most 32 tokens")
    with pytest.raises(UserError, match="--packing: blocks are full already; expected --objective completion, or chat"):
        plan_run([*argv, "--packing", "--objective", "blocks"], simulated_context(1), on_meta=True)
