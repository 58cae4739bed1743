"""Which runs may be held against one another and against the card, and what is the same and what differs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import reference
from trainer.report.run_data import Run, changed_on_resume

#: what must agree before two losses may be held against one another, by its name for people
MUST_AGREE = {
    "data": "data.fingerprint",
    "split": "data.split",
    "tokenizer": "data.tokenizer",
    "block length": "data.block_size",
    "objective": "data.objective",
    "validation set": "data.val_fingerprint",
}
#: facts of run.json that differ between any two runs and say nothing of what was compared
_NOT_FACTS = (
    "format",
    "run_id",
    "name",
    "mode",
    "preset",
    "started",
    "command",
    "wandb",
    "overridden",
    "settings.overridden",
    "resumed.settings",
    "not_comparable_with_card",  # said of each run, in words
)
NOT_USED = "not used"  # the value of a LoRA setting where every weight is trained


def why_not(a: Run, b: Run) -> list[str]:
    """The reasons by which the losses of two runs cannot be compared; empty where they can.

    A fact that a run does not tell is a reason, too. The tokenizer alone may be absent on both sides: rows that
    came as token ids have none, and are the same where the data are.
    """
    reasons = [f"data of {run.name} changed on resume" for run in (a, b) if "data" in changed_on_resume(run)]
    for name, path in MUST_AGREE.items():
        ours, theirs = a.fact(path), b.fact(path)
        if ours is None and theirs is None and name != "tokenizer":
            reasons.append(f"{name} unknown")
        elif (ours is None) != (theirs is None):
            reasons.append(
                f"{name} unknown of {(a if ours is None else b).name}"
                if name != "tokenizer"
                else "other tokenizer (one came as token ids)"
            )
        elif ours != theirs:
            reasons.append(f"other {name} ({_short(ours)} against {_short(theirs)})")
    return reasons


def comparable(a: Run, b: Run) -> bool:
    """Whether the losses of two runs may be held against one another."""
    return not why_not(a, b)


def why_not_card(run: Run) -> list[str]:
    """The known reasons by which a run cannot be held against the card; what is unknown is `reference.UNKNOWN`."""
    if "data" in changed_on_resume(run):
        return ["data changed on resume"]
    facts = {name: run.fact(path) for name, path in _CARD_FACTS.items()}
    missing = [name for name, value in facts.items() if value is None]
    if missing:
        return [f"{' and '.join(missing)} of the run unknown"]
    return reference.disagreements(
        **facts, init=run.fact("settings.model.init") or "pretrained", parameters=run.fact("model.parameters")
    )


_CARD_FACTS = {
    "data": "data.source",
    "vocabulary": "data.vocabulary",
    "block_size": "data.block_size",
    "objective": "data.objective",
    "model": "model.name",
    "examples": "data.train.examples",
}


def short(reason: str) -> str:
    """A reason without its details: `other data (e2e: ...)` -> `other data`."""
    return reason.split(" (", 1)[0]


def together(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in sets within which each is comparable with each, in the order of their first run."""
    sets: list[list[Run]] = []
    for run in runs:
        home = next((members for members in sets if all(comparable(run, other) for other in members)), None)
        if home is None:
            sets.append([run])
        else:
            home.append(run)
    return sets


@dataclass(frozen=True)
class Fact:
    """One setting or fact and its value in each column: None where unknown, a tuple where a column's runs differ."""

    name: str
    values: tuple[Any, ...]
    known: tuple[bool, ...]

    @property
    def same(self) -> bool:
        """Whether all columns that know it agree."""
        told = [value for value, known in zip(self.values, self.known, strict=True) if known]
        return all(value == told[0] and not isinstance(value, tuple) for value in told)


#: what the card states, by our names for it
CARD_FACTS = {
    "settings.mode": "full",
    "settings.model.init": "pretrained",
    "model.name": "gpt2",
    "model.parameters": 124_439_808,
    "model.trainable": 124_439_808,
    "model.share": 1.0,
    "data.vocabulary": reference.KNOWN_DATA["vocabulary"],
    "data.objective": reference.KNOWN_DATA["objective"],
    "data.block_size": reference.KNOWN_DATA["block_size"],
    "resolved.steps_per_epoch": reference.STEPS_PER_EPOCH,
    "resolved.total_steps": 3 * reference.STEPS_PER_EPOCH,
    "resolved.lr": reference.SETTINGS["lr"],
    "resolved.dropout": reference.SETTINGS["dropout"],
    "resolved.global_batch": 2,
    **{
        f"settings.train.{name}": reference.SETTINGS[name]
        for name in (
            "lr",
            "global_batch",
            "eval_batch",
            "seed",
            "beta1",
            "beta2",
            "epsilon",
            "epochs",
            "warmup_steps",
            "weight_decay",
            "clip",
        )
    },
    "settings.data.objective": "blocks",
    "settings.data.block_size": 1024,
}


def facts(columns: Sequence[Sequence[Run]], with_card: bool) -> list[Fact]:
    """Every setting and data fact: one value a column of runs (a tuple of them where they differ), the card's first."""
    flat = [[_used(run) for run in runs] for runs in columns]
    names = dict.fromkeys(name for runs in flat for run in runs for name in run)
    return [_fact(name, flat, with_card) for name in sorted(names, key=_place)]


def _used(run: Run) -> dict[str, Any]:
    """The facts of a run by dotted path; LoRA settings, which run.json always has, only where they were used."""
    found = dict(flatten(run.facts))
    return {name: NOT_USED if run.mode == "full" and _of_lora(name) else value for name, value in found.items()}


def _of_lora(name: str) -> bool:
    others = ("model.lora_targets", "resolved.adapters_fused", "resolved.base_in_bf16")
    return name.startswith("settings.lora.") or name in others


def _fact(name: str, columns: Sequence[Sequence[Mapping[str, Any]]], with_card: bool) -> Fact:
    cards = NOT_USED if _of_lora(name) else CARD_FACTS.get(name)
    values: list[Any] = [cards] if with_card else []
    known = [cards is not None] if with_card else []
    for runs in columns:
        told = [run[name] for run in runs if name in run]
        alike = all(value == told[0] for value in told)
        values.append((told[0] if alike else tuple(told)) if told else None)
        known.append(bool(told))
    return Fact(name, tuple(values), tuple(known))


def _place(name: str) -> int:
    """Settings first, then what they came to, the data, the model, the machine, and where the output went last."""
    order = ("settings", "resolved", "data", "model", "deepspeed", "hardware", "versions", "git")
    head = name.split(".", 1)[0]
    if name.startswith("settings.output."):
        return len(order) + 1
    return order.index(head) if head in order else len(order)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested facts as (dotted path, value); lists are one value."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in _NOT_FACTS:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, path + ".")
        else:
            yield path, value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
