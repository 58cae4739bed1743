"""What may be held against what: each fact that must agree, what is unknown, and the card with its gaps."""

from typing import Any

import pytest
from helpers.fake_runs import make_metadata
from helpers.fake_studies import MakeRun

from trainer.report.comparable import (
    COMPARABILITY_KEYS,
    comparable_sets,
    comparison_blockers,
    group_by_seed,
    reference_blockers,
)
from trainer.report.page import build_settings_tables


@pytest.mark.parametrize(("name", "path"), COMPARABILITY_KEYS.items())
def test_each_difference_in_data_or_model_makes_two_runs_incomparable(make_run: MakeRun, name: str, path: str) -> None:
    full, other = make_run(), make_run("lora", **{path.replace(".", "__"): 9 if name == "block length" else "another"})
    assert comparison_blockers(full, make_run("lora")) == []
    assert [reason.startswith(f"other {name} (") for reason in comparison_blockers(full, other)] == [True]
    assert comparable_sets([full, other], lambda run: run) == [[full], [other]]


def test_a_tokenizer_and_ready_token_ids_are_different_tokenizers(make_run: MakeRun) -> None:
    assert comparison_blockers(make_run(), make_run("lora", data__tokenizer=None)) == [
        "other tokenizer (one came as token ids)"
    ]


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("data__vocabulary", 50_258, "other tokenizer ("),
        ("data__block_size", 512, "other rows ("),
        ("data__objective", "completion", "other rows ("),
        ("model__name", "gpt2-medium", "other base model ("),
        ("model__parameters", 124_000_000, "other base model ("),
        ("model__init", "random", "other base model ("),
        ("data__train__examples", 13_243, "other data ("),
    ],
)
def test_each_known_difference_from_the_reference_is_a_reason(
    make_run: MakeRun, path: str, value: Any, reason: str
) -> None:
    assert reference_blockers(make_run(like_card=True)) == reference_blockers(make_run("lora", like_card=True)) == []
    actual = reference_blockers(make_run(like_card=True, **{path: value}))
    assert len(actual) == 1
    assert actual[0].startswith(reason)


def test_every_setting_and_data_fact_is_in_a_table_and_only_the_different_are_marked(make_run: MakeRun) -> None:
    runs = [make_run(seed=1), make_run(seed=2), make_run("lora")]
    differing, shared = build_settings_tables(group_by_seed(runs), with_reference=True)
    assert differing.headings == ["setting or fact", "card", "full", "LoRA"]
    rows = {name: cells for name, *cells in (*differing.rows, *shared.rows)}
    assert len(rows) == len(differing.rows) + len(shared.rows)
    content = make_metadata("full")
    for group, values in content["settings"].items():
        for name in values if isinstance(values, dict) else ():
            assert f"settings.{group}.{name}" in rows
    assert {f"data.{name}" for name in content["data"] if name not in ("train", "val")} <= set(rows)
    assert rows["settings.train.lr"] == ["3e-05", "0.0005", "0.005"]
    assert rows["settings.train.seed"] == ["42", "1 | 2", "42"]
    assert len(rows["data.fingerprint"]) == 1, "nobody knows the card's"
    # run.json of a full run has it, too
    assert rows["settings.lora.rank"] == ["not used", "not used", "8"]


def test_runs_that_differ_in_the_seed_alone_are_one_group(make_run: MakeRun) -> None:
    runs = [make_run(mode, seed=seed) for mode, seed in (("lora", 1), ("full", 1), ("full", 2), ("lora", 2))]
    groups = group_by_seed([*runs, make_run("lora", resolved__lr=1e-3)])
    labels = [(group.label, len(group.runs)) for group in groups]
    assert labels == [("full", 2), ("LoRA (lr 0.005)", 2), ("LoRA (lr 0.001)", 1)]
    lengths = group_by_seed([make_run("lora", settings__train__max_steps=steps) for steps in (16, 48)])
    assert [group.label for group in lengths] == ["LoRA (16 steps)", "LoRA (48 steps)"], "as of a study's rungs"


def test_a_group_label_leaves_out_what_the_data_name_says(make_run: MakeRun) -> None:
    other = {"data__source": "e2e.csv", "data__fingerprint": "ff"}
    rows = {"settings__data__objective": "completion", "data__objective": "completion"}
    labels = [group.label for group in group_by_seed([make_run(), make_run(**other, **rows)])]
    assert labels == ["full (acled-demo)", "full (e2e.csv)"]
    labels = [group.label for group in group_by_seed([make_run(), make_run(**rows), make_run(**other)])]
    assert labels == ["full (acled-demo, blocks)", "full (acled-demo, completion)", "full (e2e.csv, blocks)"]


def test_a_run_whose_data_changed_on_resume_is_incomparable_and_any_change_is_reported(make_run: MakeRun) -> None:
    def resumed(*, like_card: bool = False, **changed: list[Any]) -> Any:
        settings = make_metadata("lora", preset="card" if like_card else "demo")["settings"]
        return make_run("lora", like_card=like_card, resumed={"settings": settings, "changed": changed})

    mixed = resumed(data=["aa", "bb"], lr=[3e-4, 1e-4])
    assert comparison_blockers(make_run(), mixed) == [f"data of {mixed.name} changed on resume"]
    assert reference_blockers(resumed(like_card=True, data=["aa", "bb"])) == ["data changed on resume"]
    assert "lr was changed on resume, from 0.0003 to 0.0001" in mixed.notes
    assert comparison_blockers(make_run(), resumed(lr=[3e-4, 1e-4])) == []
