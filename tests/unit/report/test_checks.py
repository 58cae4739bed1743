"""Checks for CI: what holds passes, what does not fails, what cannot be told is neither, and a typo is a mistake."""

from pathlib import Path

import pytest
from helpers.fake_runs import make_reference_like_metadata, make_run_folder

from trainer.config.errors import UserError
from trainer.report.checks import check_runs, exit_code, parse_condition
from trainer.report.run_data import RunData, read_folder

REFERENCE_LOSSES = {0: 4.0, 1: 1.2262, 2: 1.0048, 3: 0.9414}


@pytest.fixture
def run_data(tmp_path: Path) -> RunData:
    return read_folder(make_run_folder(tmp_path / "run", losses={0: 4.0, 1: 1.5, 2: 1.0, 3: 1.2}))


def check_outcome(run_data: RunData, check: str, tolerance: float = 0.0) -> str:
    return check_runs([check], [run_data], tolerance)[0].outcome


@pytest.mark.parametrize(
    ("check", "passes"),
    [
        ("val_loss<=1.0@epoch 2", True),
        ("val_loss<1.0@epoch 2", False),
        ("val_loss <= 0.999 @ epoch 2", False),
        ("val_loss<=1.0", False),
        ("val_loss==1.2", True),
        ("val_loss>=1.2@step 90", True),
        ("val_loss<=1.5@step 30", True),
        ("best_val_loss<=1.0", True),
        ("perplexity<3.33", True),
        ("perplexity<3.32", False),
        ("train_loss<=2.3@epoch 2", True),
        ("train_loss<=2.2@epoch 2", False),
        ("train_loss>3.9@step 1", True),
        ("grad_norm<=1.2@step 7", True),
        ("lr<=1e-3@step 1", True),
        ("improvement>=3", True),
        ("wall_seconds<=100", True),
        ("peak_memory_bytes<1e9", False),
        ("trainable_parameters==2000000", True),
        ("val_loss<=9@epoch 7", False),
        ("val_loss<=9@epoch 1.5", False),
        ("val_loss<=9@step 31", False),
    ],
)
def test_an_assertion_on_a_run_passes_or_fails(run_data: RunData, check: str, passes: bool) -> None:
    assert check_outcome(run_data, check) == ("passed" if passes else "failed")


def test_the_tolerance_widens_the_limit_of_an_assertion_on_its_own_side(run_data: RunData) -> None:
    for check, outcome in (("<=0.99", "passed"), ("<=0.97", "failed"), (">=1.01", "passed"), ("==1.01", "passed")):
        assert check_outcome(run_data, f"val_loss{check}@epoch 2", 0.02) == outcome


@pytest.mark.parametrize(
    "text",
    [
        "",
        "val_los<=1",
        "val_loss=1",
        "val_loss<=",
        "val_loss<=one",
        "val_loss<=nan",
        "val_loss<=1@epoch",
        "val_loss<=1@epok 2",
        "cards",
        "val_loss<=1@epoch two",
        "best_val_loss<=1@epoch 2",
        "val_loss<=1@epoch -1",
        "val_loss<=1 val_loss<=2",
    ],
)
def test_a_typo_in_an_assertion_is_an_error_and_not_a_pass(text: str) -> None:
    with pytest.raises(UserError, match="--check"):
        parse_condition(text)


def test_an_unfinished_run_has_no_final_value_but_its_epochs_stand(tmp_path: Path) -> None:
    going = read_folder(make_run_folder(tmp_path / "going", finished=False))
    outcomes = [check_outcome(going, check) for check in ("val_loss<=9", "best_val_loss<=9", "val_loss<=9@epoch 1")]
    assert outcomes == ["failed", "failed", "passed"]


@pytest.mark.parametrize(
    ("changes", "tolerance", "outcome", "reason"),
    [
        ({}, 0.0, "passed", "unknown of the card"),
        *(({epoch: REFERENCE_LOSSES[epoch] + 0.001}, 0.0, "failed", f"over at epoch {epoch}") for epoch in (1, 2, 3)),
        *(({epoch: REFERENCE_LOSSES[epoch] + 0.001}, 0.0011, "passed", "tolerance 0.0011") for epoch in (1, 2, 3)),
        ({1: 0.5, 2: None, 3: 0.5}, 0.0, "failed", "no evaluation at epoch 2"),
    ],
)
def test_the_card_assertion_passes_where_each_epoch_is_at_or_under_the_reference(
    tmp_path: Path, changes: dict[int, float | None], tolerance: float, outcome: str, reason: str
) -> None:
    losses = {epoch: loss for epoch, loss in {**REFERENCE_LOSSES, **changes}.items() if loss is not None}
    metadata = make_reference_like_metadata("lora")
    run = read_folder(make_run_folder(tmp_path / "card", metadata=metadata, losses=losses, every=5000))
    result = check_runs(["card"], [run], tolerance)[0]
    assert result.outcome == outcome
    assert reason in result.why


def test_a_run_on_other_data_is_not_comparable_with_the_reference_however_low_its_loss(tmp_path: Path) -> None:
    low = read_folder(make_run_folder(tmp_path / "low", losses={0: 1.0, 1: 0.1, 2: 0.1, 3: 0.1}))
    assert check_outcome(low, "card") == "not comparable"


def test_assertions_decide_the_exit_code(run_data: RunData) -> None:
    good, bad = "val_loss<9", "val_loss<0"
    for checks, code in ([], 0), ([good], 0), ([good, bad], 1), (["card", good], 3), (["card", bad], 1):
        assert exit_code(check_runs(checks, [run_data], 0)) == code
