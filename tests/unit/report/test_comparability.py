"""What may be held against what: each fact that must agree, what is unknown, and the card with its gaps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_runs import make_metadata, make_records, make_reference_like_metadata, write_run_folder

from trainer.config import reference
from trainer.report.comparability import COMPARABILITY_KEYS, comparable_sets, comparison_blockers, reference_blockers
from trainer.report.comparability import compare_metadata as facts_of
from trainer.report.run_data import RunData
from trainer.report.run_folder import read_folder
from trainer.report.seed_groups import group_by_seed


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    count = iter(range(100))

    def build(
        mode: str = "full", like_card: bool = False, changed: dict[str, Any] | None = None, **overrides: Any
    ) -> RunData:
        make_content = make_reference_like_metadata if like_card else make_metadata
        if changed is not None:
            overrides["resumed"] = {"settings": make_content(mode)["settings"], "changed": changed}
        whole = {path: value for path, value in overrides.items() if "__" not in path}
        folder = write_run_folder(
            tmp_path / str(next(count)), make_content(mode, **whole), make_records(make_content(mode), every=5000)
        )
        # Nested values may be missing or odd here, as in runs of other versions: the reader would refuse such a file.
        return dataclasses.replace(read_folder(folder), metadata=make_content(mode, **overrides))

    return build


def test_full_and_lora_on_the_same_data_are_comparable(make_run: Any) -> None:
    assert comparison_blockers(make_run("full"), make_run("lora")) == []


@pytest.mark.parametrize(("name", "path"), COMPARABILITY_KEYS.items())
def test_each_difference_in_data_or_model_makes_two_runs_incomparable(make_run: Any, name: str, path: str) -> None:
    other = make_run("lora", **{path.replace(".", "__"): "another"})
    assert [reason.startswith(f"other {name} (") for reason in comparison_blockers(make_run("full"), other)] == [True]
    assert [[member.mode for member in members] for members in comparable_sets([make_run("full"), other])] == [
        ["full"],
        ["lora"],
    ]


@pytest.mark.parametrize(("name", "path"), COMPARABILITY_KEYS.items())
def test_metadata_missing_in_both_runs_is_no_agreement(make_run: Any, name: str, path: str) -> None:
    unknown = {path.replace(".", "__"): None}
    reasons = comparison_blockers(make_run("full", **unknown), make_run("lora", **unknown))
    assert reasons == ([] if name == "tokenizer" else [f"{name} unknown"])  # rows that came as token ids have none


def test_a_tokenizer_and_ready_token_ids_are_different_tokenizers(make_run: Any) -> None:
    assert comparison_blockers(make_run("full"), make_run("lora", data__tokenizer=None)) == [
        "other tokenizer (one came as token ids)"
    ]


def test_a_run_is_comparable_with_the_reference_only_if_all_known_facts_agree(make_run: Any) -> None:
    assert reference_blockers(make_run("full", like_card=True)) == []
    assert reference_blockers(make_run("lora", like_card=True)) == []


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("data__vocabulary", 50_258, "other tokenizer ("),
        ("data__block_size", 512, "other rows ("),
        ("data__objective", "completion", "other rows ("),
        ("model__name", "gpt2-medium", "other base model ("),
        ("model__parameters", 124_000_000, "other base model ("),
        ("settings__model__init", "random", "other base model ("),
        ("data__train__examples", 13_243, "other data ("),
        ("data__vocabulary", None, "vocabulary of the run unknown"),
        ("data__train__examples", None, "examples of the run unknown"),
    ],
)
def test_each_known_difference_from_the_reference_is_a_reason(
    make_run: Any, path: str, value: Any, reason: str
) -> None:
    actual = reference_blockers(make_run("full", like_card=True, **{path: value}))
    assert len(actual) == 1
    assert actual[0].startswith(reason)


def test_unknown_facts_of_the_reference_are_always_listed() -> None:
    reasons = reference.why_not_comparable(
        data="x", vocabulary=50_257, block_size=1024, objective="blocks", model="gpt2", examples=13_242
    )
    assert reasons == [reference.UNKNOWN_REASON]
    assert all(name in reference.UNKNOWN_REASON for name in reference.UNKNOWN_DATA)


def test_every_setting_and_data_fact_is_in_the_table_and_only_the_different_are_marked(make_run: Any) -> None:
    actual = {
        fact.name: fact
        for fact in facts_of(
            [[make_run("full", seed=1), make_run("full", seed=2)], [make_run("lora")]], with_reference=True
        )
    }
    content = make_metadata("full")
    for group, values in content["settings"].items():
        for name in values if isinstance(values, dict) else ():
            assert f"settings.{group}.{name}" in actual
    assert {f"data.{name}" for name in content["data"] if name not in ("train", "val")} <= set(actual)
    assert not actual["settings.train.lr"].is_same
    assert actual["settings.train.lr"].values == (3e-5, 5e-4, 5e-3)
    assert actual["settings.train.seed"].values == (42, (1, 2), 42)
    assert not actual["settings.train.seed"].is_same
    assert actual["data.fingerprint"].is_same
    assert actual["data.fingerprint"].is_known == (False, True, True)  # nobody knows the card's
    assert actual["settings.lora.rank"].values == ("not used", "not used", 8)  # run.json of a full run has it, too
    assert actual["resolved.adapters_fused"].values[1:] == ("not used", True)


def test_runs_that_differ_in_the_seed_alone_are_one_group(make_run: Any) -> None:
    groups = group_by_seed(
        [
            make_run("lora", seed=1),
            make_run("full", seed=1),
            make_run("full", seed=2),
            make_run("lora", seed=2),
            make_run("lora", resolved__lr=1e-3),
        ]
    )
    assert [(group.label, len(group.runs)) for group in groups] == [
        ("full", 2),
        ("LoRA (lr 0.005)", 2),
        ("LoRA (lr 0.001)", 1),
    ]
    lengths = group_by_seed([make_run("lora", settings__train__max_steps=steps) for steps in (16, 48)])
    assert [group.label for group in lengths] == ["LoRA (16 steps)", "LoRA (48 steps)"], "as of a study's rungs"


def test_a_group_label_leaves_out_what_the_data_name_says(make_run: Any) -> None:
    other = {"data__source": "e2e.csv", "data__fingerprint": "ff"}
    rows = {"settings__data__objective": "completion", "data__objective": "completion"}
    assert [group.label for group in group_by_seed([make_run(), make_run(**other, **rows)])] == [
        "full (acled-demo)",
        "full (e2e.csv)",
    ]
    assert [group.label for group in group_by_seed([make_run(), make_run(**rows), make_run(**other)])] == [
        "full (acled-demo, blocks)",
        "full (acled-demo, completion)",
        "full (e2e.csv, blocks)",
    ]


def test_runs_with_incomplete_metadata_join_no_seed_group(make_run: Any) -> None:
    groups = group_by_seed(
        [make_run("full", seed=1, data__fingerprint=None), make_run("full", seed=2, data__fingerprint=None)]
    )
    assert [len(group.runs) for group in groups] == [1, 1]


def test_a_run_whose_data_changed_on_resume_is_incomparable_and_any_change_is_reported(make_run: Any) -> None:
    mixed = make_run(
        "lora",
        changed={"data": ["aa", "bb"], "lr": [3e-4, 1e-4]},
    )
    assert comparison_blockers(make_run("full"), mixed) == [f"data of {mixed.name} changed on resume"]
    assert reference_blockers(make_run("lora", like_card=True, changed={"data": ["aa", "bb"]})) == [
        "data changed on resume"
    ]
    assert "lr was changed on resume, from 0.0003 to 0.0001" in mixed.notes
    assert comparison_blockers(make_run("full"), make_run("lora", changed={"lr": [3e-4, 1e-4]})) == []
