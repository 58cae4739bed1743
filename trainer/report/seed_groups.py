"""Runs that differ in nothing but the seed, as one group with a label of its own."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from trainer.report.comparability import COMPARABILITY_KEYS, flatten
from trainer.report.run_data import RunData

MODE_NAMES = {"full": "full", "lora": "LoRA"}
#: settings that do not make two runs different experiments: seed, places, and how the same sum is divided
_IGNORED_SETTINGS = (
    "settings.train.seed",
    "settings.train.micro_batch",
    "settings.train.eval_batch",
    "settings.preset",
    "settings.engine.ds_config",
    "settings.engine.precision",
    "settings.data.data",
    "settings.data.val_data",
    "settings.model.model",
)
_GROUPING_PATHS = (
    *COMPARABILITY_KEYS.values(),
    "mode",
    "model.name",
    "resolved.lr",
    "resolved.ranks",
    "resolved.precision",
    "resolved.ds_config",
    "resolved.device",
    "resolved.micro_batch",
)
#: what a label says of a group when its mode alone does not name it: path and how it reads
_LABEL_FORMATS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("data.source", lambda value: PurePosixPath(value).name),
    ("model.name", lambda value: PurePosixPath(value).name),
    ("settings.lora.adapter", str),
    ("settings.model.quant", str),
    ("settings.train.optim", str),
    ("resolved.lr", lambda value: f"lr {value:.3g}"),
    ("settings.lora.rank", lambda value: f"rank {value}"),
    ("settings.lora.alpha", lambda value: f"alpha {value:g}"),
    ("settings.lora.plus_ratio", lambda value: f"LoRA+ {value:g}"),
    ("settings.lora.target_modules", lambda value: f"on {'+'.join(value) or 'all'}"),
    ("settings.lora.modules_to_save", lambda value: f"and {'+'.join(value)}" if value else "adapters only"),
    ("settings.train.global_batch", lambda value: f"batch {value}"),
    ("settings.train.epochs", lambda value: f"{value:g} epochs"),
    ("settings.train.max_steps", lambda value: f"{value} steps"),
    ("data.block_size", lambda value: f"block {value}"),
    ("data.objective", str),
    ("resolved.ranks", lambda value: f"{value} ranks"),
    ("resolved.precision", str),
    ("resolved.ds_config", str),
)


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one mode that differ in nothing but the seed."""

    label: str
    mode: str
    runs: tuple[RunData, ...]

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return float(self.runs[0].get("resolved.lr"))

    @property
    def label_with_lr(self) -> str:
        """The label, its learning rate in it whether or not other groups share it."""
        lr = f"lr {self.lr:.3g}"
        if lr in self.label:
            return self.label
        return f"{self.label[:-1]}, {lr})" if self.label.endswith(")") else f"{self.label} ({lr})"

    @property
    def finished_runs(self) -> tuple[RunData, ...]:
        """The runs that came to their own end and were evaluated: those that a verdict may count."""
        return tuple(run for run in self.runs if run.is_finished and run.best_eval is not None)


def group_by_seed(runs: Sequence[RunData]) -> list[SeedGroup]:
    """The runs by what they have in common, full ones first, in the order they were given."""
    runs_by_key: dict[tuple[Any, ...], list[RunData]] = {}
    for run in runs:
        runs_by_key.setdefault(_grouping_key(run), []).append(run)
    run_groups = sorted(runs_by_key.values(), key=lambda group: group[0].mode)
    labels = [_make_label(group[0], [other[0] for other in run_groups]) for group in run_groups]
    labels = [
        label if labels.count(label) == 1 else f"{label}: {group[0].name}"
        for label, group in zip(labels, run_groups, strict=True)
    ]
    return [SeedGroup(label, group[0].mode, tuple(group)) for label, group in zip(labels, run_groups, strict=True)]


def best_loss(group: SeedGroup) -> float:
    """Mean of the lowest validation losses of the finished runs of a group, of which there must be one."""
    return statistics.fmean(run.best_eval["loss"] for run in group.finished_runs if run.best_eval)


def improvement(group: SeedGroup) -> float | None:
    """Mean improvement of the finished runs on the base; None where one was not evaluated at step 0."""
    gains = [
        run.initial_loss - run.best_eval["loss"]
        for run in group.finished_runs
        if run.best_eval and run.initial_loss is not None
    ]
    return statistics.fmean(gains) if len(gains) == len(group.finished_runs) else None


def _grouping_key(run: RunData) -> tuple[Any, ...]:
    compared_settings = [
        (name, repr(value))
        for name, value in sorted(flatten(run.get("settings"), "settings."))
        if name not in _IGNORED_SETTINGS and not name.startswith("settings.output.")
    ]
    return (*compared_settings, *(repr(run.get(path)) for path in _GROUPING_PATHS))


def _make_label(run: RunData, first_runs: Sequence[RunData]) -> str:
    """The mode of a run with what tells it apart from those of its mode among the first runs of each group."""
    peers = [other for other in first_runs if other.mode == run.mode]
    parts = [
        format_value(run.get(path))
        for path, format_value in _LABEL_FORMATS
        if run.get(path) is not None
        and len({repr(peer.get(path)) for peer in peers}) > 1
        and not _is_implied_by_data(path, peers)
    ]
    return MODE_NAMES[run.mode] + (f" ({', '.join(parts[:4])})" if parts else "")


def _is_implied_by_data(path: str, runs: Sequence[RunData]) -> bool:
    """Whether this is about the rows and the name of the data, which a label has before it, tells it already."""
    pairs = {(run.get("data.source"), repr(run.get(path))) for run in runs}
    sources = {source for source, _ in pairs}
    return path in ("data.objective", "data.block_size") and 1 < len(sources) == len(pairs)
