"""The presets: values of the fields that have no default of their own, and how settings come of them."""

import copy
from collections.abc import Mapping
from typing import Any

from trainer.config.choices import DEMO_DATA, DEMO_MODEL, LORA_LR_FACTOR, PRESETS, Preset
from trainer.config.errors import UserError
from trainer.config.settings import GROUPS, Settings
from trainer.config.text import join_words

CARD_MODELS = ("gpt2", "openai-community/gpt2")


#: {preset: {group: {field: value}}} for --mode full.
PRESET_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    # what `gpt2-acled-t2s` published; AdamW, decay 0 and clip 1.0 are its program's defaults
    "card": {
        "model": {"model": "gpt2"},
        "data": {"data": DEMO_DATA, "objective": "blocks", "block_size": 1024},
        "train": {"global_batch": 2, "eval_batch": 2, "lr": 3e-5},
    },
    # the embedded model and data, small enough for two CPU cores
    "demo": {
        "model": {"model": DEMO_MODEL},
        "data": {"data": DEMO_DATA, "block_size": 256},
        "train": {"global_batch": 8, "eval_batch": 16, "lr": 5e-4},
    },
    # any other model, a guess until --find-lr or study.py has looked. 2e-5 and a cosine after 3 % of warm-up: Alpaca
    # and most full fine-tunings of 1 to 10 B parameters since; ten times that with adapters, and 16 examples a step:
    # QLoRA (arXiv 2305.14314, table 9)
    "finetune": {
        "data": {"data": DEMO_DATA, "block_size": 0},
        "train": {"global_batch": 16, "eval_batch": 8, "lr": 2e-5, "schedule": "cosine", "warmup_ratio": 0.03},
    },
}


def choose_preset(model: str | None) -> Preset:
    """The preset that fits a model where none was asked for; None: the embedded one."""
    if model in (None, DEMO_MODEL):
        return "demo"
    return "card" if model in CARD_MODELS else "finetune"


def resolve(
    mode: str, preset: str, overrides: Mapping[str, Mapping[str, Any]], overridden: tuple[str, ...] = ()
) -> Settings:
    """Preset, then mode, then what the user gave (`{group: {field: value}}`); each later one wins.

    The mode changes one number only, the learning rate, and only where the user gave none; a test holds it there.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: expected {join_words(PRESETS)}")
    values = copy.deepcopy(PRESET_VALUES[preset])
    if preset == "finetune" and "model" not in overrides.get("model", {}):
        raise UserError("--preset finetune without --model: expected --model HUB_ID or --model FOLDER")
    if mode == "lora":
        values["train"]["lr"] *= LORA_LR_FACTOR
    if "warmup_steps" in overrides.get("train", {}):  # two words for one thing: the user's counts
        values["train"].pop("warmup_ratio", None)
    groups: dict[str, Any] = {
        name: settings_class(**{**values.get(name, {}), **overrides.get(name, {})})
        for name, settings_class in GROUPS.items()
    }
    return Settings(mode=mode, preset=preset, overridden=overridden, **groups)  # type: ignore[arg-type]


def preset_notes(settings: Settings) -> list[str]:
    """What a preset means for this model, where that is worth a line: where its learning rate comes from."""
    notes = []
    if settings.preset == "finetune" and "--block-size" not in settings.overridden:
        notes.append(f"block size {settings.data.block_size}: from the lengths of the data; --block-size sets another")
    if "--lr" in settings.overridden:
        return notes
    advice = "the same command with --find-lr suggests one for this model and data, launch/study.py compares several"
    if settings.preset == "finetune":
        return [*notes, f"learning rate {settings.train.lr:g}: a guess from the literature; {advice}"]
    if settings.preset == "demo" and settings.model.model != DEMO_MODEL:
        return [f"learning rate {settings.train.lr:g}: of --preset demo, made for {DEMO_MODEL}; {advice}"]
    return []
