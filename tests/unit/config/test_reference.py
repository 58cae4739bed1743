"""The card: its published numbers agree with one another, and no run is ever called comparable without a word."""

import math
from typing import Any

import pytest

from trainer.config import reference
from trainer.config.reference import CURVE, disagreements

DATA = {"source": "export.csv", "vocabulary": 50_257, "block_size": 1024, "objective": "blocks"}
MODEL = {"name": "models/gpt2/", "init": "pretrained", "parameters": 124_439_808}


def test_the_reference_curve_is_the_published_one():
    assert [row.val_loss for row in CURVE] == [1.2262, 1.0048, 0.9414]  # the card's training table
    assert [row.step for row in CURVE] == [row.epoch * reference.STEPS_PER_EPOCH for row in CURVE]
    assert {math.ceil(n / reference.SETTINGS["global_batch"]) for n in reference.EXAMPLES_PER_EPOCH} == {6_621}
    for row in CURVE:
        assert row.perplexity == pytest.approx(math.exp(row.val_loss), abs=6e-4)  # printed with three digits


@pytest.mark.parametrize(
    ("block", "changed", "named"),
    [
        ("train", {"examples": 240}, "other data (export.csv: 240 examples"),
        ("data", {"vocabulary": 4096}, "other tokenizer (4,096 tokens"),
        ("data", {"block_size": 256}, "other rows (blocks of at most 256 tokens"),
        ("model", {"name": "some/where/demo-base/"}, "other base model (demo-base"),
        ("model", {"parameters": 9}, "other base model (gpt2, pretrained, 9 parameters"),
        ("model", {}, None),
    ],
)
def test_each_difference_from_the_reference_is_named_with_its_numbers(block, changed, named):
    blocks: dict[str, dict[str, Any]] = {"train": {"examples": 13_242}, "data": {**DATA}, "model": {**MODEL}}
    blocks[block] |= changed
    reasons = disagreements({**blocks["data"], "train": blocks["train"]}, blocks["model"])
    assert [reason.partition(named or "")[0] for reason in reasons] == ([""] if named else [])
