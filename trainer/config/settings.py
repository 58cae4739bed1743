"""The settings of one run: one table, from which flags, help, checks and presets follow.

Each field has its type, its help and its default, or its value in each preset. No loss depends on the groups engine and
output beyond rounding. What depends on the ZeRO stage is checked in `trainer.training.run_plan`. Nothing here imports
torch: a plan can be checked and a report made on a machine without it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from trainer.config import choices
from trainer.config.batch_config import BatchConfig
from trainer.config.choices import DEMO_DATA, DEMO_MODEL, GPT2_NAMES, MAX_HANG_TIMEOUT_SECONDS, MAX_NUM_SAMPLES
from trainer.config.errors import UserError
from trainer.config.fields import (
    A_PATH,
    Accepts,
    NonNegativeFloat,
    NonNegativeInt,
    PeftConfig,
    PositiveFloat,
    PositiveInt,
    Switch,
    Text,
    UserPath,
    WandbProject,
    flag_of,
    option,
    settings_class,
)
from trainer.config.files import NAMED_PATH, data_name, expand_user_path, name_val_sets

# Presets: `card` is what gpt2-acled-t2s published (AdamW, decay 0 and clip 1.0 are its program's defaults), `gpt2` its
# rate and block size in steps of 8 examples, transformers' default, `demo` the embedded model and data, small enough
# for two CPU cores. `finetune` is a guess for any other model, until study.py has looked: 2e-5 and a cosine after 3 %
# of warm-up are Alpaca's and most full fine-tunings' of 1 to 10 B parameters since; ten times that with adapters, and
# 16 examples a step, are QLoRA's (arXiv 2305.14314, table 9).


def _expand_named_path(text: str) -> str:
    """NAME=PATH, or a path alone, as `expand_user_path` leaves the path."""
    prefix = f"{match[1]}=" if (match := NAMED_PATH.fullmatch(text)) else ""
    return prefix + expand_user_path(text.removeprefix(prefix))


Share = Annotated[float, Accepts("a share between 0 and 1", gt=0, lt=1)]
ShareOrZero = Annotated[float, Accepts("a share from 0 up to 1", ge=0, lt=1)]
Name = Annotated[str, Accepts("a name", pattern=r"^[^\x00]+$")]
NamedPath = Annotated[str, Accepts(A_PATH, _expand_named_path)]
Interval = Annotated[str, Accepts("a number of steps, epoch or never", pattern=r"^(epoch|never|[1-9][0-9]*)$")]
WandbTag = Annotated[str, Accepts("tags of 1 to 64 characters", min_length=1, max_length=64)]
RunName = Annotated[
    str,
    Accepts("up to 128 letters, digits, . _ + -, not only dots", pattern=r"^[\w.+-]*[\w+-][\w.+-]*$", max_length=128),
]
Seed = Annotated[int, Accepts("a whole number from 0 to 4294967295", ge=0, lt=2**32)]
Scorer = Annotated[str, Accepts(choices.SCORERS, choices.check_scorer)]
NumSamples = Annotated[int, Accepts(f"a whole number from 0 to {MAX_NUM_SAMPLES}", ge=0, le=MAX_NUM_SAMPLES)]
HangTimeout = Annotated[float, Accepts("seconds from 5 to 1800", ge=5, le=MAX_HANG_TIMEOUT_SECONDS)]
Grace = Annotated[float, Accepts("seconds from 1", ge=1, allow_inf_nan=False)]


def _refuse(*rules: tuple[Any, str]) -> None:
    if problems := [text for is_broken, text in rules if is_broken]:
        raise UserError(*problems)


@settings_class
class ModelSettings:
    """Which weights training starts from."""

    model: UserPath = option("hub id, folder or demo-base, the built-in toy", demo=DEMO_MODEL, card="gpt2", gpt2="gpt2")
    init: choices.Init = option("start from its weights, or from random ones", "pretrained")
    quant: Literal["nf4", "int8"] | None = option("with --mode lora: hold frozen layers in 4 bits or 8", None)
    quant_double: Switch = option("with nf4: hold its scales in 8 bits too", False)
    dropout: ShareOrZero | None = option("every dropout of the model; GPT-2 has three (default: the model's own)", None)


@settings_class
class LoraSettings:
    """The shape of the adapters; only used with --mode lora."""

    rank: PositiveInt = option("inner dimension of each adapter", 8, flag="--lora-rank")
    alpha: PositiveFloat = option("adapters are scaled by alpha / rank", 16.0, flag="--lora-alpha")
    dropout: ShareOrZero = option("dropout before each adapter", 0.0, flag="--lora-dropout")
    target_modules: tuple[Name, ...] = option("all, or (ends of) names of layers", (), flag="--lora-target-modules")
    adapter: choices.Adapter = option(
        "dora: magnitude and direction apart; rslora: alpha / sqrt(rank); pissa: starts from singular vectors", "lora"
    )
    modules_to_save: tuple[Literal["wte", "lm_head", "layernorm", "bias"], ...] = option(
        "weights of the base to train as well, separated by commas: wte, lm_head, layernorm, bias", ()
    )
    peft_config: PeftConfig | None = option("any other method of peft, by its adapter_config.json", None)

    @property
    def kind(self) -> str:
        peft_type = json.loads(self.peft_config)["peft_type"].lower() if self.peft_config else "lora"
        return self.adapter if peft_type == "lora" else str(peft_type)


@settings_class
class DataSettings:
    """Which records are read and how they become rows of token ids."""

    data: UserPath = option(
        "CSV, TSV, JSONL, Parquet, Arrow, text, folder, glob, hub id (ID:CONFIG) or acled-demo; several "
        "with weights, as in A=0.7 B=0.3: an epoch has as many examples as all of them, 70 percent of them from A",
        DEMO_DATA,
    )
    max_samples: PositiveInt | None = option("read the first so many records of --data only (default: all)", None)
    val_data: tuple[NamedPath, ...] = option(
        "validation records, likewise (default: split off from --data); may be repeated, as PATH or NAME=PATH: the "
        "first set decides, each of the others has its own row and curve",
        (),
        is_repeated=True,
    )
    val_fraction: Share = option("share split off for validation, by hash of the record", 0.1)
    test_data: UserPath | None = option("test records, evaluated once, at the weights that are exported", None)
    test_fraction: ShareOrZero = option("share of the training records split off for a test, likewise", 0.0)
    allow_leakage: Switch = option("train even if half or more of the validation records are training records", False)
    retain_data: UserPath | None = option(
        "text or records like the base's: shows forgetting (demo-base: its text)", None
    )
    split_by: Text | None = option("column: equal values stay in one split and count as one in an interval", None)
    prompt: Text | None = option("template of a record's prompt, for instance '{mr}'", None)
    completion: Text | None = option("template of the text to train on, for instance '{ref}'", None)
    chat_template: UserPath | None = option("Jinja file that writes conversations (default: the model's own)", None)
    objective: choices.Objective | None = option(
        "blocks: all texts joined and cut; completion: one record a row, loss on the completion only (default: "
        "completion for chat, prompt-completion, alpaca and --prompt, else blocks)",
        None,
        card="blocks",
    )
    unusable_records: Literal["refuse", "drop"] = option("conversations that cannot be trained on", "refuse")
    block_size: NonNegativeInt = option("most tokens a row; 0: by the data", demo=256, card=1024, gpt2=1024, finetune=0)
    packing: Switch = option("completion and chat: several examples in a row, hidden from one another", False)

    def __post_init__(self) -> None:
        most, test_fraction = 1 - (0 if self.val_data else self.val_fraction), f"--test-fraction {self.test_fraction:g}"
        name_val_sets(self.val_data)  # refuses two of one name
        _refuse(
            (self.block_size == 1, "--block-size 1: expected 2 tokens or more, or 0: from the data"),
            (self.test_fraction >= most, f"{test_fraction}: expected a share under {most:g}, beside validation"),
            (self.test_data and self.test_fraction, f"{test_fraction} and --test-data: expected one of them"),
            (self.prompt is not None and self.completion is None, f"--prompt {self.prompt}: expected --completion too"),
        )


@settings_class
class TrainSettings:
    """The optimisation: how much, how fast, in which batches."""

    epochs: PositiveFloat = option("passes over the training set", 3.0)
    max_steps: PositiveInt | None = option("optimizer steps in place of --epochs; the schedule ends here too", None)
    global_batch: PositiveInt = option("examples per step over all ranks", demo=8, card=2, gpt2=8, finetune=16)
    micro_batch: PositiveInt | None = option("examples of a forward on one rank (default: global batch / ranks)", None)
    eval_batch: PositiveInt = option("the same in evaluations; changes no number", demo=16, card=2, gpt2=8, finetune=8)
    lr: PositiveFloat = option("peak learning rate; for LoRA tenfold", demo=5e-4, card=3e-5, gpt2=3e-5, finetune=2e-5)
    warmup_steps: NonNegativeInt = option("steps of linear warm-up before the schedule", 0)
    warmup_ratio: ShareOrZero = option("warm-up as a share of all steps, rounded up", 0.0, finetune=0.03)
    schedule: choices.Schedule = option("linear or half a cosine to --min-lr, or constant", "linear", finetune="cosine")
    min_lr: NonNegativeFloat = option("learning rate at which the schedule ends", 0.0)
    weight_decay: NonNegativeFloat = option("AdamW's decoupled weight decay", 0.0)
    max_grad_norm: NonNegativeFloat = option("largest norm of the global gradient; 0: no clipping", 1.0)
    label_smoothing: ShareOrZero = option("share of each label spread over the vocabulary, in training only", 0.0)
    seed: Seed = option("seed of initial weights, data order and dropout", 42)
    optim: choices.Optimizer = option("AdamW of torch or of bitsandbytes in 8 bits, not divided by ZeRO", "adamw_fused")
    early_stop: PositiveInt | None = option("end after so many evaluations in a row without a lower loss", None)
    beta1: ShareOrZero = option("AdamW's decay of the first moment", 0.9, flag="--adam-beta1")
    beta2: ShareOrZero = option("AdamW's decay of the second moment", 0.999, flag="--adam-beta2")
    epsilon: PositiveFloat = option("AdamW's addend of the denominator", 1e-8, flag="--adam-epsilon")

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of the warm-up of a run of so many, as transformers counts a share of them."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)

    def batch(self, world_size: int) -> BatchConfig:
        """How the global batch is divided over the ranks; UserError where it does not divide."""
        return BatchConfig.divide(self.global_batch, self.micro_batch, world_size)

    def total_steps(self, num_examples: int) -> int:
        """Optimizer steps of the whole run over so many training examples, as Hugging Face's Trainer counts them."""
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(num_examples))

    def steps_per_epoch(self, num_examples: int) -> int:
        """Optimizer steps per pass; the last one of a pass may hold fewer examples."""
        return math.ceil(num_examples / self.global_batch)


@settings_class
class EngineSettings:
    """How the work is divided over ranks and in which number format it is done."""

    ds_config: UserPath | None = option(
        f"ZeRO file: {', '.join(choices.DS_CONFIG_NAMES)}, or a path (default: chosen, see --dry-run)", None
    )
    precision: choices.Precision | None = option("arithmetic (default: bf16 on a GPU that has it, else fp32)", None)
    hang_timeout: HangTimeout = option("end the run if no rank moves for so many seconds, and name who hangs", 600.0)
    grace: Grace = option("end the run if it has not saved and ended so many seconds after a signal", 60.0)
    execution: Literal["auto", "eager", "graphs"] = option("graphs: CUDA graphs; auto: on a GPU under ZeRO 0", "auto")
    activation_checkpointing: Switch = option("compute blocks again in backward: less memory, more work", False)


@settings_class
class OutputSettings:
    """What a run leaves and where."""

    eval_every: Interval = option("evaluate every so many steps, every `epoch`, or `never` in between", "epoch")
    save_every: Interval = option("save a checkpoint as often, or `never` before the end", "epoch")
    save_total_limit: PositiveInt = option("newest checkpoints to keep, beside the best one", 2)
    output_dir: UserPath | None = option("run folder (default: runs/<run name>)", None)
    wandb: choices.WandbMode | None = option("Weights & Biases (default: online where logged in, else offline)", None)
    wandb_project: WandbProject | None = option("its project (default: WANDB_PROJECT, or gpt2-full-vs-lora)", None)
    wandb_group: Name | None = option("its group (default: WANDB_RUN_GROUP, or full-vs-lora-<data>)", None)
    wandb_tags: tuple[WandbTag, ...] = option("its tags, beside mode, model, data and those of WANDB_TAGS", ())
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = option(
        "tensorboard: write the rows for TensorBoard too; wandb: as without it (see --wandb)", ()
    )
    run_name: RunName | None = option("name of the run (default: <mode or adapter>-<data>)", None)
    export: Literal["last", "best", "none"] = option("weights to export; none: test records stay unseen too", "last")
    base_from: UserPath | None = option("folder of runs with an evaluation of this base, to take it from there", None)
    num_samples: NumSamples = option("validation prompts completed at each evaluation; 0: none", 2)
    score: tuple[Scorer, ...] = option(
        f"score a greedy text for each test record at the end, 0 to 1; repeatable: {choices.SCORERS}; launch/README.md "
        "says what each compares with the record's completion",
        (),
        is_repeated=True,
    )
    score_tokens: PositiveInt | None = option("most tokens of such a text (default: longest completion + 8)", None)


GROUPS: dict[str, Any] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "engine": EngineSettings,
    "output": OutputSettings,
}


@settings_class
class Settings:
    """One run, whole."""

    mode: choices.Mode
    preset: choices.Preset
    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    train: TrainSettings
    engine: EngineSettings
    output: OutputSettings
    overridden: tuple[Text, ...] = ()  #: flags that the user gave, which override the preset

    def __post_init__(self) -> None:
        """Refuse settings that are right alone and exclude one another."""
        lora, train, quant, precision = self.lora, self.train, self.model.quant, self.engine.precision
        is_full, is_fp16 = self.mode == "full", precision == "fp16"
        packed = None if is_full else quant
        to_save, for_adapters = ",".join(lora.modules_to_save), "is about adapters; expected --mode lora"
        warmup_steps, warmup_ratio = train.warmup_steps, train.warmup_ratio
        is_never, blocker = self.output.eval_every == "never", self.graph_blocker
        is_8_bit, is_constant = train.optim in choices.EIGHT_BIT_OPTIMIZERS, train.schedule == "constant"
        shape_flags = self.shape_flag_problems("--peft-config") if "--peft-config" in self.overridden else []
        _refuse(
            (self.model.quant_double and quant != "nf4", "--quant-double: expected with --quant nf4"),
            (warmup_steps and warmup_ratio, f"--warmup-ratio {warmup_ratio}: not with --warmup-steps {warmup_steps}"),
            (train.min_lr > train.lr, f"--min-lr {train.min_lr}: expected at most --lr {train.lr:g}"),
            (train.min_lr and is_constant, f"--min-lr {train.min_lr}: not with --schedule constant"),
            (train.early_stop and is_never, f"--early-stop {train.early_stop}: not with --eval-every never"),
            (blocker and self.engine.execution == "graphs", f"--execution graphs: not with {blocker}; expected auto"),
            (is_8_bit and is_fp16, f"--optim {train.optim}: not with --precision fp16, which needs ZeRO 1 or more"),
            *((True, problem) for problem in shape_flags),
            (is_full and quant, f"--quant {quant}: a quantised weight has no gradient; expected --mode lora"),
            (is_full and lora.adapter != "lora", f"--adapter {lora.adapter}: {for_adapters}"),
            (is_full and lora.peft_config, f"--peft-config: {for_adapters}"),
            (is_full and to_save, f"--modules-to-save {to_save}: {for_adapters}"),
            (packed and lora.adapter == "pissa", f"--quant {quant}: rounds off what --adapter pissa changes"),
            (packed == "int8" and lora.adapter == "dora", "--quant int8: not with --adapter dora; expected nf4"),
            (packed and "bias" in lora.modules_to_save, f"--modules-to-save bias: not with --quant {quant}"),
            (packed and is_fp16, f"--precision fp16: not with --quant {quant}; expected bf16 or fp32"),
        )

    def shape_flag_problems(self, source: str) -> list[str]:
        """A line where flags give a shape to adapters that `source` has given one."""
        flags = {flag_of(field) for field in dataclasses.fields(LoraSettings)} - {"--peft-config"}
        given = [flag for flag in self.overridden if flag in flags]
        return [f"{', '.join(given)}: not with {source}, which says what is trained; leave it out"] if given else []

    @property
    def graph_blocker(self) -> str:
        """The flag with which steps cannot be recorded as CUDA graphs; empty where they can."""
        if self.model.quant:
            return "--quant"
        if self.engine.precision == "fp16":  # needs DeepSpeed's loss scale, and so its own steps
            return "--precision fp16"
        return "--activation-checkpointing" if self.engine.activation_checkpointing else ""

    @property
    def method(self) -> str:
        """What is trained on what, in one word: `full`, the adapter's name, or `lora-nf4` on a quantised base."""
        name = self.mode if self.mode == "full" else self.lora.kind
        return f"{name}-{self.model.quant}" if self.model.quant else name

    @property
    def run_name(self) -> str:
        """The name of the run: given, or made of method and data."""
        return self.output.run_name or f"{self.method}-{data_name(self.data.data)}"[:128]

    @property
    def run_folder(self) -> str:
        """The run folder: given, or runs/<run name>."""
        return self.output.output_dir or f"runs/{self.run_name}"

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """The values of the flags that the user gave: {group: {field: value}}."""
        return {
            name: {
                field.name: getattr(getattr(self, name), field.name)
                for field in dataclasses.fields(group)
                if flag_of(field) in self.overridden
            }
            for name, group in GROUPS.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values for run.json; `Settings(**values)` reads them back."""
        return dataclasses.asdict(self)

    def resumed_with(self, now: "Settings") -> "Settings":
        """The settings of a run that is resumed: those it has, and over them those given now, and the run folder."""
        changes = {**now.overrides, "output": {**now.overrides["output"], "output_dir": now.run_folder}}
        groups = {name: dataclasses.replace(getattr(self, name), **changes[name]) for name in GROUPS}
        flags = tuple(dict.fromkeys((*self.overridden, *now.overridden)))
        return dataclasses.replace(self, overridden=flags, **groups)

    def fixed_on_resume(self) -> dict[str, Any]:
        """What may not change when a run is resumed, by field name: all that its numbers are a function of."""
        values = self.as_dict()
        return {key: values[group][name] for key, (group, name) in self._fixed_fields().items()}

    def as_trained(self, fixed: Mapping[str, Any]) -> "Settings":
        """These settings with `fixed_on_resume` of a checkpoint, but for where the base model lies now."""
        values = self.as_dict()
        for key, (group, name) in self._fixed_fields().items():
            if key in fixed and key != "model":
                values[group][name] = fixed[key]
        return Settings(**values)

    def _fixed_fields(self) -> dict[str, tuple[str, str]]:
        mutable = {"micro_batch", "eval_batch", "allow_leakage"}
        mutable |= {"data", "val_data", "test_data", "retain_data"}  # by fingerprint
        places: dict[str, tuple[str, str]] = {}
        for group in ("model", "data", "train", *(("lora",) if self.mode == "lora" else ())):
            for name in (field.name for field in dataclasses.fields(GROUPS[group])):
                if name not in mutable:
                    places[f"{group}_{name}" if name in places else name] = group, name  # lora_dropout beside dropout
        return places


def resolve(
    mode: str, preset: str | None, overrides: Mapping[str, Mapping[str, Any]], overridden: tuple[str, ...] = ()
) -> Settings:
    """Preset, then mode, then what the user gave (`{group: {field: value}}`); each later one wins. `preset`: None takes
    the one that fits the model; without a model that is the demo's for the embedded data and GPT-2's for all others.
    The mode changes one number only, the learning rate, and only where the user gave none; a test holds it there."""
    model = overrides.get("model", {}).get("model")
    if preset is None:
        is_own_data = overrides.get("data", {}).get("data", DEMO_DATA) != DEMO_DATA
        chosen = model or ("gpt2" if is_own_data else DEMO_MODEL)
        preset = "demo" if chosen == DEMO_MODEL else "gpt2" if chosen in GPT2_NAMES else "finetune"
    if preset == "finetune" and model is None:
        raise UserError("--preset finetune without --model: expected --model HUB_ID or --model FOLDER")
    settings, problems = dict[str, Any](), list[str]()
    for name, group in GROUPS.items():
        presets = {field.name: field.metadata["presets"] for field in dataclasses.fields(group)}
        values = {key: by_name[preset] for key, by_name in presets.items() if preset in by_name}
        given = overrides.get(name, {})
        if name == "train" and mode == "lora":
            values["lr"] *= choices.LORA_LR_FACTOR
        if "warmup_steps" in given:  # two words for one thing: the user's counts
            values.pop("warmup_ratio", None)
        try:
            settings[name] = group(**{**values, **given})
        except UserError as error:
            problems += error.args
    if problems:
        raise UserError(*problems)
    return Settings(mode=mode, preset=preset, overridden=overridden, **settings)  # type: ignore[arg-type]
