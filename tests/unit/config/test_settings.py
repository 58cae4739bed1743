"""Every number of a run: the presets, what a mode may change, the checks, the batch sum, and reading settings back."""

import dataclasses
import json
import math

import pytest

from trainer.config import reference
from trainer.config.choices import LORA_LR_FACTOR, PRESETS
from trainer.config.errors import UserError
from trainer.config.fields import flag_of
from trainer.config.settings import GROUPS, Settings, resolve


def differing(first: Settings, second: Settings) -> set[str]:
    """The settings of two runs that are not the same, as `group.name`."""
    values, others = first.as_dict(), second.as_dict()
    return {
        f"{group}.{name}" for group in GROUPS for name in values[group] if values[group][name] != others[group][name]
    }


# --- presets and modes ---


def test_the_card_preset_is_exactly_what_the_card_published():
    card = resolve("full", "card", {})
    published = dict(reference.SETTINGS)
    for name in ("schedule", "optimizer", "dropout", "trainable_parameters"):  # the program's and the model's
        published.pop(name)
    assert card.mode == published.pop("mode")
    assert card.model.model == published.pop("model")
    assert {name: getattr(card.train, name) for name in published} == published
    assert (card.data.objective, card.data.block_size) == ("blocks", 1024)
    assert (card.model.init, card.train.max_steps) == ("pretrained", None)


@pytest.mark.parametrize("preset", PRESETS)
def test_full_and_lora_settings_differ_in_the_learning_rate_and_in_nothing_else(preset):
    """This is the fairness of the comparison: a new difference must be argued for here."""
    full, lora = (resolve(mode, preset, {"model": {"model": "m"}}) for mode in ("full", "lora"))
    assert differing(full, lora) == {"train.lr"}
    assert lora.train.lr == LORA_LR_FACTOR * full.train.lr
    assert LORA_LR_FACTOR == 10.0


# --- the batch sum ---


def test_a_global_batch_is_divided_or_refused_with_the_product_and_the_remedy():
    for micro, size, accumulation in ((None, 4, 1), (2, 2, 2)):
        batch = resolve("full", "demo", {"train": {"global_batch": 8, "micro_batch": micro}}).train.batch(2)
        assert str(batch) == f"{size} micro-batch x {accumulation} accumulation x 2 ranks = 8 global batch"
    train = resolve("full", "card", {"train": {"global_batch": 8, "micro_batch": 3}}).train
    line = r"--global-batch 8: expected a multiple of 3 \(micro-batch 3 x 1 rank\); try --global-batch 9"
    with pytest.raises(UserError, match=f"^{line}$"):
        train.batch(1)


def test_steps_are_counted_as_hugging_faces_trainer_counts_them():
    train = resolve("full", "card", {}).train
    for examples in reference.EXAMPLES_PER_EPOCH:
        assert train.steps_per_epoch(examples) == reference.STEPS_PER_EPOCH
        assert train.total_steps(examples) == reference.CURVE[-1].step
    assert resolve("full", "card", {"train": {"epochs": 0.5}}).train.total_steps(7) == 2  # half of 4 steps
    assert resolve("full", "card", {"train": {"max_steps": 5}}).train.total_steps(10_000) == 5


# --- checks ---


OUT_OF_RANGE = {
    "lora.alpha": [math.inf],
    "lora.target_modules": [("c_attn", "")],
    "data.block_size": [1],
    "data.prompt": ["{x}"],
    "train.epochs": [0.0, math.nan],
    "train.seed": [2**32],
    "engine.hang_timeout": [4.0],
    "output.eval_every": ["-3", "often"],
    "output.wandb_project": ["a/b", "a\nb", "a" * 129],
    "output.run_name": ["a/b", "", "..", "a" * 129],
    "output.score": [["acc"], ["regex:"], ["judge.py"], ["judge.py:f()"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_a_value_out_of_range_names_flag_and_what_is_accepted_in_one_line(name, value):
    group, field_name = name.split(".")
    (flag,) = (flag_of(field) for field in dataclasses.fields(GROUPS[group]) if field.name == field_name)
    with pytest.raises(UserError, match=f"^{flag} .*: expected ") as caught:
        resolve("full", "demo", {group: {field_name: value}})
    assert "\n" not in str(caught.value)


# --- names and folders ---


def test_a_run_is_named_by_mode_and_data_and_lies_under_runs_unless_told_otherwise():
    for data, expected in (("/some/where/events 2024.csv", "lora-events-2024"), ("parts/*.jsonl", "lora-data")):
        settings = resolve("lora", "demo", {"data": {"data": data}})
        assert (settings.run_name, settings.run_folder) == (expected, f"runs/{expected}")
    assert resolve("lora", "demo", {"output": {"run_name": "a.1"}}).run_folder == "runs/a.1"
    assert resolve("lora", "demo", {"output": {"run_name": "a.1", "output_dir": "/x"}}).run_folder == "/x"


# --- on resume ---


def test_flags_on_resume_override_those_of_the_run_and_the_preset_does_not_come_back():
    began = resolve("lora", "card", {"train": {"lr": 1e-4}}, ("--lr",))
    now = began.resumed_with(resolve("lora", "demo", {"train": {"eval_batch": 9}}, ("--eval-batch",)))
    assert differing(now, began) == {"train.eval_batch", "output.output_dir"}
    assert (now.train.eval_batch, now.preset, now.overridden) == (9, "card", ("--lr", "--eval-batch"))


def test_a_checkpoints_settings_stand_before_those_of_an_edited_run_json():
    trained = resolve("lora", "card", {"lora": {"alpha": 16.0, "target_modules": ("c_attn",)}})
    fixed = json.loads(json.dumps(trained.fixed_on_resume()))
    edited = resolve(
        "lora", "card", {"lora": {"alpha": 64.0, "rank": 2}, "train": {"lr": 1.0}, "model": {"model": "m"}}
    )
    assert edited.as_trained(fixed) == dataclasses.replace(
        edited, model=dataclasses.replace(trained.model, model="m"), train=trained.train, lora=trained.lora
    )


def test_what_is_fixed_on_resume_is_all_that_the_numbers_depend_on():
    names = set(resolve("lora", "card", {}).fixed_on_resume())
    numbers = "lr seed global_batch epochs max_steps rank alpha target_modules model objective dropout lora_dropout "
    numbers += "early_stop"
    assert set(numbers.split()) <= names
    assert not {"micro_batch", "eval_batch", "ds_config", "output_dir", "save_total_limit", "wandb"} & names
    assert "rank" not in resolve("full", "card", {}).fixed_on_resume(), "a full run has no adapters"
