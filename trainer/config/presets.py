"""The presets: values of the fields that have no default of their own, and how settings come of them."""

from collections.abc import Mapping
from typing import Any

from trainer.config.choices import DEMO_DATA, DEMO_MODEL, LORA_LR_FACTOR, MODES, PRESETS
from trainer.config.options import check_range, join_words
from trainer.config.settings import GROUPS, Settings


def card() -> dict[str, dict[str, Any]]:
    """The published settings of `gpt2-acled-t2s`; AdamW, decay 0 and clip 1.0 are its program's defaults."""
    return {
        "model": {"model": "gpt2"},
        "data": {"data": DEMO_DATA, "objective": "blocks", "block_size": 1024},
        "train": {"global_batch": 2, "eval_batch": 2, "lr": 3e-5},
    }


def demo() -> dict[str, dict[str, Any]]:
    """The embedded model and data, small enough for two CPU cores."""
    return {
        "model": {"model": DEMO_MODEL},
        "data": {"data": DEMO_DATA, "block_size": 256},
        "train": {"global_batch": 8, "eval_batch": 16, "lr": 5e-4},
    }


def preset_defaults(preset: str) -> dict[str, dict[str, Any]]:
    """The values of a preset that have no default of their own, for --mode full."""
    check_range(preset in PRESETS, "--preset", preset, join_words(PRESETS))
    return {"card": card, "demo": demo}[preset]()


def resolve(
    mode: str, preset: str, overrides: Mapping[str, Mapping[str, Any]], overridden: tuple[str, ...] = ()
) -> Settings:
    """Preset, then mode, then what the user gave (`{group: {field: value}}`); each later one wins.

    The mode changes one number only, the learning rate, and only where the user gave none; a test holds it there.
    """
    check_range(mode in MODES, "--mode", mode, join_words(MODES))
    values = preset_defaults(preset)
    if mode == "lora":
        values["train"]["lr"] *= LORA_LR_FACTOR
    groups: dict[str, Any] = {
        name: settings_class(**{**values.get(name, {}), **overrides.get(name, {})})
        for name, settings_class in GROUPS.items()
    }
    return Settings(mode=mode, preset=preset, overridden=overridden, **groups)  # type: ignore[arg-type]
