"""What may be held against what: each fact that must agree, what is unknown, and the card with its gaps."""

from collections.abc import Callable
from typing import Any

import pytest
from helpers.fake_runs import make_metadata

from trainer.report.comparable import comparable_sets, comparison_blockers, group_by_seed
from trainer.report.run_data import RunData

MakeRun = Callable[..., RunData]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *[("data", "data.fingerprint"), ("split", "data.split"), ("tokenizer", "data.tokenizer")],
        *[("block length", "data.block_size"), ("objective", "data.objective")],
        ("validation set", "data.val_fingerprint"),
    ],
)
def test_each_difference_in_data_or_model_makes_two_runs_incomparable(make_run: MakeRun, name: str, path: str) -> None:
    full, other = make_run(), make_run("lora", **{path.replace(".", "__"): 9 if name == "block length" else "another"})
    assert comparison_blockers(full, make_run("lora")) == []
    assert [reason.startswith(f"other {name} (") for reason in comparison_blockers(full, other)] == [True]
    assert comparable_sets([full, other], lambda run: run) == [[full], [other]]


def test_what_a_resume_changed_is_a_note_of_the_run(make_run: MakeRun) -> None:
    changed = {"settings": make_metadata("lora")["settings"], "changed": {"lr": [3e-4, 1e-4]}}
    run = make_run("lora", resumed=changed)
    assert "lr was changed on resume, from 0.0003 to 0.0001" in run.notes
    assert comparison_blockers(make_run(), run) == []


OTHER_DATA = {"data__source": "e2e.csv", "data__fingerprint": "ff"}


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        (
            [("lora", {"seed": 1}), ("full", {"seed": 1}), ("full", {"seed": 2}), ("lora", {"resolved__lr": 1e-3})],
            ["full: 2", "LoRA (lr 0.005): 1", "LoRA (lr 0.001): 1"],
        ),
        (
            [("lora", {"settings__train__max_steps": n}) for n in (16, 48)],  # as of a study's rungs
            ["LoRA (16 steps): 1", "LoRA (48 steps): 1"],
        ),
        ([("full", {}), ("full", OTHER_DATA)], ["full (acled-demo): 1", "full (e2e.csv): 1"]),
    ],
)
def test_runs_that_differ_in_the_seed_alone_are_one_group_with_a_label_that_tells_it_apart(
    make_run: MakeRun, runs: list[tuple[str, dict[str, Any]]], labels: list[str]
) -> None:
    groups = group_by_seed([make_run(mode, **overrides) for mode, overrides in runs])
    assert [f"{group.label}: {len(group.runs)}" for group in groups] == labels
