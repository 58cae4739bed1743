"""Every number that a loss depends on, once: frozen dataclasses whose fields carry flag, unit and what they accept.

The command line is generated from the fields below (`trainer/config/cli.py`), so a flag cannot drift from its
field. Nothing here imports torch: a plan can be checked and a report made on a machine without it.
"""

import math
import re
from dataclasses import dataclass

from trainer.config.batch_config import BatchConfig
from trainer.config.choices import (
    MODULES_TO_SAVE,
    Adapter,
    DataFormat,
    Init,
    ModuleToSave,
    Objective,
    Optimizer,
    Quantization,
    Schedule,
    UnusableRecords,
)
from trainer.config.errors import UserError
from trainer.config.options import (
    ABOVE_ZERO,
    FROM_ZERO,
    NOT_EMPTY,
    PROBABILITY,
    SHARE,
    SHARE_OR_NONE,
    Accepted,
    at_least,
    check_fields,
    check_range,
    option,
)

_EARLY_STOP = re.compile(r"([1-9]\d*)(?::(\d+\.?\d*(?:e-?\d+)?))?")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which weights training starts from."""

    model: str = option(help="hub id or folder of a causal LM, or the embedded `demo-base`", accepts=NOT_EMPTY)
    init: Init = option("pretrained", help="start from its weights, or from random ones")
    quant: Quantization | None = option(
        None, help="with --mode lora: hold the frozen layers in 4 bits (nf4, fp4) or 8 (int8); left out: in float32"
    )
    quant_double: bool = option(False, help="with nf4 and fp4: hold their scales in 8 bits too")
    dropout: float | None = option(
        None, help="every dropout of the model (GPT-2 has three); left out: the model's own", accepts=PROBABILITY
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.quant_double and self.quant not in ("nf4", "fp4"):
            raise UserError("--quant-double: expected with --quant nf4 or fp4, whose scales it is about")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The shape of the adapters; only looked at with --mode lora."""

    rank: int = option(8, help="inner dimension of each adapter", flag="--lora-rank", accepts=at_least(1))
    alpha: float = option(16.0, help="adapters are scaled by alpha / rank", flag="--lora-alpha", accepts=ABOVE_ZERO)
    dropout: float = option(0.0, help="dropout before each adapter", flag="--lora-dropout", accepts=PROBABILITY)
    target_modules: tuple[str, ...] = option(
        (),
        help="layers to adapt, comma separated: attention, mlp, all, a layer's name or its end, or a pattern "
        "(*.h.0.*); left out: all, that is every Conv1D and Linear but the output layer",
        flag="--lora-target-modules",
        accepts=Accepted(all, "layer names separated by commas"),
    )
    adapter: Adapter = option(
        "lora",
        help="lora; dora: magnitude and direction apart; rslora: scaled by alpha / sqrt(rank); "
        "pissa: begins with the base's largest singular vectors",
    )
    plus_ratio: float = option(
        1.0,
        help="LoRA+: learning rate of the B matrices over that of all else",
        flag="--lora-plus-ratio",
        accepts=ABOVE_ZERO,
    )
    modules_to_save: tuple[ModuleToSave, ...] = option(
        (), help=f"weights of the base to train beside the adapters, comma separated: {', '.join(MODULES_TO_SAVE)}"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which records are read and how they become rows of token ids."""

    data: str = option(
        help="CSV, TSV, JSONL, Parquet, Arrow, text (.gz, .zst), folder, glob, hub id (ID:CONFIG) or acled-demo",
        accepts=Accepted(bool, "a file, folder, glob, hub id or acled-demo"),
    )
    val_data: str | None = option(None, help="validation records, in the same forms; left out: split off --data")
    val_fraction: float = option(0.1, help="share split off for validation, by hash of the record", accepts=SHARE)
    test_data: str | None = option(None, help="test records, evaluated once, at the weights that are exported")
    test_fraction: float = option(
        0.0, help="share split off for a test, likewise; it is taken from the training records", accepts=SHARE_OR_NONE
    )
    retain_data: str | None = option(
        None, help="text of the base's kind (`demo-base`: the embedded one's): shows forgetting"
    )
    split_by: str | None = option(
        None, help="column whose equal values stay in one split and count as one in an interval"
    )
    prompt: str | None = option(None, help="template of a record's prompt, for instance '{mr}'")
    completion: str | None = option(None, help="template of the text to be learnt, for instance '{ref}'")
    format: DataFormat | None = option(
        None, help="what the columns mean; left out: recognised from them, and the plan says so"
    )
    chat_template: str | None = option(None, help="Jinja file that writes conversations; left out: the model's own")
    objective: Objective | None = option(
        None,
        help="blocks: all texts joined and cut; completion: one record a row, loss on the completion only; left out: "
        "completion for chat, prompt-completion and alpaca, else blocks",
    )
    unusable_records: UnusableRecords = option(
        "refuse",
        help="conversations whose learnt tokens cannot be proven or lie beyond the block size: refuse, or drop them",
    )
    block_size: int = option(
        help="length of a block, longest row with --objective completion; 0: from the lengths of the data",
        unit="tokens",
        accepts=Accepted(lambda value: value == 0 or value >= 2, "2 tokens or more, or 0: from the data"),
    )
    packing: bool = option(False, help="completion and chat: several examples in a row, hidden from one another")
    shuffle: bool = option(True, help="take the examples in the order of the data", flag="--no-shuffle")

    def __post_init__(self) -> None:
        check_fields(self)
        most = 1 - (self.val_fraction if self.val_data is None else 0)
        if self.test_fraction >= most:
            raise UserError(
                f"--test-fraction {self.test_fraction:g}: expected a share under {most:g}, beside validation"
            )
        if self.test_data is not None and self.test_fraction:
            raise UserError(f"--test-fraction {self.test_fraction:g} and --test-data: expected one of them")
        if self.prompt is not None and self.completion is None:
            raise UserError(
                "--prompt without --completion: say with --completion which text is to be learnt, "
                "for instance --completion '{notes}'"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The optimisation: how much, how fast, in which batches."""

    epochs: float = option(3.0, help="passes over the training set", accepts=ABOVE_ZERO)
    max_steps: int | None = option(
        None, help="end here instead; the schedule ends here too", unit="steps", accepts=at_least(1)
    )
    global_batch: int = option(help="examples per optimizer step over all ranks", unit="examples", accepts=at_least(1))
    micro_batch: int | None = option(
        None,
        help="examples in one forward on one rank; left out: global batch / ranks",
        unit="examples",
        accepts=at_least(1),
    )
    eval_batch: int = option(
        help="examples in one evaluation forward on one rank; changes no number", unit="examples", accepts=at_least(1)
    )
    lr: float = option(help="peak learning rate; left out: the preset's, times 10 with --mode lora", accepts=ABOVE_ZERO)
    warmup_steps: int = option(0, help="linear warm-up before the schedule", unit="steps", accepts=at_least(0))
    warmup_ratio: float = option(
        0.0,
        help="the same as a share of all steps, rounded up",
        accepts=Accepted(PROBABILITY.check, "a share from 0 up to 1"),
    )
    schedule: Schedule = option(
        "linear",
        help="after the warm-up: linear or half a cosine to --min-lr, constant, or wsd: constant, then half a cosine "
        "over the last tenth of the steps",
    )
    min_lr: float = option(0.0, help="learning rate at which the schedule ends", accepts=FROM_ZERO)
    weight_decay: float = option(0.0, help="AdamW's decoupled weight decay", accepts=FROM_ZERO)
    max_grad_norm: float = option(
        1.0,
        help="largest norm of the global gradient; 0: no clipping",
        accepts=Accepted(FROM_ZERO.check, "0 (off) or a number above it"),
    )
    seed: int = option(
        42,
        help="seed of initial weights, data order and dropout",
        accepts=Accepted(lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295"),
    )
    optim: Optimizer = option(
        "adamw_fused",
        help="adamw_fused: torch's AdamW in one kernel; adamw: its plain one, same formula, other rounding; "
        "adamw8bit, paged_adamw8bit: bitsandbytes', moments in 8 bits, not divided by ZeRO",
    )
    early_stop: str | None = option(
        None,
        help="PATIENCE or PATIENCE:MIN_DELTA: end the run after so many evaluations in a row whose validation loss is "
        "not more than MIN_DELTA nats below the lowest before them; left out: never",
        accepts=Accepted(
            lambda value: _EARLY_STOP.fullmatch(value) is not None,
            "PATIENCE (evaluations, from 1) or PATIENCE:MIN_DELTA (nats, from 0), for instance 3:0.01",
        ),
    )
    beta1: float = option(0.9, help="AdamW's decay of the first moment", flag="--adam-beta1", accepts=PROBABILITY)
    beta2: float = option(0.999, help="AdamW's decay of the second moment", flag="--adam-beta2", accepts=PROBABILITY)
    epsilon: float = option(1e-8, help="AdamW's addend of the denominator", flag="--adam-epsilon", accepts=ABOVE_ZERO)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_steps and self.warmup_ratio:
            raise UserError(f"--warmup-ratio {self.warmup_ratio}: not with --warmup-steps {self.warmup_steps}")
        check_range(self.min_lr <= self.lr, "--min-lr", self.min_lr, f"at most --lr {self.lr:g}")
        check_range(
            not self.min_lr or self.schedule != "constant",
            "--min-lr",
            self.min_lr,
            "with --schedule linear, cosine or wsd",
        )

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
