"""Runs that differ in nothing but the seed, as one group; mean, spread, and whether a difference exceeds it."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.report.comparability import MUST_AGREE, comparable, flatten
from trainer.report.run_data import Run

MODE_NAMES = {"full": "full", "lora": "LoRA"}
CONFIDENCE = 0.95
RULE = (
    "A difference exceeds the spread between seeds when the 95 % interval of Welch's t test around it, "
    "difference ± t · sqrt(sd₁²/n₁ + sd₂²/n₂), does not hold zero; t has the Welch-Satterthwaite degrees of freedom. "
    "It needs two seeds or more on both sides. ± in a table is one sample standard deviation."
)
#: settings that do not make two runs different experiments: seed, places, and how the same sum is divided
_NOT_TOLD_APART = (
    "settings.train.seed",
    "settings.train.micro_batch",
    "settings.train.eval_batch",
    "settings.preset",
    "settings.engine.ds_config",
    "settings.data.data",
    "settings.data.val_data",
    "settings.model.model",
    "settings.engine.precision",
)
_ALSO_TOLD_APART = (
    *MUST_AGREE.values(),
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
_LABELS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("data.source", lambda value: str(value).rstrip("/").rsplit("/", 1)[-1]),
    ("model.name", lambda value: str(value).rstrip("/").rsplit("/", 1)[-1]),
    ("settings.lora.adapter", str),
    ("settings.model.quant", str),
    ("settings.train.optim", str),
    ("resolved.lr", lambda value: f"lr {value:.3g}"),
    ("settings.lora.rank", lambda value: f"rank {value}"),
    ("settings.lora.alpha", lambda value: f"alpha {value:g}"),
    ("settings.lora.plus_ratio", lambda value: f"LoRA+ {value:g}"),
    ("settings.lora.targets", lambda value: f"on {'+'.join(value) or 'all'}"),
    ("settings.lora.train_also", lambda value: f"and {'+'.join(value)}" if value else "adapters only"),
    ("settings.train.global_batch", lambda value: f"batch {value}"),
    ("settings.train.epochs", lambda value: f"{value:g} epochs"),
    ("settings.data.block_size", lambda value: f"block {value}"),
    ("settings.data.objective", str),
    ("resolved.ranks", lambda value: f"{value} ranks"),
    ("resolved.precision", str),
    ("resolved.ds_config", str),
)


@dataclass(frozen=True)
class Group:
    """Runs of one mode that differ in nothing but the seed."""

    label: str
    mode: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that came to their own end and were evaluated: those that a verdict may count."""
        return tuple(run for run in self.runs if run.finished and run.best is not None)


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for fewer than two values) and number of values."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A difference of two means with its interval; `exceeds` is None where the spread is not known."""

    difference: float
    low: float | None
    high: float | None
    exceeds: bool | None


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by what they have in common, full ones first, in the order they were given."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    members = sorted(found.values(), key=lambda group: group[0].mode)
    labels = _labels(members)
    return [Group(label, group[0].mode, tuple(group)) for label, group in zip(labels, members, strict=True)]


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of `values`; None without any."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def difference(a: Spread, b: Spread) -> Difference:
    """a - b with Welch's interval (B. L. Welch, Biometrika 34, 1947); without two values a side there is none."""
    gap = a.mean - b.mean
    if a.sd is None or b.sd is None:
        return Difference(gap, None, None, None)
    va, vb = a.sd**2 / a.n, b.sd**2 / b.n
    if va + vb == 0:
        return Difference(gap, gap, gap, gap != 0)
    freedom = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    half = t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(va + vb)
    return Difference(gap, gap - half, gap + half, abs(gap) > half)


def t_quantile(p: float, freedom: float) -> float:
    """The p-quantile (p > 0.5) of Student's t, by halving an interval around it."""
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, freedom: float) -> float:
    return 1 - _beta(freedom / (freedom + t * t), freedom / 2, 0.5) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (NIST DLMF 8.17.22) where that is quick."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value = 1.0
    for m in range(200, 0, -1):  # from the tail of the fraction to its head
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1 + even / (1 + odd / value)
    return front / (1 + -(a + b) * x / (a + 1) / value)


def _key(run: Run) -> tuple[Any, ...]:
    settings = run.fact("settings") or {}
    told = {f"settings.{name}": value for name, value in flatten(settings)}
    kept = [
        (name, repr(value))
        for name, value in sorted(told.items())
        if name not in _NOT_TOLD_APART and not name.startswith(("settings.output.", "settings.overridden"))
    ]
    identity = (
        () if settings and comparable(run, run) else (run.run_id,)
    )  # of which too little is known to join it to others
    return (run.mode, *kept, *(repr(run.fact(path)) for path in _ALSO_TOLD_APART), *identity)


def _labels(members: Sequence[Sequence[Run]]) -> list[str]:
    """A label of each group: its mode, with what tells it apart from the other groups of that mode."""
    labels = []
    for group in members:
        others = [other[0] for other in members if other[0].mode == group[0].mode]
        parts = []
        for path, text in _LABELS:
            values = {repr(other.fact(path)) for other in others}
            if len(values) > 1 and group[0].fact(path) is not None and not _goes_with_data(path, others):
                parts.append(text(group[0].fact(path)))
        mode = MODE_NAMES[group[0].mode]
        labels.append(f"{mode} ({', '.join(parts[:4])})" if parts else mode)
    return [
        label if labels.count(label) == 1 else f"{label}: {group[0].name}"
        for label, group in zip(labels, members, strict=True)
    ]


def _goes_with_data(path: str, runs: Sequence[Run]) -> bool:
    """Whether this is about the rows and the name of the data, which a label has before it, tells it already."""
    pairs = {(run.fact("data.source"), repr(run.fact(path))) for run in runs}
    sources = {source for source, _ in pairs}
    return path in ("settings.data.objective", "settings.data.block_size") and 1 < len(sources) == len(pairs)
