"""The settings of one run, whole: their groups, what must agree among them, and their way to run.json and back.

What depends on the ZeRO stage is checked in `trainer.training.run_plan`.
"""

import dataclasses
import glob
import re
from collections.abc import Mapping
from typing import Any

from trainer.config.choices import EIGHT_BIT_OPTIMIZERS, Mode, Preset
from trainer.config.errors import UserError
from trainer.config.fields import Text, settings_class
from trainer.config.schema import (
    DataSettings,
    EngineSettings,
    LoraSettings,
    ModelSettings,
    OutputSettings,
    TrainSettings,
)

GROUPS: dict[str, Any] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "engine": EngineSettings,
    "output": OutputSettings,
}
MUTABLE_ON_RESUME = (  # data: by fingerprint
    "data.data",
    "data.val_data",
    "data.test_data",
    "data.retain_data",
    "train.micro_batch",
    "train.eval_batch",
)


@settings_class
class Settings:
    """One run, whole."""

    mode: Mode
    preset: Preset
    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    train: TrainSettings
    engine: EngineSettings
    output: OutputSettings
    overridden: tuple[Text, ...] = ()  #: flags that the user gave, which override the preset

    def __post_init__(self) -> None:
        _validate_combinations(self)

    @property
    def method(self) -> str:
        """What is trained on what, in one word: `full`, the adapter's name, or `lora-nf4` on a quantised base."""
        name = self.mode if self.mode == "full" else self.lora.adapter
        return f"{name}-{self.model.quant}" if self.model.quant else name

    @property
    def run_name(self) -> str:
        """The name of the run: given, or made of method and data."""
        if self.output.run_name:
            return self.output.run_name
        data_path = self.data.data.rstrip("/").rsplit("/", 1)[-1]
        data_stem = "data" if glob.has_magic(self.data.data) else re.sub(r"\.\w+$", "", data_path)
        return f"{self.method}-{re.sub(r'[^A-Za-z0-9_.+-]', '-', data_stem) or 'data'}"[:128]

    @property
    def run_folder(self) -> str:
        """The run folder: given, or runs/<run name>."""
        return self.output.output_dir or f"runs/{self.run_name}"

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values for run.json; `from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that `as_dict` wrote (JSON turns tuples into lists)."""
        return cls(**values)


def apply_overrides(
    saved_settings: Settings, overrides: Mapping[str, Mapping[str, Any]], overridden: tuple[str, ...]
) -> Settings:
    """The settings of a run that is resumed: those it began with, and the flags given now over them."""
    groups = {name: dataclasses.replace(getattr(saved_settings, name), **overrides.get(name, {})) for name in GROUPS}
    flags = tuple(dict.fromkeys((*saved_settings.overridden, *overridden)))
    return dataclasses.replace(saved_settings, overridden=flags, **groups)


def fields_fixed_on_resume(settings: Settings) -> dict[str, Any]:
    """What may not change when a run is resumed, by field name: all that its numbers are a function of."""
    values: dict[str, Any] = {}
    for group in ("model", "data", "train", *(("lora",) if settings.mode == "lora" else ())):
        for name, value in dataclasses.asdict(getattr(settings, group)).items():
            if f"{group}.{name}" not in MUTABLE_ON_RESUME:
                values[f"{group}_{name}" if name in values else name] = value  # lora_dropout beside dropout
    return values


def graph_blocker(settings: Settings) -> str:
    """The flag with which steps cannot be recorded as CUDA graphs; empty where they can."""
    if settings.model.quant:
        return "--quant"
    return "--activation-checkpointing" if settings.engine.activation_checkpointing else ""


def _validate_combinations(settings: Settings) -> None:
    """UserError for the first combination that cannot be trained."""
    if settings.engine.execution == "graphs" and (blocker := graph_blocker(settings)):
        raise UserError(f"--execution graphs: not with {blocker}; expected auto or eager")
    if settings.train.optim in EIGHT_BIT_OPTIMIZERS and settings.engine.precision == "fp16":
        raise UserError(f"--optim {settings.train.optim}: not with --precision fp16, which needs ZeRO 1 or more")
    if settings.train.early_stop and settings.output.eval_every == "never":
        raise UserError(
            f"--early-stop {settings.train.early_stop} with --eval-every never: there is no evaluation to stop at; "
            "pass --eval-every epoch or a number of steps"
        )
    if settings.mode == "full":
        _validate_full(settings)
    else:
        _validate_lora(settings)


def _validate_full(settings: Settings) -> None:
    lora = settings.lora
    if settings.model.quant:
        raise UserError(f"--quant {settings.model.quant}: a quantised weight has no gradient; expected --mode lora")
    for flag, value, default in (
        ("--adapter", lora.adapter, "lora"),
        ("--lora-plus-ratio", lora.plus_ratio, 1.0),
        ("--modules-to-save", ",".join(lora.modules_to_save), ""),
    ):
        if value != default:
            raise UserError(f"{flag} {value}: is about adapters; expected --mode lora")


def _validate_lora(settings: Settings) -> None:
    lora, quant = settings.lora, settings.model.quant
    if not quant:
        return
    if lora.adapter == "pissa":
        raise UserError(
            f"--quant {quant}: pissa changes the base by less than {quant} rounds; expected lora, dora or rslora"
        )
    if quant == "int8" and lora.adapter == "dora":
        raise UserError("--quant int8: dora takes the norms of its layers, by which peft loses their scales; use nf4")
    if "bias" in lora.modules_to_save:
        raise UserError(
            f"--modules-to-save bias: bitsandbytes rounds the biases of {quant} layers; leave one of them out"
        )
    if settings.engine.precision == "fp16":
        raise UserError(f"--precision fp16: rounds the packed weights of --quant {quant}; expected bf16 or fp32")
