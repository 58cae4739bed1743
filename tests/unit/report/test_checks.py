"""Checks for CI: what holds passes, what does not fails, what cannot be told is neither, and a typo is a mistake."""

from pathlib import Path

import pytest
from helpers.fake_runs import make_reference_like_metadata, make_run_folder

from trainer.config.errors import UserError
from trainer.report.compare_cli import check_runs, exit_code, parse_condition
from trainer.report.run_data import RunData, read_folder

REFERENCE_LOSSES = {0: 4.0, 1: 1.2262, 2: 1.0048, 3: 0.9414}


@pytest.fixture(scope="module")
def run_data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    folder = tmp_path_factory.mktemp("checks") / "run"
    return read_folder(make_run_folder(folder, losses={0: 4.0, 1: 1.5, 2: 1.0, 3: 1.2}))


@pytest.mark.parametrize(
    ("outcome", "tolerance", "checks"),
    [
        ("passed", 0.0, "val_loss<=1.0@epoch 2, val_loss==1.2, val_loss>=1.2@step 90, train_loss<=2.3@epoch 2"),
        ("passed", 0.0, "best_val_loss<=1.0, train_loss>3.9@step 1, wall_seconds<=100"),
        ("failed", 0.0, "val_loss<1.0@epoch 2, val_loss <= 0.999 @ epoch 2, val_loss<=1.0, peak_memory_bytes<1e9"),
        ("failed", 0.0, "val_loss<=9@epoch 7, val_loss<=9@epoch 1.5, val_loss<=9@step 31"),  # no such evaluation
        ("passed", 0.02, "val_loss<=0.99@epoch 2, val_loss>=1.01@epoch 2, val_loss==1.01@epoch 2"),
        ("not comparable", 0.0, "card"),
    ],
)
def test_a_check_on_a_run_passes_or_fails(run_data: RunData, outcome: str, tolerance: float, checks: str) -> None:
    results = check_runs(checks.split(", "), [run_data], tolerance)
    assert {result.check: result.outcome for result in results} == dict.fromkeys(checks.split(", "), outcome)


def test_a_typo_in_a_check_is_an_error_and_not_a_pass() -> None:
    for text in ("", "val_los<=1", "val_loss=1", "val_loss<=nan", "val_loss<=1@epoch", "best_val_loss<=1@epoch 2"):
        with pytest.raises(UserError, match="--check"):
            parse_condition(text)


def test_an_unfinished_run_has_no_final_value_but_its_epochs_stand(tmp_path: Path) -> None:
    going = read_folder(make_run_folder(tmp_path / "going", finished=False))
    results = check_runs(["val_loss<=9", "best_val_loss<=9", "val_loss<=9@epoch 1"], [going], 0.0)
    assert [result.outcome for result in results] == ["failed", "failed", "passed"]


@pytest.mark.parametrize(
    ("changes", "tolerance", "outcome", "reason"),
    [
        ({}, 0.0, "passed", "unknown of the card"),
        ({3: 0.9424}, 0.0, "failed", "over at epoch 3"),
        ({3: 0.9424}, 0.0011, "passed", "tolerance 0.0011"),
        ({1: 0.5, 2: None, 3: 0.5}, 0.0, "failed", "no evaluation at epoch 2"),
    ],
)
def test_the_card_check_passes_where_each_epoch_is_at_or_under_the_reference(
    tmp_path: Path, changes: dict[int, float | None], tolerance: float, outcome: str, reason: str
) -> None:
    losses = {epoch: loss for epoch, loss in {**REFERENCE_LOSSES, **changes}.items() if loss is not None}
    metadata = make_reference_like_metadata("lora")
    run = read_folder(make_run_folder(tmp_path / "card", metadata=metadata, losses=losses, every=5000))
    (result,) = check_runs(["card"], [run], tolerance)
    assert (result.outcome, reason in result.why) == (outcome, True)


def test_checks_decide_the_exit_code(run_data: RunData) -> None:
    good, bad = "val_loss<9", "val_loss<0"
    for checks, code in ([], 0), ([good], 0), ([good, bad], 1), (["card", good], 3), (["card", bad], 1):
        assert exit_code(check_runs(checks, [run_data], 0)) == code
