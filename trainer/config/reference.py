"""The card: what `gpt2-acled-t2s` published, and what it left unsaid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NAME = "gpt2-acled-t2s"


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """One line of the card's training table; losses in nats per token."""

    epoch: int
    step: int
    train_loss: float
    val_loss: float
    perplexity: float


CURVE = (
    ReferenceRow(epoch=1, step=6_621, train_loss=1.2978, val_loss=1.2262, perplexity=3.408),
    ReferenceRow(epoch=2, step=13_242, train_loss=1.0378, val_loss=1.0048, perplexity=2.731),
    ReferenceRow(epoch=3, step=19_863, train_loss=0.9537, val_loss=0.9414, perplexity=2.564),
)

#: What the card states, under the names that run.json uses; "program" marks defaults of the program that made it.
SETTINGS = {
    "lr": 3e-5,
    "global_batch": 2,
    "eval_batch": 2,
    "seed": 42,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "epochs": 3.0,
    "schedule": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "dropout": 0.1,
    "optimizer": "AdamW",
    "mode": "full",
    "model": "gpt2",
    "trainable_parameters": 124_439_808,
}
PROGRAM_DEFAULTS = ("warmup_steps", "weight_decay", "max_grad_norm", "dropout", "optimizer")

STEPS_PER_EPOCH = 6_621
EXAMPLES_PER_EPOCH = (13_241, 13_242)  # 6,621 steps of 2 examples; the last step may have held one
KNOWN_DATA = {"objective": "blocks", "block_size": 1024, "vocabulary": 50_257}
UNKNOWN_DATA = ("data set", "text format of a record", "split", "validation set", "exact tokenizer files")

UNKNOWN_REASON = "unknown of the card: " + ", ".join(UNKNOWN_DATA)


def disagreements(
    *,
    data: str,
    vocabulary: int,
    block_size: int,
    objective: str,
    model: str,
    examples: int,
    init: str = "pretrained",
    parameters: int | None = None,
) -> list[str]:
    """Where a run is known to differ from the card so that their losses cannot be held against one another.

    Each reason begins with its short form, the details follow in brackets. `parameters` counts the base model's.
    """
    reasons = []
    if examples not in EXAMPLES_PER_EPOCH:
        reasons.append(f"other data ({data}: {examples:,} examples, the card's epoch has 13,241 or 13,242)")
    if vocabulary != KNOWN_DATA["vocabulary"]:
        reasons.append(f"other tokenizer ({vocabulary:,} tokens, the card's has 50,257)")
    if objective != KNOWN_DATA["objective"] or block_size != KNOWN_DATA["block_size"]:
        row_kind = "blocks of" if objective == "blocks" else "completions of at most"
        reasons.append(f"other rows ({row_kind} {block_size:,} tokens, the card's are blocks of 1,024)")
    name = model.rstrip("/").rsplit("/", 1)[-1]
    if name != SETTINGS["model"]:
        reasons.append(f"other base model ({name}, the card's is gpt2)")
    elif init != "pretrained":
        reasons.append(f"other base model ({init} weights, the card's were pretrained)")
    elif parameters is not None and parameters != SETTINGS["trainable_parameters"]:
        reasons.append(
            f"other base model ({parameters:,} parameters, the card's has {SETTINGS['trainable_parameters']:,})"
        )
    return reasons


def is_asked_for(preset: str, reasons: Sequence[str]) -> bool:
    """Whether a run is to be held against the card: by its preset, or because nothing known speaks against it."""
    return preset == "card" or list(reasons) == [UNKNOWN_REASON]


def why_not_comparable(**run_info: Any) -> list[str]:
    """`disagreements`, and that the card names neither its data set nor its split: never empty."""
    return [*disagreements(**run_info), UNKNOWN_REASON]
