"""The card: its published numbers agree with one another, and no run is ever called comparable without a word."""

import math

import pytest

from trainer.config import reference
from trainer.config.reference import CURVE, why_not_comparable

REFERENCE_FACTS = {
    "data": "export.csv",
    "vocabulary": 50_257,
    "block_size": 1024,
    "objective": "blocks",
    "model": "gpt2",
    "examples": 13_242,
}


def test_the_published_perplexities_are_those_of_the_published_losses() -> None:
    for row in CURVE:
        assert row.perplexity == pytest.approx(math.exp(row.val_loss), abs=6e-4)  # printed with three digits


def test_the_reference_curve_is_the_published_one_at_whole_epochs() -> None:
    assert [row.val_loss for row in CURVE] == [1.2262, 1.0048, 0.9414]  # the card's training table
    assert [row.step for row in CURVE] == [row.epoch * reference.STEPS_PER_EPOCH for row in CURVE]
    assert {math.ceil(n / reference.SETTINGS["global_batch"]) for n in reference.EXAMPLES_PER_EPOCH} == {6_621}


def test_unknown_facts_of_the_reference_stay_a_reason_where_all_known_ones_agree() -> None:
    (reason,) = why_not_comparable(**REFERENCE_FACTS)
    assert reason.startswith("unknown of the card: ")
    assert "data set" in reason
    assert "split" in reason


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"examples": 240}, "other data (export.csv: 240 examples"),
        ({"vocabulary": 4096}, "other tokenizer (4,096 tokens"),
        ({"block_size": 256}, "other rows (blocks of 256 tokens"),
        ({"objective": "completion"}, "other rows (completions of at most 1,024 tokens"),
        ({"model": "some/where/demo-base/"}, "other base model (demo-base"),
    ],
)
def test_each_difference_from_the_reference_is_named_with_its_numbers(changed: dict[str, object], named: str) -> None:
    reasons = why_not_comparable(**{**REFERENCE_FACTS, **changed})
    assert len(reasons) == 2
    assert reasons[0].startswith(named)


def test_a_folder_named_gpt2_and_a_shorter_epoch_are_no_difference_from_the_reference() -> None:
    assert len(why_not_comparable(**{**REFERENCE_FACTS, "model": "models/gpt2/", "examples": 13_241})) == 1
