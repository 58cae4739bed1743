"""Every number of a run: the presets, what a mode may change, the checks, the batch sum, and reading settings back."""

import dataclasses
import json
import math

import pytest

from trainer.config import choices, reference
from trainer.config.choices import LORA_LR_FACTOR, PRESETS
from trainer.config.errors import UserError
from trainer.config.fields import flag_of
from trainer.config.presets import resolve
from trainer.config.settings import GROUPS, Settings, apply_overrides, fields_fixed_on_resume


def flatten_settings(settings: Settings) -> dict[str, object]:
    return {f"{g}.{name}": value for g in GROUPS for name, value in settings.as_dict()[g].items()}


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
    assert card.model.init == "pretrained"
    assert card.train.max_steps is None


@pytest.mark.parametrize("preset", PRESETS)
def test_full_and_lora_settings_differ_in_the_learning_rate_and_in_nothing_else(preset):
    """This is the fairness of the comparison: a new difference must be argued for here."""
    full, lora = (flatten_settings(resolve(mode, preset, {"model": {"model": "m"}})) for mode in ("full", "lora"))
    assert {name for name in full if full[name] != lora[name]} == {"train.lr"}
    assert lora["train.lr"] == LORA_LR_FACTOR * full["train.lr"]
    assert LORA_LR_FACTOR == 10.0


@pytest.mark.parametrize("mode", choices.MODES)
def test_an_explicit_learning_rate_overrides_the_default_of_every_mode(mode):
    assert resolve(mode, "card", {"train": {"lr": 1e-4}}).train.lr == 1e-4


def test_lora_defaults_are_rank_8_alpha_16_without_dropout_on_every_layer():
    lora = resolve("lora", "demo", {}).lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (8, 16.0, 0.0, ())


def test_overrides_win_over_the_preset_and_leave_the_rest():
    base, overridden = (
        flatten_settings(resolve("full", "card", overrides)) for overrides in ({}, {"train": {"seed": 7}})
    )
    assert {name for name in base if base[name] != overridden[name]} == {"train.seed"}


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve("full", "demo", {}).train.lr = 1.0  # type: ignore[misc]


# --- the batch sum ---


@pytest.mark.parametrize(
    ("global_batch", "micro", "ranks", "expected"),
    [
        (8, None, 1, (8, 1)),
        (8, None, 2, (4, 1)),
        (8, 2, 2, (2, 2)),
        (6, 1, 3, (1, 2)),
        (2, None, 2, (1, 1)),
        (2, 1, 1, (1, 2)),
        (1, None, 1, (1, 1)),
        (3, None, 3, (1, 1)),
    ],
)
def test_gradient_accumulation_is_global_batch_over_micro_batch_and_ranks(global_batch, micro, ranks, expected):
    train = resolve("full", "demo", {"train": {"global_batch": global_batch, "micro_batch": micro}}).train
    batch = train.batch(ranks)
    assert (batch.micro_batch_size, batch.gradient_accumulation_steps) == expected
    assert batch.global_batch == global_batch


def test_a_batch_config_prints_as_a_product():
    assert str(resolve("full", "card", {}).train.batch(2)) == (
        "1 micro-batch x 1 accumulation x 2 ranks = 2 global batch"
    )


@pytest.mark.parametrize(
    ("sizes", "ranks", "message"),
    [
        ({}, 3, ("2 examples / 3 ranks is not whole", "use 2 ranks", "--global-batch 3")),
        ({}, 8, ("2 examples / 8 ranks is not whole", "use 2 ranks", "--global-batch 8")),
        ({"global_batch": 7}, 2, ("7 examples / 2 ranks is not whole", "use 1 rank,", "--global-batch 8")),
        ({"global_batch": 8, "micro_batch": 3}, 1, ("8 is not micro-batch 3 x 1 rank ", "one pass is 3")),
        ({"global_batch": 8, "micro_batch": 8}, 2, ("8 is not micro-batch 8 x 2 ranks", "one pass is 16")),
    ],
)
def test_an_indivisible_global_batch_is_an_error_with_the_product_and_the_remedy(sizes, ranks, message):
    with pytest.raises(UserError) as caught:
        resolve("full", "card", {"train": sizes}).train.batch(ranks)
    for part in message:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_steps_are_counted_as_hugging_faces_trainer_counts_them():
    train = resolve("full", "card", {}).train
    for examples in reference.EXAMPLES_PER_EPOCH:
        assert train.steps_per_epoch(examples) == reference.STEPS_PER_EPOCH
        assert train.total_steps(examples) == reference.CURVE[-1].step
    assert resolve("full", "card", {"train": {"epochs": 0.5}}).train.total_steps(7) == 2  # half of 4 steps
    assert resolve("full", "card", {"train": {"max_steps": 5}}).train.total_steps(10_000) == 5


# --- checks ---


OUT_OF_RANGE = {
    "model.init": ["scratch"],
    "lora.rank": [0],
    "lora.alpha": [0.0, math.inf],
    "lora.dropout": [1.0],
    "lora.target_modules": [("c_attn", "")],
    "data.data": [""],
    "data.val_fraction": [0.0, 1.0],
    "data.objective": ["chat"],
    "data.block_size": [1],
    "data.prompt": ["{x}"],
    "train.epochs": [0.0, math.inf, math.nan],
    "train.max_steps": [0],
    "train.global_batch": [0],
    "train.micro_batch": [0],
    "train.eval_batch": [0],
    "train.lr": [0.0, -1.0, math.nan],
    "train.warmup_steps": [-1],
    "train.warmup_ratio": [1.0],
    "train.schedule": ["polynomial"],
    "train.min_lr": [-1e-9, 1.0],
    "train.beta2": [1.0],
    "train.epsilon": [0.0],
    "train.weight_decay": [-0.1],
    "train.max_grad_norm": [-1.0, math.nan],
    "train.seed": [-1, 2**32],
    "engine.precision": ["tf32"],
    "output.eval_every": ["0", "often"],
    "output.save_every": ["-3"],
    "output.save_total_limit": [0],
    "output.wandb": ["on"],
    "output.run_name": ["a/b", ""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUT_OF_RANGE for value in OUT_OF_RANGE[name]])
def test_a_value_out_of_range_names_flag_and_value_in_one_line(name, value):
    group, field_name = name.split(".")
    (flag,) = (flag_of(field) for field in dataclasses.fields(GROUPS[group]) if field.name == field_name)
    with pytest.raises(UserError) as caught:
        resolve("full", "demo", {group: {field_name: value}})
    message = str(caught.value)
    assert message.startswith(flag)
    assert "\n" not in message
    assert "expected" in message or "say with" in message


@pytest.mark.parametrize(
    ("train", "answer"),
    [
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "--warmup-ratio 0.1: not with --warmup-steps 5"),
        ({"min_lr": 1e-5, "schedule": "constant"}, "--min-lr 1e-05: expected with --schedule linear, cosine or wsd"),
        ({"min_lr": 1e-3, "lr": 1e-4}, "--min-lr 0.001: expected at most --lr 0.0001"),
    ],
)
def test_schedule_settings_that_exclude_one_another_are_one_line(train, answer):
    with pytest.raises(UserError) as caught:
        resolve("full", "demo", {"train": train})
    assert str(caught.value) == answer


def test_an_unknown_mode_or_preset_is_refused_with_the_choices():
    with pytest.raises(UserError, match="--mode qlora: expected full or lora"):
        resolve("qlora", "demo", {})
    with pytest.raises(UserError, match="--preset gpt3: expected demo, card or finetune"):
        resolve("full", "gpt3", {})


# --- names and folders ---


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("acled-demo", "lora-acled-demo"),
        ("/some/where/events 2024.csv", "lora-events-2024"),
        ("some/folder/", "lora-folder"),
        ("parts/*.jsonl", "lora-data"),
        ("org/data-set", "lora-data-set"),
    ],
)
def test_a_run_is_named_by_mode_and_data_and_lies_under_runs(data, expected):
    settings = resolve("lora", "demo", {"data": {"data": data}})
    assert settings.run_name == expected
    assert settings.run_folder == f"runs/{expected}"


def test_an_explicit_run_name_and_output_dir_are_used():
    assert resolve("lora", "demo", {"output": {"run_name": "a.1"}}).run_folder == "runs/a.1"
    assert resolve("lora", "demo", {"output": {"run_name": "a.1", "output_dir": "/x"}}).run_folder == "/x"


# --- back from run.json, and on resume ---


@pytest.mark.parametrize("mode", choices.MODES)
def test_settings_come_back_from_json_as_they_were(mode):
    overrides = {"lora": {"target_modules": ("c_attn", "c_fc")}, "train": {"lr": 1 / 3}, "data": {"shuffle": False}}
    settings = resolve(mode, "card", overrides, ("--lr", "--no-shuffle"))
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_flags_on_resume_override_those_of_the_run():
    began = resolve("lora", "card", {"train": {"lr": 1e-4}}, ("--lr",))
    now = apply_overrides(began, {"train": {"eval_batch": 9}}, ("--eval-batch",))
    assert now.train.eval_batch == 9
    assert now.train.lr == 1e-4, "the preset does not come back over what the run began with"
    assert now.overridden == ("--lr", "--eval-batch")
    assert apply_overrides(began, {}, ()) == began


def test_settings_with_overrides_are_validated_too():
    with pytest.raises(UserError, match="--lr -1"):
        apply_overrides(resolve("full", "card", {}), {"train": {"lr": -1.0}}, ("--lr",))


def test_the_fields_fixed_on_resume_are_all_that_the_numbers_depend_on():
    names = set(fields_fixed_on_resume(resolve("lora", "card", {})))
    numbers = "lr seed global_batch epochs max_steps rank alpha target_modules model objective dropout lora_dropout "
    numbers += "early_stop"
    assert set(numbers.split()) <= names
    assert not {"micro_batch", "eval_batch", "ds_config", "output_dir", "save_total_limit", "wandb"} & names
    assert "rank" not in fields_fixed_on_resume(resolve("full", "card", {})), "a full run has no adapters"
