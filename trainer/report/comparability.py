"""Which runs may be held against one another and against the card, and what is the same and what differs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from trainer.config import reference
from trainer.report.run_data import RunData

#: what must agree before two losses may be held against one another, by its name for people
COMPARABILITY_KEYS = {
    "data": "data.fingerprint",
    "split": "data.split",
    "tokenizer": "data.tokenizer",
    "block length": "data.block_size",
    "objective": "data.objective",
    "validation set": "data.val_fingerprint",
}
#: facts of run.json that differ between any two runs and say nothing of what was compared
_IGNORED_METADATA = (
    "schema_version",
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
    "not_comparable_with_card",
)
Item = TypeVar("Item")
NOT_USED = "not used"  # the value of a LoRA setting where every weight is trained


def comparison_blockers(a: RunData, b: RunData) -> list[str]:
    """The reasons by which the losses of two runs cannot be compared; empty where they can."""
    reasons = [f"data of {run.name} changed on resume" for run in (a, b) if "data" in run.changed_on_resume]
    for name, path in COMPARABILITY_KEYS.items():
        values = a.get(path), b.get(path)
        if None in values and values != (None, None):  # rows that came as token ids have no tokenizer
            reasons.append(f"other {name} (one came as token ids)")
        elif values[0] != values[1]:
            reasons.append(f"other {name} ({_truncate(values[0])} against {_truncate(values[1])})")
    return reasons


def ranking_blockers(full: RunData, lora: RunData) -> list[str]:
    """Why two runs on the same data may not be ranked: other base weights, init, tokens seen or data order.

    What a run does not tell is no agreement.
    """
    reasons = []
    for name, get_value in _RANKING_KEYS.items():
        a, b = get_value(full), get_value(lora)
        if a is None or b is None:
            reasons.append(f"{name} unknown")
        elif a != b and not (name == "tokens seen" and _is_early_stop_of_one_plan(full, lora)):
            reasons.append(f"other {name} ({_truncate(b)} against {_truncate(a)})")
    return reasons


def _is_early_stop_of_one_plan(a: RunData, b: RunData) -> bool:
    """Whether the runs had the same budget of steps and one ended early by its own rule."""
    return bool(a.summary.get("early_stop") or b.summary.get("early_stop")) and (
        a.get("resolved.total_steps") == b.get("resolved.total_steps") is not None
    )


def _base_weights(run: RunData) -> Any:
    """The fingerprint of what a run started from; random weights are those of their seed."""
    if run.get("settings.model.init") == "random":
        return f"random, seed {run.get('settings.train.seed')}"
    return run.get("model.fingerprint")


def _tokens_seen(run: RunData) -> str | None:
    ends = [float(series["tokens"][-1]) for series in (run.steps, run.evals) if len(series["tokens"])]
    tokens = max((end for end in ends if end == end), default=None)
    return None if tokens is None else f"{tokens:,.0f}"


def _data_order(run: RunData) -> str:
    is_shuffled = run.get("settings.data.shuffle") is not False
    order = f"seed {run.get('settings.train.seed')}" if is_shuffled else "as in the data"
    return order + (", packed" if run.get("settings.data.packing") else "")


_RANKING_KEYS: dict[str, Callable[[RunData], Any]] = {
    "base model": lambda run: PurePosixPath(run.get("model.name")).name,
    "init": lambda run: run.get("settings.model.init"),
    "base weights": _base_weights,
    "tokens seen": _tokens_seen,
    "batch": lambda run: run.get("resolved.global_batch"),
    "data order": _data_order,
}


def reference_blockers(run: RunData) -> list[str]:
    """The known reasons by which a run cannot be held against the card; what is unknown is `reference.UNKNOWN`."""
    if "data" in run.changed_on_resume:
        return ["data changed on resume"]
    return reference.disagreements(
        data=run.get("data.source"),
        vocabulary=run.get("data.vocabulary"),
        block_size=run.get("data.block_size"),
        objective=run.get("data.objective"),
        model=run.get("model.name"),
        examples=run.get("data.train.examples"),
        init=run.get("settings.model.init"),
        parameters=run.get("model.parameters"),
    )


def comparable_sets(items: Sequence[Item], get_run: Callable[[Item], RunData]) -> list[list[Item]]:
    """The items in sets within which each one's run is comparable with each, in the order of their first."""
    sets: list[list[Item]] = []
    for item in items:
        run = get_run(item)
        members = next((members for members in sets if not comparison_blockers(run, get_run(members[0]))), None)
        if members is None:
            sets.append(members := [])
        members.append(item)
    return sets


@dataclass(frozen=True)
class MetadataField:
    """One setting or fact and its value by column: none where unknown, a tuple where a column's runs differ."""

    name: str
    values: Mapping[int, Any]

    @property
    def is_same(self) -> bool:
        """Whether all columns that know it agree."""
        known = list(self.values.values())
        return all(value == known[0] and not isinstance(value, tuple) for value in known)


_REFERENCE_TRAIN_SETTINGS = (
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
    "max_grad_norm",
)
#: what the card states, by our names for it
REFERENCE_METADATA = {
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
    **{f"settings.train.{name}": reference.SETTINGS[name] for name in _REFERENCE_TRAIN_SETTINGS},
    "settings.data.objective": "blocks",
    "settings.data.block_size": 1024,
}


def compare_metadata(columns: Sequence[Sequence[RunData]], with_reference: bool) -> list[MetadataField]:
    """Every setting and data fact: one value a column of runs (a tuple of them where they differ), the card's first."""
    flat_columns = [[_used_metadata(run) for run in runs] for runs in columns]
    names = dict.fromkeys(name for runs in flat_columns for run in runs for name in run)
    return [_compare_field(name, flat_columns, with_reference) for name in sorted(names, key=_section_order)]


def _used_metadata(run: RunData) -> dict[str, Any]:
    """The facts of a run by dotted path; LoRA settings, which run.json always has, only where they were used."""
    return {
        name: NOT_USED if run.mode == "full" and _is_lora_field(name) else value
        for name, value in flatten(run.metadata)
    }


def _is_lora_field(name: str) -> bool:
    lora_paths = ("model.lora_targets", "resolved.adapters_fused", "resolved.base_in_bf16")
    return name.startswith("settings.lora.") or name in lora_paths


def _compare_field(name: str, columns: Sequence[Sequence[Mapping[str, Any]]], with_reference: bool) -> MetadataField:
    reference_value = NOT_USED if _is_lora_field(name) else REFERENCE_METADATA.get(name)
    values = {0: reference_value} if with_reference and reference_value is not None else {}
    for column, runs in enumerate(columns, start=int(with_reference)):
        run_values = [run[name] for run in runs if name in run]
        if run_values:
            is_uniform = all(value == run_values[0] for value in run_values)
            values[column] = run_values[0] if is_uniform else tuple(run_values)
    return MetadataField(name, values)


def _section_order(name: str) -> int:
    """Settings first, then what they came to, the data, the model, the machine, and where the output went last."""
    sections = ("settings", "resolved", "data", "model", "deepspeed", "hardware", "versions", "git")
    section = name.split(".", 1)[0]
    if name.startswith("settings.output."):
        return len(sections) + 1
    return sections.index(section) if section in sections else len(sections)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested facts as (dotted path, value); lists are one value."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in _IGNORED_METADATA:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, path + ".")
        else:
            yield path, value


def _truncate(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
