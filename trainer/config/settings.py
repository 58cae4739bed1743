"""The settings of one run: pydantic dataclasses whose fields carry the flag, the help and the unit.

The command line is generated from these fields (`trainer/config/cli.py`). No loss depends on the groups engine and
output beyond rounding. What depends on the ZeRO stage is checked in `trainer.training.run_plan`. Nothing here imports
torch: a plan can be checked and a report made on a machine without it.
"""

import dataclasses
import glob
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from trainer.config.batch_config import BatchConfig
from trainer.config.choices import (
    DS_CONFIG_NAMES,
    EIGHT_BIT_OPTIMIZERS,
    MAX_HANG_TIMEOUT_SECONDS,
    MAX_NUM_SAMPLES,
    Execution,
    Init,
    Mode,
    Objective,
    Optimizer,
    Precision,
    Preset,
    Schedule,
    UnusableRecords,
    WandbMode,
)
from trainer.config.errors import UserError
from trainer.config.fields import (
    MAX_INT,
    Accepts,
    Interval,
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
    Switch,
    Text,
    WandbProject,
    is_name,
    option,
    settings_class,
)


@settings_class
class ModelSettings:
    """Which weights training starts from."""

    model: Name = option(help="hub id or folder of a causal LM, or the embedded `demo-base`")
    init: Init = option("pretrained", help="start from its weights, or from random ones")
    quant: Literal["nf4", "fp4", "int8"] | None = option(
        None, help="with --mode lora: hold the frozen layers in 4 bits (nf4, fp4) or 8 (int8) (default: in float32)"
    )
    quant_double: Switch = option(False, help="with nf4 and fp4: hold their scales in 8 bits too")
    dropout: Probability | None = option(
        None, help="every dropout of the model (GPT-2 has three) (default: the model's own)"
    )

    def __post_init__(self) -> None:
        if self.quant_double and self.quant not in ("nf4", "fp4"):
            raise UserError("--quant-double: expected with --quant nf4 or fp4, whose scales it is about")


@settings_class
class LoraSettings:
    """The shape of the adapters; only used with --mode lora."""

    rank: PositiveInt = option(8, help="inner dimension of each adapter", flag="--lora-rank")
    alpha: PositiveFloat = option(16.0, help="adapters are scaled by alpha / rank", flag="--lora-alpha")
    dropout: Probability = option(0.0, help="dropout before each adapter", flag="--lora-dropout")
    target_modules: Annotated[tuple[Text, ...], Accepts("layer names separated by commas", all, strict=False)] = option(
        (),
        help="layers to adapt, comma separated: attention, mlp, all, a layer's name or its end, or a pattern "
        "(*.h.0.*) (default: all, that is every Conv1D and Linear but the output layer)",
        flag="--lora-target-modules",
    )
    adapter: Literal["lora", "dora", "rslora", "pissa"] = option(
        "lora",
        help="lora; dora: magnitude and direction apart; rslora: scaled by alpha / sqrt(rank); "
        "pissa: begins with the base's largest singular vectors",
    )
    plus_ratio: PositiveFloat = option(
        1.0, help="LoRA+: learning rate of the B matrices over that of all else", flag="--lora-plus-ratio"
    )
    modules_to_save: Annotated[
        tuple[Literal["wte", "lm_head", "layernorm", "bias"], ...],
        Accepts("wte, lm_head, layernorm or bias, separated by commas", strict=False),
    ] = option(
        (), help="weights of the base to train beside the adapters, comma separated: wte, lm_head, layernorm, bias"
    )


@settings_class
class DataSettings:
    """Which records are read and how they become rows of token ids."""

    data: Annotated[str, Accepts("a file, folder, glob, hub id or acled-demo", is_name)] = option(
        help="CSV, TSV, JSONL, Parquet, Arrow, text (.gz, .zst), folder, glob, hub id (ID:CONFIG) or acled-demo"
    )
    val_data: Text | None = option(
        None, help="validation records, in the same forms (default: a share of --data is split off)"
    )
    val_fraction: Share = option(0.1, help="share split off for validation, by hash of the record")
    test_data: Text | None = option(None, help="test records, evaluated once, at the weights that are exported")
    test_fraction: Annotated[float, Accepts("0 (none) or a share between 0 and 1", ge=0, lt=1)] = option(
        0.0, help="share split off for a test, likewise; it is taken from the training records"
    )
    retain_data: Text | None = option(
        None, help="text of the base's kind (`demo-base`: the embedded one's): shows forgetting"
    )
    split_by: Text | None = option(
        None, help="column whose equal values stay in one split and count as one in an interval"
    )
    prompt: Text | None = option(None, help="template of a record's prompt, for instance '{mr}'")
    completion: Text | None = option(None, help="template of the text to train on, for instance '{ref}'")
    format: Literal["messages", "conversations", "prompt-completion", "alpaca", "text", "acled", "input_ids"] | None = (
        option(None, help="what the columns mean (default: recognised from their names, see --dry-run)")
    )
    chat_template: Text | None = option(None, help="Jinja file that writes conversations (default: the model's own)")
    objective: Objective | None = option(
        None,
        help="blocks: all texts joined and cut; completion: one record a row, loss on the completion only (default: "
        "completion for chat, prompt-completion and alpaca, else blocks)",
    )
    unusable_records: UnusableRecords = option(
        "refuse",
        help="conversations whose target tokens cannot be proven or lie beyond the block size: refuse, or drop them",
    )
    block_size: Annotated[
        int,
        Accepts("2 tokens or more, or 0: from the data", lambda value: value == 0 or value >= 2, le=MAX_INT),
    ] = option(
        help="length of a block, longest row with --objective completion; 0: from the lengths of the data",
        unit="tokens",
    )
    packing: Switch = option(False, help="completion and chat: several examples in a row, hidden from one another")
    shuffle: Switch = option(True, help="take the examples in the order of the data", flag="--no-shuffle")

    def __post_init__(self) -> None:
        most = 1 - (self.val_fraction if self.val_data is None else 0)
        if self.test_fraction >= most:
            raise UserError(
                f"--test-fraction {self.test_fraction:g}: expected a share under {most:g}, beside validation"
            )
        if self.test_data is not None and self.test_fraction:
            raise UserError(f"--test-fraction {self.test_fraction:g} and --test-data: expected one of them")
        if self.prompt is not None and self.completion is None:
            raise UserError(
                f"--prompt {self.prompt} without --completion: expected --completion with the text to train on, "
                "for instance --completion '{notes}'"
            )


@settings_class
class TrainSettings:
    """The optimisation: how much, how fast, in which batches."""

    epochs: PositiveFloat = option(3.0, help="passes over the training set")
    max_steps: PositiveInt | None = option(None, help="end here instead; the schedule ends here too", unit="steps")
    global_batch: PositiveInt = option(help="examples per optimizer step over all ranks", unit="examples")
    micro_batch: PositiveInt | None = option(
        None, help="examples in one forward on one rank (default: global batch / ranks)", unit="examples"
    )
    eval_batch: PositiveInt = option(
        help="examples in one evaluation forward on one rank; changes no number", unit="examples"
    )
    lr: PositiveFloat = option(help="peak learning rate; with --mode lora the default is 10 times the preset's")
    warmup_steps: NonNegativeInt = option(0, help="linear warm-up before the schedule", unit="steps")
    warmup_ratio: Annotated[float, Accepts("a share from 0 up to 1", ge=0, lt=1)] = option(
        0.0, help="the same as a share of all steps, rounded up"
    )
    schedule: Schedule = option(
        "linear",
        help="after the warm-up: linear or half a cosine to --min-lr, constant, or wsd: constant, then half a cosine "
        "over the last tenth of the steps",
    )
    min_lr: NonNegativeFloat = option(0.0, help="learning rate at which the schedule ends")
    weight_decay: NonNegativeFloat = option(0.0, help="AdamW's decoupled weight decay")
    max_grad_norm: Annotated[float, Accepts("0 (off) or a number above it", ge=0, allow_inf_nan=False)] = option(
        1.0, help="largest norm of the global gradient; 0: no clipping"
    )
    seed: Annotated[int, Accepts("a whole number from 0 to 4294967295", ge=0, lt=2**32)] = option(
        42, help="seed of initial weights, data order and dropout"
    )
    optim: Optimizer = option(
        "adamw_fused",
        help="adamw_fused: torch's AdamW in one kernel; adamw: its plain one, same formula, other rounding; "
        "adamw8bit, paged_adamw8bit: bitsandbytes', moments in 8 bits, not divided by ZeRO",
    )
    early_stop: (
        Annotated[
            str,
            Accepts(
                "PATIENCE (evaluations, from 1) or PATIENCE:MIN_DELTA (nats, from 0), for instance 3:0.01",
                re.compile(r"[1-9]\d*(:\d+\.?\d*(e-?\d+)?)?").fullmatch,
            ),
        ]
        | None
    ) = option(
        None,
        help="PATIENCE or PATIENCE:MIN_DELTA: end the run after so many evaluations in a row whose validation loss is "
        "not more than MIN_DELTA nats below the lowest before them (default: never)",
    )
    beta1: Probability = option(0.9, help="AdamW's decay of the first moment", flag="--adam-beta1")
    beta2: Probability = option(0.999, help="AdamW's decay of the second moment", flag="--adam-beta2")
    epsilon: PositiveFloat = option(1e-8, help="AdamW's addend of the denominator", flag="--adam-epsilon")

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise UserError(f"--warmup-ratio {self.warmup_ratio}: not with --warmup-steps {self.warmup_steps}")
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr}: expected at most --lr {self.lr:g}")
        if self.min_lr and self.schedule == "constant":
            raise UserError(f"--min-lr {self.min_lr}: expected with --schedule linear, cosine or wsd")

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of the warm-up of a run of so many, as transformers counts a share of them."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)

    @property
    def patience(self) -> int | None:
        """Evaluations in a row without a lower loss after which the run ends; None: it goes on to its last step."""
        return int(self.early_stop.partition(":")[0]) if self.early_stop else None

    @property
    def min_delta(self) -> float:
        """By how much a validation loss must lie below the lowest before it, in nats, to count as lower."""
        return float((self.early_stop or "").partition(":")[2] or 0)

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

    ds_config: Text | None = option(
        None,
        help=f"ZeRO file: {', '.join(DS_CONFIG_NAMES)}, or a path (default: chosen automatically, see --dry-run)",
    )
    precision: Precision | None = option(
        None, help="arithmetic of forward and backward (default: bf16 on a GPU that has it, else fp32)"
    )
    hang_timeout: Annotated[
        float, Accepts(f"seconds from 5 to {MAX_HANG_TIMEOUT_SECONDS}", ge=5, le=MAX_HANG_TIMEOUT_SECONDS)
    ] = option(600.0, help="end the run where no rank moves for so long, and name who hangs", unit="seconds")
    grace: Annotated[float, Accepts("seconds from 1", ge=1, allow_inf_nan=False)] = option(
        60.0, help="end the run where it has not saved and ended so long after a signal", unit="seconds"
    )
    execution: Execution = option(
        "auto",
        help="eager: one operation at a time; graphs: CUDA graphs, each compared once with the eager step; auto: CUDA "
        "graphs on a GPU under ZeRO 0, eager elsewhere",
    )
    activation_checkpointing: Switch = option(
        False, help="keep each block's input only and compute it again in backward: less memory, a third more work"
    )


@settings_class
class OutputSettings:
    """What a run leaves and where."""

    eval_every: Interval = option("epoch", help="evaluate every so many steps, every `epoch`, or `never` in between")
    save_every: Interval = option(
        "epoch", help="save a checkpoint every so many steps, every `epoch`, or `never` in between"
    )
    save_total_limit: PositiveInt = option(2, help="newest checkpoints to keep, beside the best one")
    output_dir: Name | None = option(None, help="run folder (default: runs/<run name>)")
    wandb: WandbMode | None = option(None, help="Weights & Biases (default: online where logged in, else offline)")
    wandb_project: WandbProject | None = option(
        None, help="project that runs to be compared share (default: WANDB_PROJECT, or gpt2-full-vs-lora)"
    )
    run_name: (
        Annotated[
            str,
            Accepts(
                "up to 128 letters, digits and . _ + -, not dots alone", re.compile(r"(?!\.+$)[\w.+-]{1,128}").fullmatch
            ),
        ]
        | None
    ) = option(None, help="name of the run (default: <mode or adapter>-<data>)")
    report_to: Annotated[tuple[Literal["tensorboard"], ...], Accepts("tensorboard", strict=False)] = option(
        (), help="where the rows go beside metrics.jsonl and W&B, comma separated: tensorboard"
    )
    profile: PositiveInt | None = option(
        None, help="profile so many steps of rank 0 into the run folder's profile/", unit="steps"
    )
    export: Literal["last", "best", "none"] = option(
        "last",
        help="weights that go into the exported folder: of the last step, or of the checkpoint with the lowest "
        "validation loss (then one is saved at each evaluation that is the lowest so far); none: nothing is exported, "
        "and test records stay unseen",
    )
    num_samples: Annotated[int, Accepts(f"a whole number from 0 to {MAX_NUM_SAMPLES}", ge=0, le=MAX_NUM_SAMPLES)] = (
        option(2, help=f"validation prompts completed at each evaluation, at most {MAX_NUM_SAMPLES}; 0: none")
    )
    score_samples: Switch = option(
        False, help="score completions of validation prompts at each evaluation: exact match, BLEU, chrF, ROUGE-L"
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
        lora, quant, optim, precision = self.lora, self.model.quant, self.train.optim, self.engine.precision
        if self.engine.execution == "graphs" and (blocker := graph_blocker(self)):
            raise UserError(f"--execution graphs: not with {blocker}; expected auto or eager")
        if optim in EIGHT_BIT_OPTIMIZERS and precision == "fp16":
            raise UserError(f"--optim {optim}: not with --precision fp16, which needs ZeRO 1 or more")
        if self.train.early_stop and self.output.eval_every == "never":
            raise UserError(
                f"--early-stop {self.train.early_stop} with --eval-every never: there is no evaluation to stop at; "
                "pass --eval-every epoch or a number of steps"
            )
        if self.mode == "full":
            if quant:
                raise UserError(f"--quant {quant}: a quantised weight has no gradient; expected --mode lora")
            for flag, value, default in (
                ("--adapter", lora.adapter, "lora"),
                ("--lora-plus-ratio", lora.plus_ratio, 1.0),
                ("--modules-to-save", ",".join(lora.modules_to_save), ""),
            ):
                if value != default:
                    raise UserError(f"{flag} {value}: is about adapters; expected --mode lora")
        elif quant:
            if lora.adapter == "pissa":
                raise UserError(
                    f"--quant {quant}: pissa changes the base by less than {quant} rounds; expected lora, dora or "
                    "rslora"
                )
            if quant == "int8" and lora.adapter == "dora":
                raise UserError(
                    "--quant int8: dora takes the norms of its layers, by which peft loses their scales; use nf4"
                )
            if "bias" in lora.modules_to_save:
                raise UserError(
                    f"--modules-to-save bias: bitsandbytes rounds the biases of {quant} layers; leave one of them out"
                )
            if precision == "fp16":
                raise UserError(
                    f"--precision fp16: rounds the packed weights of --quant {quant}; expected bf16 or fp32"
                )

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
    if settings.engine.precision == "fp16":  # needs DeepSpeed's loss scale, and so its own steps
        return "--precision fp16"
    return "--activation-checkpointing" if settings.engine.activation_checkpointing else ""
