"""Every number of a run, once: frozen dataclasses, presets, checks and derived values.

The command line is generated from the fields below (`trainer/config/cli.py`), so a flag cannot drift from its
field. Nothing here imports torch: a plan can be checked and a report made on a machine without it.
"""

import dataclasses
import glob
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config.errors import UserError

MODES = ("full", "lora")
PRESETS = ("demo", "card")
PRECISIONS = ("fp32", "bf16", "fp16")
EXTRA_LOGGERS = ("tensorboard", "trackio")  # second sinks, each behind an extra of its name
ADAPTERS = ("lora", "dora", "rslora", "pissa")
MODULES_TO_SAVE = ("wte", "lm_head", "layernorm", "bias")  # what may be trained beside the adapters
QUANTIZATIONS = ("nf4", "fp4", "int8")
OPTIMIZERS = ("adamw_fused", "adamw", "adamw8bit", "paged_adamw8bit")
EIGHT_BIT_OPTIMIZERS = ("adamw8bit", "paged_adamw8bit")
EXECUTIONS = ("auto", "eager", "graphs", "compile")
DS_CONFIG_NAMES = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
MAX_HANG_TIMEOUT_SECONDS = 1800  # seconds; the groups that DeepSpeed makes for itself give up then, and cannot be told
MAX_NUM_SAMPLES = 32  # validation texts that prepared data keep, and that --score-samples scores
LORA_LR_FACTOR = 10.0  # the best LoRA rate is about 10x the best full rate ("LoRA Without Regret", 2025)
DEMO_MODEL = "demo-base"  # the small GPT-2 that this project ships, see trainer/model/demo/README.md
DEMO_DATA = "acled-demo"  # the synthetic events of trainer/data/demo.py


def option(
    default: Any = dataclasses.MISSING, *, flag: str, help: str, unit: str = "", choices: tuple[str, ...] = ()
) -> Any:
    """One field together with what `--help` says of it; `unit` is printed behind the default."""
    return field(default=default, metadata={"flag": flag, "help": help, "unit": unit, "choices": choices})


def check_range(is_accepted: bool, flag: str, value: object, accepted: str) -> None:
    """Refuse `value` in one line that names the flag, the value and what would be accepted."""
    if not is_accepted:
        raise UserError(f"{flag} {value}: expected {accepted}")


def _check_interval(flag: str, value: str) -> None:
    check_range(
        value in ("epoch", "never") or (value.isdigit() and int(value) > 0),
        flag,
        value,
        "a number of steps, `epoch` or `never`",
    )


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which weights training starts from."""

    model: str = option(flag="--model", help="hub id or folder of a causal LM, or the embedded `demo-base`")
    init: str = option(
        "pretrained",
        flag="--init",
        help="start from its weights, or from random ones",
        choices=("pretrained", "random"),
    )
    quant: str | None = option(
        None,
        flag="--quant",
        help="with --mode lora: hold the frozen layers in 4 bits (nf4, fp4) or 8 (int8); left out: in float32",
        choices=QUANTIZATIONS,
    )
    quant_double: bool = option(False, flag="--quant-double", help="with nf4 and fp4: hold their scales in 8 bits too")
    dropout: float | None = option(
        None, flag="--dropout", help="every dropout of the model (GPT-2 has three); left out: the model's own"
    )

    def __post_init__(self) -> None:
        check_range(self.init in ("pretrained", "random"), "--init", self.init, "pretrained or random")
        check_range(self.quant in (None, *QUANTIZATIONS), "--quant", self.quant, ", ".join(QUANTIZATIONS))
        if self.quant_double and self.quant not in ("nf4", "fp4"):
            raise UserError("--quant-double: expected with --quant nf4 or fp4, whose scales it is about")
        check_range(
            self.dropout is None or 0 <= self.dropout < 1, "--dropout", self.dropout, "a probability from 0 up to 1"
        )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The shape of the adapters; only looked at with --mode lora."""

    rank: int = option(8, flag="--lora-rank", help="inner dimension of each adapter")
    alpha: float = option(16.0, flag="--lora-alpha", help="adapters are scaled by alpha / rank")
    dropout: float = option(0.0, flag="--lora-dropout", help="dropout before each adapter")
    target_modules: tuple[str, ...] = option(
        (),
        flag="--lora-target-modules",
        help="layers to adapt, comma separated: attention, mlp, all, a layer's name or its end, or a pattern "
        "(*.h.0.*); left out: all, that is every Conv1D and Linear but the output layer",
    )
    adapter: str = option(
        "lora",
        flag="--adapter",
        help="lora; dora: magnitude and direction apart; rslora: scaled by alpha / sqrt(rank); "
        "pissa: begins with the base's largest singular vectors",
        choices=ADAPTERS,
    )
    plus_ratio: float = option(
        1.0, flag="--lora-plus-ratio", help="LoRA+: learning rate of the B matrices over that of all else"
    )
    modules_to_save: tuple[str, ...] = option(
        (),
        flag="--modules-to-save",
        help=f"weights of the base to train beside the adapters, comma separated: {', '.join(MODULES_TO_SAVE)}",
    )

    def __post_init__(self) -> None:
        check_range(self.rank >= 1, "--lora-rank", self.rank, "a whole number from 1")
        check_range(0 < self.alpha < math.inf, "--lora-alpha", self.alpha, "a number above 0")
        check_range(0 <= self.dropout < 1, "--lora-dropout", self.dropout, "a probability from 0 up to 1")
        check_range(
            all(self.target_modules),
            "--lora-target-modules",
            ",".join(self.target_modules),
            "layer names separated by commas",
        )
        check_range(self.adapter in ADAPTERS, "--adapter", self.adapter, ", ".join(ADAPTERS))
        check_range(0 < self.plus_ratio < math.inf, "--lora-plus-ratio", self.plus_ratio, "a number above 0")
        for name in self.modules_to_save:
            check_range(name in MODULES_TO_SAVE, "--modules-to-save", name, ", ".join(MODULES_TO_SAVE))


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which records are read and how they become rows of token ids."""

    data: str = option(
        flag="--data", help="CSV, TSV, JSONL, Parquet or text file, folder, glob, hub id, or the embedded `acled-demo`"
    )
    val_data: str | None = option(
        None, flag="--val-data", help="validation records, in the same forms; left out: split off --data"
    )
    val_fraction: float = option(
        0.1, flag="--val-fraction", help="share split off for validation, by hash of the record"
    )
    prompt: str | None = option(None, flag="--prompt", help="template of a record's prompt, for instance '{mr}'")
    completion: str | None = option(
        None, flag="--completion", help="template of the text to be learnt, for instance '{ref}'"
    )
    objective: str = option(
        "blocks",
        flag="--objective",
        help="blocks: all texts joined and cut; completion: one record a row, loss on the completion only",
        choices=("blocks", "completion"),
    )
    block_size: int = option(
        flag="--block-size", help="length of a block, longest row with --objective completion", unit="tokens"
    )
    shuffle: bool = option(True, flag="--no-shuffle", help="take the examples in the order of the data")

    def __post_init__(self) -> None:
        check_range(bool(self.data), "--data", "''", "a file, folder, glob, hub id or acled-demo")
        check_range(0 < self.val_fraction < 1, "--val-fraction", self.val_fraction, "a share between 0 and 1")
        check_range(self.objective in ("blocks", "completion"), "--objective", self.objective, "blocks or completion")
        check_range(self.block_size >= 2, "--block-size", self.block_size, "2 tokens or more")
        if self.prompt is not None and self.completion is None:
            raise UserError(
                "--prompt without --completion: say with --completion which text is to be learnt, "
                "for instance --completion '{notes}'"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The optimisation: how much, how fast, in which batches."""

    epochs: float = option(3.0, flag="--epochs", help="passes over the training set")
    max_steps: int | None = option(
        None, flag="--max-steps", help="end here instead; the schedule ends here too", unit="steps"
    )
    global_batch: int = option(
        flag="--global-batch", help="examples per optimizer step over all ranks", unit="examples"
    )
    micro_batch: int | None = option(
        None,
        flag="--micro-batch",
        help="examples in one forward on one rank; left out: global batch / ranks",
        unit="examples",
    )
    eval_batch: int = option(
        flag="--eval-batch", help="examples in one evaluation forward on one rank; changes no number", unit="examples"
    )
    lr: float = option(flag="--lr", help="peak learning rate; left out: the preset's, times 10 with --mode lora")
    warmup_steps: int = option(
        0, flag="--warmup-steps", help="linear warm-up before the linear decay to zero", unit="steps"
    )
    weight_decay: float = option(0.0, flag="--weight-decay", help="AdamW's decoupled weight decay")
    max_grad_norm: float = option(
        1.0, flag="--max-grad-norm", help="largest norm of the global gradient; 0: no clipping"
    )
    seed: int = option(42, flag="--seed", help="seed of initial weights, data order and dropout")
    optim: str = option(
        "adamw_fused",
        flag="--optim",
        help="adamw_fused: torch's AdamW in one kernel; adamw: its plain one, same formula, other rounding; "
        "adamw8bit, paged_adamw8bit: bitsandbytes', moments in 8 bits, not divided by ZeRO",
        choices=OPTIMIZERS,
    )
    early_stop: str | None = option(
        None,
        flag="--early-stop",
        help="PATIENCE or PATIENCE:MIN_DELTA: end the run after so many evaluations in a row whose validation loss is "
        "not more than MIN_DELTA nats below the lowest before them; left out: never",
    )
    beta1: float = 0.9  #: AdamW's decay of the first moment
    beta2: float = 0.999  #: AdamW's decay of the second moment
    epsilon: float = 1e-8  #: AdamW's epsilon

    def __post_init__(self) -> None:
        check_range(0 < self.epochs < math.inf, "--epochs", self.epochs, "a number above 0")
        check_range(
            self.max_steps is None or self.max_steps >= 1, "--max-steps", self.max_steps, "a whole number from 1"
        )
        check_range(self.global_batch >= 1, "--global-batch", self.global_batch, "a whole number from 1")
        check_range(
            self.micro_batch is None or self.micro_batch >= 1,
            "--micro-batch",
            self.micro_batch,
            "a whole number from 1",
        )
        check_range(self.eval_batch >= 1, "--eval-batch", self.eval_batch, "a whole number from 1")
        check_range(0 < self.lr < math.inf, "--lr", self.lr, "a number above 0")
        check_range(self.warmup_steps >= 0, "--warmup-steps", self.warmup_steps, "a whole number from 0")
        check_range(0 <= self.weight_decay < math.inf, "--weight-decay", self.weight_decay, "0 or a number above it")
        check_range(
            0 <= self.max_grad_norm < math.inf, "--max-grad-norm", self.max_grad_norm, "0 (off) or a number above it"
        )
        check_range(0 <= self.seed < 2**32, "--seed", self.seed, "a whole number from 0 to 4294967295")
        check_range(self.optim in OPTIMIZERS, "--optim", self.optim, ", ".join(OPTIMIZERS))
        match = re.fullmatch(r"([1-9]\d*)(?::(\d+\.?\d*(?:e-?\d+)?))?", self.early_stop or "1")
        accepted = "PATIENCE (evaluations, from 1) or PATIENCE:MIN_DELTA (nats, from 0), for instance 3:0.01"
        check_range(match is not None, "--early-stop", self.early_stop, accepted)

    @property
    def patience(self) -> int | None:
        """Evaluations in a row without a lower loss after which the run ends; None: it goes on to its last step."""
        return int(self.early_stop.partition(":")[0]) if self.early_stop else None

    @property
    def min_delta(self) -> float:
        """By how much a validation loss must lie below the lowest before it, in nats, to count as lower."""
        return float((self.early_stop or "").partition(":")[2] or 0)

    def batch(self, world_size: int) -> "BatchConfig":
        """How the global batch is divided over `ranks`; a remainder is an error that prints the sum."""
        if self.micro_batch is None and self.global_batch % world_size:
            num_ranks = max(n for n in range(1, world_size + 1) if self.global_batch % n == 0)
            raise UserError(
                f"--global-batch {self.global_batch}: {self.global_batch} examples / {world_size} ranks is not whole; "
                f"use {_format_ranks(num_ranks)}, or pass --global-batch "
                f"{math.ceil(self.global_batch / world_size) * world_size}"
            )
        micro_batch_size = self.micro_batch or self.global_batch // world_size
        if self.global_batch % (micro_batch_size * world_size):
            raise UserError(
                f"--global-batch {self.global_batch}: {self.global_batch} is not micro-batch {micro_batch_size} x "
                f"{_format_ranks(world_size)} "
                f"x a whole accumulation (one pass is {micro_batch_size * world_size}); pass --micro-batch or "
                "--global-batch "
                "so that it divides"
            )
        return BatchConfig(
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=self.global_batch // (micro_batch_size * world_size),
            world_size=world_size,
        )

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run over `examples` training examples, as Hugging Face's Trainer counts them."""
        return self.max_steps or math.ceil(self.epochs * self.steps_per_epoch(examples))

    def steps_per_epoch(self, examples: int) -> int:
        """Optimizer steps per pass; the last one of a pass may hold fewer examples."""
        return math.ceil(examples / self.global_batch)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """The batch sum: micro x accumulation x ranks = global."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    def __str__(self) -> str:
        accumulation = f"{self.gradient_accumulation_steps} accumulation"
        product = f"{self.micro_batch_size} micro-batch x {accumulation} x {_format_ranks(self.world_size)}"
        return f"{product} = {self.global_batch} global batch"


def _format_ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How the work is divided over ranks and in which number format it is done."""

    ds_config: str | None = option(
        None,
        flag="--ds-config",
        help=f"ZeRO file: {', '.join(DS_CONFIG_NAMES)}, or a path; left out: chosen, and the plan says why",
    )
    precision: str | None = option(
        None,
        flag="--precision",
        help="arithmetic of forward and backward; left out: bf16 on a GPU that has it, else fp32",
        choices=PRECISIONS,
    )
    hang_timeout: float = option(
        600.0,
        flag="--hang-timeout",
        help="end the run where no rank moves for so long, and name who hangs",
        unit="seconds",
    )
    execution: str = option(
        "auto",
        flag="--execution",
        help="eager: operation by operation; graphs: recorded as CUDA graphs; compile: torch.compile, faster steps "
        "after half a minute or more of compiling, other dropout masks; auto: graphs where they can be recorded, "
        "else eager",
        choices=EXECUTIONS,
    )
    activation_checkpointing: bool = option(
        False,
        flag="--activation-checkpointing",
        help="keep each block's input only and compute it again in backward: less memory, a third more work",
    )

    def __post_init__(self) -> None:
        check_range(self.precision in (None, *PRECISIONS), "--precision", self.precision, "fp32, bf16 or fp16")
        check_range(self.execution in EXECUTIONS, "--execution", self.execution, ", ".join(EXECUTIONS))
        check_range(
            5 <= self.hang_timeout <= MAX_HANG_TIMEOUT_SECONDS,
            "--hang-timeout",
            self.hang_timeout,
            f"seconds from 5 to {MAX_HANG_TIMEOUT_SECONDS}",
        )


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What a run leaves and where."""

    eval_every: str = option(
        "epoch", flag="--eval-every", help="evaluate every so many steps, every `epoch`, or `never` in between"
    )
    save_every: str = option(
        "epoch", flag="--save-every", help="save a checkpoint every so many steps, every `epoch`, or `never` in between"
    )
    save_total_limit: int = option(2, flag="--save-total-limit", help="newest checkpoints to keep, beside the best one")
    output_dir: str | None = option(None, flag="--output-dir", help="run folder; left out: runs/<run name>")
    wandb: str | None = option(
        None,
        flag="--wandb",
        help="left out: online where logged in, else offline",
        choices=("online", "offline", "disabled"),
    )
    wandb_project: str = option(
        "gpt2-full-vs-lora", flag="--wandb-project", help="project that the runs to be compared share"
    )
    run_name: str | None = option(None, flag="--run-name", help="left out: <mode or adapter>-<data>")
    report_to: tuple[str, ...] = option(
        (), flag="--report-to", help=f"second sinks of the same rows, comma separated: {', '.join(EXTRA_LOGGERS)}"
    )
    profile: int | None = option(
        None, flag="--profile", help="profile so many steps of rank 0 into OUT/profile", unit="steps"
    )
    export: str = option(
        "last",
        flag="--export",
        help="weights that go into the exported folder: of the last step, or of the checkpoint with the lowest "
        "validation loss (then one is saved at each evaluation that is the lowest so far)",
        choices=("last", "best"),
    )
    num_samples: int = option(
        2,
        flag="--num-samples",
        help=f"validation prompts completed at each evaluation, at most {MAX_NUM_SAMPLES}; 0: none",
    )
    score_samples: bool = option(
        False,
        flag="--score-samples",
        help="score completions of validation prompts at each evaluation: exact match, BLEU, chrF, ROUGE-L; of ACLED "
        "data also date, place and fatalities",
    )

    def __post_init__(self) -> None:
        _check_interval("--eval-every", self.eval_every)
        _check_interval("--save-every", self.save_every)
        check_range(self.save_total_limit >= 1, "--save-total-limit", self.save_total_limit, "a whole number from 1")
        check_range(
            self.wandb in (None, "online", "offline", "disabled"), "--wandb", self.wandb, "online, offline or disabled"
        )
        name = self.run_name
        check_range(
            name is None or re.fullmatch(r"[\w.+-]{1,128}", name) is not None,
            "--run-name",
            name,
            "letters, digits and . _ + - only",
        )
        check_range(self.profile is None or self.profile >= 1, "--profile", self.profile, "a whole number from 1")
        for name in self.report_to:
            check_range(name in EXTRA_LOGGERS, "--report-to", name, " or ".join(EXTRA_LOGGERS))
        check_range(self.export in ("last", "best"), "--export", self.export, "last or best")
        check_range(
            0 <= self.num_samples <= MAX_NUM_SAMPLES,
            "--num-samples",
            self.num_samples,
            f"a whole number from 0 to {MAX_NUM_SAMPLES}",
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run, whole."""

    mode: str
    preset: str
    model: ModelSettings
    lora: LoraSettings
    data: DataSettings
    train: TrainSettings
    engine: EngineSettings
    output: OutputSettings
    overridden: tuple[str, ...] = ()  #: flags that the user gave, which override the preset

    def __post_init__(self) -> None:
        check_range(self.mode in MODES, "--mode", self.mode, "full or lora")
        check_range(self.preset in PRESETS, "--preset", self.preset, "demo or card")
        validate_combinations(self)
        if self.train.early_stop and self.output.eval_every == "never":
            raise UserError(
                f"--early-stop {self.train.early_stop} with --eval-every never: there is no evaluation to stop at; "
                "pass --eval-every epoch or a number of steps"
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
        data_stem = (
            "data"
            if glob.has_magic(self.data.data)
            else re.sub(r"\.\w+$", "", self.data.data.rstrip("/").rsplit("/", 1)[-1])
        )
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
        groups = {
            name: settings_class(**{key: tuple(v) if isinstance(v, list) else v for key, v in values[name].items()})
            for name, settings_class in GROUPS.items()
        }
        return cls(mode=values["mode"], preset=values["preset"], overridden=tuple(values["overridden"]), **groups)


def compile_blocker(settings: Settings) -> str:
    """Why steps of these settings cannot be compiled; empty where they can."""
    if settings.data.objective != "blocks":
        return "rows of many lengths would each be compiled; expected --objective blocks"
    return graph_blocker(settings)


def graph_blocker(settings: Settings) -> str:
    """Why steps of these settings cannot be recorded as CUDA graphs; empty where they can."""
    if settings.model.quant:
        return "not with --quant"
    return "not with --activation-checkpointing" if settings.engine.activation_checkpointing else ""


def validate_combinations(settings: Settings) -> None:
    """Refuse what is right alone but not together; what depends on the ZeRO stage is refused in
    `trainer.training.run_plan`."""
    lora, quant = settings.lora, settings.model.quant
    if settings.engine.execution == "compile" and (blocker := compile_blocker(settings)):
        raise UserError(f"--execution compile: {blocker}")
    if settings.engine.execution == "graphs" and (blocker := graph_blocker(settings)):
        raise UserError(f"--execution graphs: {blocker}")
    if settings.train.optim in EIGHT_BIT_OPTIMIZERS and settings.engine.precision == "fp16":
        raise UserError(f"--optim {settings.train.optim}: not with --precision fp16, which needs ZeRO 1 or more")
    if settings.mode == "full":
        if quant:
            raise UserError(f"--quant {quant}: a quantised weight has no gradient; expected --mode lora")
        for flag, value, default in (
            ("--adapter", lora.adapter, "lora"), ("--lora-plus-ratio", lora.plus_ratio, 1.0),
            ("--modules-to-save", ",".join(lora.modules_to_save), ""),
        ):  # fmt: skip
            if value != default:
                raise UserError(f"{flag} {value}: is about adapters; expected --mode lora")
        return
    if quant and lora.adapter == "pissa":
        raise UserError(
            f"--quant {quant}: pissa changes the base by less than {quant} rounds; expected lora, dora or rslora"
        )
    if quant == "int8" and lora.adapter == "dora":
        raise UserError("--quant int8: dora takes the norms of its layers, by which peft loses their scales; use nf4")
    if quant and "bias" in lora.modules_to_save:
        raise UserError(
            f"--modules-to-save bias: bitsandbytes rounds the biases of {quant} layers; leave one of them out"
        )
    if quant and settings.engine.precision == "fp16":
        raise UserError(f"--precision fp16: rounds the packed weights of --quant {quant}; expected bf16 or fp32")


GROUPS: dict[str, Any] = {
    "model": ModelSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "train": TrainSettings,
    "engine": EngineSettings,
    "output": OutputSettings,
}


def preset_defaults(preset: str) -> dict[str, dict[str, Any]]:
    """The values of a preset that have no default of their own, for --mode full."""
    check_range(preset in PRESETS, "--preset", preset, "demo or card")
    return {"card": card, "demo": demo}[preset]()


def card() -> dict[str, dict[str, Any]]:
    """The published settings of `gpt2-acled-t2s`; AdamW, decay 0 and clip 1.0 are its program's defaults."""
    return {
        "model": {"model": "gpt2"},
        "data": {"data": DEMO_DATA, "block_size": 1024},
        "train": {"global_batch": 2, "eval_batch": 2, "lr": 3e-5},
    }


def demo() -> dict[str, dict[str, Any]]:
    """The embedded model and data, small enough for two CPU cores."""
    return {
        "model": {"model": DEMO_MODEL},
        "data": {"data": DEMO_DATA, "block_size": 256},
        "train": {"global_batch": 8, "eval_batch": 16, "lr": 5e-4},
    }


def resolve(
    mode: str, preset: str, overrides: Mapping[str, Mapping[str, Any]], overridden: tuple[str, ...] = ()
) -> Settings:
    """Preset, then mode, then what the user gave (`{group: {field: value}}`); each later one wins.

    The mode changes one number only, the learning rate, and only where the user gave none; a test holds it there.
    """
    check_range(mode in MODES, "--mode", mode, "full or lora")
    values = preset_defaults(preset)
    if mode == "lora":
        values["train"]["lr"] *= LORA_LR_FACTOR
    groups = {
        name: settings_class(**{**values.get(name, {}), **overrides.get(name, {})})
        for name, settings_class in GROUPS.items()
    }
    return Settings(mode=mode, preset=preset, overridden=overridden, **groups)


def apply_overrides(
    saved_settings: Settings, overrides: Mapping[str, Mapping[str, Any]], overridden: tuple[str, ...]
) -> Settings:
    """The settings of a run that is resumed: those it began with, and the flags given now over them."""
    groups = {name: dataclasses.replace(getattr(saved_settings, name), **overrides.get(name, {})) for name in GROUPS}
    flags = tuple(dict.fromkeys((*saved_settings.overridden, *overridden)))
    return dataclasses.replace(saved_settings, overridden=flags, **groups)


MUTABLE_ON_RESUME = (
    "data.data",
    "data.val_data",
    "train.micro_batch",
    "train.eval_batch",
)  # the data's fingerprint stands for its path


def fields_fixed_on_resume(settings: Settings) -> dict[str, Any]:
    """What may not change when a run is resumed, by field name: all that its numbers are a function of."""
    values: dict[str, Any] = {}
    for group in ("model", "data", "train", *(("lora",) if settings.mode == "lora" else ())):
        for name, value in dataclasses.asdict(getattr(settings, group)).items():
            if f"{group}.{name}" not in MUTABLE_ON_RESUME:
                values[f"{group}_{name}" if name in values else name] = value  # lora_dropout beside dropout
    return values
