"""Which runs may be held against one another and against the card, and groups of runs that differ in the seed alone."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np

from trainer.config import reference
from trainer.config.files import name_data
from trainer.config.settings import LoraSettings
from trainer.config.text import flatten
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
MODE_NAMES = {"full": "full", "lora": "LoRA"}
#: facts of run.json that differ between any two runs and say nothing of what was compared
IGNORED_METADATA = {
    *("schema_version", "run_id", "name", "mode", "preset", "started", "command", "wandb"),
    *("overridden", "settings.overridden", "resumed.settings", "not_comparable_with_card"),
}
#: settings that do not make two runs different experiments: seed, places, and how the same sum is divided
_IGNORED_SETTINGS = {
    *("settings.train.seed", "settings.train.micro_batch", "settings.train.eval_batch", "settings.preset"),
    *("settings.data.data", "settings.data.val_data", "settings.model.model", "settings.output"),
    *("settings.engine.ds_config", "settings.engine.precision"),
}
_GROUPING_PATHS = (
    *COMPARABILITY_KEYS.values(),
    *("mode", "model.name", "resolved.lr", "resolved.ranks", "resolved.precision", "resolved.ds_config"),
    *("resolved.device", "resolved.micro_batch"),
)
#: what a label says of a group when its mode alone does not name it: path and how it reads
_LABEL_FORMATS: dict[str, Callable[[Any], str]] = {
    "data.source": name_data,
    "model.name": lambda value: PurePosixPath(value).name,
    "settings.lora.adapter": str,
    "settings.lora.peft_config": lambda value: _describe_peft_config(json.loads(value)),
    "settings.model.quant": "on {} weights".format,
    "settings.model.quant_double": lambda is_double: f"scales in {8 if is_double else 32} bits",
    "settings.train.optim": str,
    "resolved.lr": "lr {:.3g}".format,
    "settings.lora.rank": "rank {}".format,
    "settings.lora.alpha": "alpha {:g}".format,
    "settings.lora.dropout": "LoRA dropout {:g}".format,
    "settings.lora.target_modules": lambda value: f"on {'+'.join(value) or 'all'}",
    "settings.lora.modules_to_save": lambda value: f"and {'+'.join(value)}" if value else "adapters only",
    "settings.train.schedule": str,
    "resolved.warmup_steps": "{} warm-up steps".format,
    "settings.train.weight_decay": "weight decay {:g}".format,
    "settings.train.max_grad_norm": "clipping {:g}".format,
    "settings.train.label_smoothing": "label smoothing {:g}".format,
    "resolved.dropout": "dropout {}".format,
    "resolved.micro_batch": "micro-batch {}".format,
    "settings.train.global_batch": "batch {}".format,
    "settings.train.epochs": "{:g} epochs".format,
    "settings.train.max_steps": "{} steps".format,
    "data.block_size": "block {}".format,
    "data.objective": str,
    "resolved.ranks": "{} ranks".format,
    "resolved.precision": str,
    "resolved.ds_config": str,
}
_ADAPTER_DEFAULTS = {f"settings.lora.{name}": value for name, value in vars(LoraSettings()).items()}
_ADAPTER_DEFAULTS |= {"settings.model.quant": None, "settings.model.quant_double": False}
Item = TypeVar("Item")


def comparison_blockers(a: RunData, b: RunData) -> list[str]:
    """The reasons by which the losses of two runs cannot be compared; empty where they can."""
    reasons = []
    for name, path in COMPARABILITY_KEYS.items():
        values = a.get(path), b.get(path)
        if values[0] != values[1]:
            reasons.append(f"other {name} ({' against '.join(map(_shorten, values))})")
    return reasons


def ranking_blockers(full: RunData, lora: RunData) -> list[str]:
    """Why two runs on the same data may not be ranked: other base weights, tokens seen, data order, way of training.
    What a run does not tell is no agreement; of models that others trained nothing is known."""
    if full.is_judged:
        return []
    facts, other_facts = _ranking_facts(full), _ranking_facts(lora)
    depend_on_the_end = ("tokens seen", "judged weights")
    is_early_stop_of_one_plan = bool(full.summary.get("early_stop") or lora.summary.get("early_stop")) and (
        full.get("resolved.total_steps") == lora.get("resolved.total_steps") is not None
    )
    reasons = []
    for name, value in facts.items():
        if name == "base model" and facts["base weights"] == other_facts["base weights"] is not None:
            continue  # two folders of the same weights
        if value is None or other_facts[name] is None:
            reasons.append(f"{name} unknown")
        elif value != other_facts[name] and not (name in depend_on_the_end and is_early_stop_of_one_plan):
            reasons.append(f"other {name} ({_shorten(other_facts[name])} against {_shorten(value)})")
    return reasons


def _ranking_facts(run: RunData) -> dict[str, Any]:
    """What two runs must have in common to be ranked, by its name for people; None where the run does not tell."""
    seed, init = run.get("settings.train.seed"), run.get("settings.model.init")
    ends = [float(series["tokens"][-1]) for series in (run.steps, run.evals) if len(series["tokens"])]
    tokens = max((end for end in ends if end == end), default=None)
    train, output = run.get("settings.train") or {}, run.get("settings.output") or {}
    patience, is_last = train.get("early_stop"), run.get("data.test.records") and output.get("export") == "last"
    optimizer = str(train.get("optim")).removesuffix("_fused")
    return {
        "base model": PurePosixPath(run.get("model.name")).name,
        "init": init,
        "base weights": f"random, seed {seed}" if init == "random" else run.get("model.fingerprint"),
        "tokens seen": None if tokens is None else f"{tokens:,.0f}",
        "batch": run.get("resolved.global_batch"),
        "data order": f"seed {seed}",
        "packing": "several examples a row" if run.get("settings.data.packing") else "one example a row",
        "precision": run.get("resolved.precision"),
        "schedule": f"{train.get('schedule')} to {train.get('min_lr')}",
        "warm-up": f"{run.get('resolved.warmup_steps')} steps",
        "weight decay": train.get("weight_decay"),
        "clipping": str(train.get("max_grad_norm")),
        "optimizer": f"{optimizer} {train.get('beta1')}, {train.get('beta2')}, {train.get('epsilon')}",
        "dropout": run.get("resolved.dropout"),
        "label smoothing": train.get("label_smoothing"),
        "early stop": f"after {patience} evaluations, every {output.get('eval_every')}" if patience else "none",
        "judged weights": "last" if is_last else f"best of {np.sum(run.evals['step'] > 0)} evaluated",
    }


def reference_blockers(run: RunData) -> list[str]:
    """The known reasons by which a run cannot be held against the card; what is unknown is `reference.UNKNOWN_DATA`."""
    return reference.disagreements(run.metadata["data"], run.metadata["model"])


def comparable_sets(items: Sequence[Item], get_run: Callable[[Item], RunData]) -> list[list[Item]]:
    """The items in sets within which each one's run is comparable with each, in the order of their first."""
    sets: list[list[Item]] = []
    for item in items:
        fitting = [members for members in sets if not comparison_blockers(get_run(item), get_run(members[0]))]
        if fitting:
            fitting[0].append(item)
        else:
            sets.append([item])
    return sets


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."  # a hash


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one mode that differ in nothing but the seed."""

    label: str
    mode: str
    runs: tuple[RunData, ...]

    @property
    def name(self) -> str:
        """What a sentence calls it: its mode, or the contestant."""
        return self.label if self.runs[0].is_judged else MODE_NAMES[self.mode]

    @property
    def lr(self) -> float:
        return float(self.runs[0].get("resolved.lr"))

    @property
    def label_with_lr(self) -> str:
        """The label, with an adapter's rank and the learning rate in it whether or not other groups share them."""
        if self.runs[0].is_judged:
            return self.label
        name, _, parts = self.label.removesuffix(")").partition(" (")
        has_rank = self.mode == "lora" and not self.runs[0].get("settings.lora.peft_config")
        rank, lr = f"rank {self.runs[0].get('settings.lora.rank')}" * has_rank, f"lr {self.lr:.3g}"
        shown = (parts, rank * (rank not in parts), lr * (lr not in parts))
        return f"{name} ({', '.join(filter(None, shown))})"

    @property
    def finished_runs(self) -> tuple[RunData, ...]:
        """The runs that came to their own end and were evaluated: those that a verdict may count."""
        return tuple(run for run in self.runs if run.is_finished and run.best_eval is not None)

    @property
    def divergence(self) -> str:
        """`full (lr 0.0005) diverged in 1 of 5 seeds; ...`, "" where no run did: it is an outcome of the setting."""
        number = sum(run.has_diverged for run in self.runs)
        if not number:
            return ""
        seeds = f"{number} of {len(self.runs)} seed{'s' if len(self.runs) > 1 else ''}"
        remedy = f"run all of them at a lower rate, such as {self.lr / 10**0.25:.2g}"
        return f"{self.label_with_lr} diverged in {seeds}; {remedy}"

    @property
    def best_loss(self) -> float:
        """Mean of the lowest validation losses of the finished runs, of which there must be one."""
        return statistics.fmean(run.best_eval["loss"] for run in self.finished_runs if run.best_eval)

    def at_epoch(self, series: str, column: str, epoch: float) -> list[float]:
        """The values of a column of `evals` or `epochs`, of each run that has a row there."""
        places = [(getattr(run, series), run.index_at_epoch(getattr(run, series), epoch)) for run in self.runs]
        return [float(rows[column][index]) for rows, index in places if index is not None]


def group_by_seed(runs: Sequence[RunData]) -> list[SeedGroup]:
    """The runs by what they have in common, full ones first, in the order they were given."""
    runs_by_key: dict[str, list[RunData]] = {}
    for run in runs:
        settings = sorted(flatten(run.get("settings"), ".", "settings.", IGNORED_METADATA | _IGNORED_SETTINGS))
        runs_by_key.setdefault(repr((settings, [run.get(path) for path in _GROUPING_PATHS])), []).append(run)
    groups = sorted(runs_by_key.values(), key=lambda members: members[0].mode)
    labels = []
    for run, *_ in groups:
        parts = label_parts(run, [other for other, *_ in groups if other.mode == run.mode])
        labels.append(MODE_NAMES[run.mode] + (f" ({', '.join(parts)})" if parts else ""))
    return [
        SeedGroup(label if labels.count(label) == 1 else f"{label}: {members[0].name}", members[0].mode, tuple(members))
        for label, members in zip(labels, groups, strict=True)
    ]


def label_parts(run: RunData, peers: Sequence[RunData] = ()) -> list[str]:
    """What tells a run apart from others of its mode, and its unusual adapter settings."""
    parts = []
    for path, format_value in _LABEL_FORMATS.items():
        value = tuple(value) if isinstance(value := run.get(path), list) else value
        is_unusual = run.mode == "lora" and value != _ADAPTER_DEFAULTS.get(path, value)
        if value is not None and (is_unusual or len({repr(peer.get(path)) for peer in peers}) > 1):
            parts.append(format_value(value))
    return parts


def _describe_peft_config(config: Mapping[str, Any]) -> str:
    return f"{config['peft_type']}" + (f" of rank {config['r']}" if config.get("r") else "")
