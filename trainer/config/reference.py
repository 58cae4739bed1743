"""The card: what `gpt2-acled-t2s` published, and what it left unsaid."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

NAME = "gpt2-acled-t2s"


class ReferenceRow(NamedTuple):
    """One line of the card's training table; losses in nats per token."""

    epoch: int
    step: int
    train_loss: float
    val_loss: float
    perplexity: float


CURVE = (
    ReferenceRow(1, 6_621, 1.2978, 1.2262, 3.408),
    ReferenceRow(2, 13_242, 1.0378, 1.0048, 2.731),
    ReferenceRow(3, 19_863, 0.9537, 0.9414, 2.564),
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


def disagreements(data: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """Where a run is known to differ from the card so that their losses cannot be held against one another. `data`,
    `model`: these blocks of its run.json. Each reason begins with its short form, details follow in brackets."""
    reasons, examples = [], data["train"]["examples"]
    if examples not in EXAMPLES_PER_EPOCH:
        reasons.append(f"other data ({data['source']}: {examples:,} examples, the card's epoch has 13,241 or 13,242)")
    if data["vocabulary"] != KNOWN_DATA["vocabulary"]:
        reasons.append(f"other tokenizer ({data['vocabulary']:,} tokens, the card's has 50,257)")
    if any(data[name] != KNOWN_DATA[name] for name in ("objective", "block_size")):
        rows = f"{data['objective']} of at most {data['block_size']:,} tokens"
        reasons.append(f"other rows ({rows}, the card's are blocks of 1,024)")
    base = model["name"].rstrip("/").rsplit("/", 1)[-1], model["init"], model["parameters"]
    if base != (SETTINGS["model"], "pretrained", SETTINGS["trainable_parameters"]):
        named = f"{base[0]}, {base[1]}, {base[2]:,} parameters"
        reasons.append(f"other base model ({named}; the card's is gpt2, pretrained, 124,439,808 parameters)")
    return reasons


def is_asked_for(preset: str, reasons: Sequence[str]) -> bool:
    """Whether a run is to be held against the card: by its preset, or because nothing known speaks against it."""
    return preset == "card" or list(reasons) == [UNKNOWN_REASON]


def is_worth_a_word(metadata: Mapping[str, Any]) -> bool:
    """Whether to mention the card beside a run at all, by its run.json: asked for as above, or ACLED data."""
    is_acled = metadata["data"].get("form") == "acled"
    return is_acled or is_asked_for(metadata["preset"], metadata["not_comparable_with_card"])
