"""The interval of LoRA's excess loss over full, from per-record losses of runs paired by seed.

`excess = LoRA - full`: positive is worse. `differences[s, i]` is the summed negative log-likelihood (nats) of unit i
under LoRA minus that under full with seed s; `targets[i]` counts the unit's targets. A unit is what could have been
drawn by itself: a record, or the group of records that share a meaning, with both summed over it (`sum_by_unit`).

    excess = sum d[s, i] / (S * sum n[i]),    u[s, i] = (d[s, i] - excess * n[i]) / mean(n)

(the linearised residual of a ratio: Cochran, Sampling Techniques, 1977, 6.5). Seeds and units are crossed random
effects without replication, so with MS_a = N var(seed means), MS_b = S var(unit means) and MS_e the residual mean
square

    V = (MS_a + MS_b - MS_e) / (S N), not below MS_a / (S N)

with degrees of freedom after Satterthwaite (Biometrics Bulletin 2, 1946), at least S - 1. The half width t * sqrt(V) is
never narrower than that of the seeds' means alone, t(S - 1) * sqrt(MS_a / (S N)): without this rule two or three seeds
cover too seldom. Paired and clustered errors of evaluations: Miller, arXiv 2411.00640.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import poch, stdtr, stdtrit

LEVEL = 0.95
TWO_SIDED, ONE_SIDED = (1 + LEVEL) / 2, LEVEL  # the quantiles of an interval and of an upper bound
MIN_SEEDS = 3  #: below it nothing is said of a method
MAX_PLANNED_SEEDS = 64  #: `plan_sample_size` plans no study of more

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class VarianceComponents:
    """Variances of the linearised residual, in (nats per token)^2: of the seed, the unit, and the rest."""

    seed: float
    unit: float
    rest: float


@dataclass(frozen=True, kw_only=True)
class PairedInterval:
    """An estimate (nats per token) with its two-sided interval, and the one-sided upper bound at the same level."""

    estimate: float
    low: float
    high: float
    upper: float
    p_value: float  #: two-sided, of a true value of 0
    level: float = LEVEL
    num_seeds: int
    num_units: int
    components: VarianceComponents

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class _MeanSquares:
    """Of S seeds and N units: MS_a, MS_b and MS_e of the module's docstring; only MS_b where S is 1."""

    seed: float
    unit: float
    rest: float
    num_seeds: int
    num_units: int

    def errors(self) -> list[tuple[float, float]]:
        """(standard error, degrees of freedom) of the estimate, and after it of the seeds' means alone."""
        s, n = self.num_seeds, self.num_units
        if s == 1:
            return [(math.sqrt(self.unit / n), n - 1)]
        units = max(n - 1, 1)  # of seeds alone, without units, the other mean squares are 0
        denominator = self.seed**2 / (s - 1) + self.unit**2 / units + self.rest**2 / ((s - 1) * units)
        total = self.seed + self.unit - self.rest
        freedom = max(s - 1, total**2 / denominator) if denominator > 0 else s - 1
        error = math.sqrt(max(total, self.seed) / (s * n))
        return [(error, freedom), (math.sqrt(self.seed / (s * n)), s - 1)]

    def interval(self, estimate: float) -> PairedInterval:
        """Half widths t * sqrt(V), not below that of the seeds' means alone; p: the level at which one reaches 0."""
        s, n, errors = self.num_seeds, self.num_units, self.errors()
        width, upper = (max(float(stdtrit(f, q)) * error for error, f in errors) for q in (TWO_SIDED, ONE_SIDED))
        components = VarianceComponents(seed=0.0, unit=self.unit, rest=0.0)
        if s > 1:
            seed, unit = max(0.0, self.seed - self.rest) / n, max(0.0, self.unit - self.rest) / s
            components = VarianceComponents(seed=seed, unit=unit, rest=self.rest)
        p_values = [2 * float(stdtr(f, -abs(estimate) / e)) if e > 0 else float(estimate == 0) for e, f in errors]
        return PairedInterval(
            estimate=estimate,
            low=estimate - width,
            high=estimate + width,
            upper=estimate + upper,
            p_value=max(p_values),
            num_seeds=s,
            num_units=n,
            components=components,
        )


def paired_interval(differences: Matrix, targets: NDArray[np.float64]) -> PairedInterval:
    """The interval of the module's docstring; with one seed it is of these two models alone (V = MS_b / N).

    Shapes: `differences` (seeds, units), `targets` (units,), of two units or more.
    """
    estimate = math.fsum(differences.ravel()) / (len(differences) * math.fsum(targets))
    residuals = (differences - estimate * targets) / targets.mean()
    s, n = residuals.shape
    unit_means, seed_means = residuals.mean(axis=0), residuals.mean(axis=1)
    seed, rest, unit = 0.0, 0.0, s * float(unit_means.var(ddof=1))
    if s > 1:
        rests = residuals - unit_means - seed_means[:, None] + residuals.mean()
        seed, rest = n * float(seed_means.var(ddof=1)), float((rests**2).sum()) / ((s - 1) * (n - 1))
    return _MeanSquares(seed=seed, unit=unit, rest=rest, num_seeds=s, num_units=n).interval(estimate)


def seeds_interval(differences: Sequence[float]) -> PairedInterval:
    """The interval of paired differences of whole losses, one a seed: conditional on these evaluation records.

    For two seeds or more of runs without per-record losses.
    """
    values = np.asarray(differences, dtype=np.float64)
    variance = float(values.var(ddof=1))
    squares = _MeanSquares(seed=variance, unit=0.0, rest=0.0, num_seeds=len(values), num_units=1)
    return replace(squares.interval(float(values.mean())), num_units=0)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several claims, raised so that all hold together (Holm, Scand. J. Stat. 6, 1979)."""
    order = np.argsort(p_values)
    raised = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(raised))
    return adjusted.tolist()


def sum_by_unit(values: Matrix, units: Sequence[str] | NDArray[np.object_]) -> Matrix:
    """Columns of `values` (..., records) summed over the records of one unit: (..., units), units in sorted order."""
    names = np.asarray(units, dtype=str)
    order = np.argsort(names, kind="stable")
    _, starts = np.unique(names[order], return_index=True)
    return np.asarray(np.add.reduceat(values[..., order], starts, axis=-1), dtype=np.float64)


def predict_half_width(
    components: VarianceComponents, num_seeds: int, num_units: int, *, quantile: float = TWO_SIDED
) -> float:
    """The half width (nats per token) that so many seeds and units give on average, by the same rule.

    A standard deviation of f degrees of freedom is on average sqrt(2/f) Gamma((f+1)/2) / Gamma(f/2) times the true one.
    """
    seed, unit, rest = components.seed, components.unit, components.rest
    squares = _MeanSquares(
        seed=rest + num_units * seed, unit=rest + num_seeds * unit, rest=rest, num_seeds=num_seeds, num_units=num_units
    )
    return max(float(stdtrit(f, quantile) * np.sqrt(2 / f) * poch(f / 2, 0.5)) * error for error, f in squares.errors())


class SampleSize(NamedTuple):
    """What resolves a distance: seeds with today's units, units with today's seeds; None where no number does."""

    num_seeds: int | None
    num_units: int | None
    floor: float  # half width (nats per token) that today's units allow with any number of seeds


def plan_sample_size(interval: PairedInterval, *, is_one_sided: bool = False) -> SampleSize:
    """The seeds or units that make the half width smaller than the estimate: its distance to 0, or to the margin.

    `unit / N` of the variance is a floor that no number of seeds lowers. One seed knows no variance between seeds, so
    from one the answer is the smallest number of seeds by which a method can be judged.
    """
    quantile = ONE_SIDED if is_one_sided else TWO_SIDED
    half_width = partial(predict_half_width, interval.components, quantile=quantile)
    seeds, units, distance = interval.num_seeds, interval.num_units, abs(interval.estimate)
    floor = float(stdtrit(1e9, quantile)) * math.sqrt(interval.components.unit / units) if units else 0.0
    more_seeds = range(max(seeds + 1, MIN_SEEDS), MAX_PLANNED_SEEDS + 1)
    enough_seeds = next((s for s in more_seeds if half_width(s, max(units, 2)) < distance), None)
    enough_units = None
    if units and seeds > 1:
        sizes = [math.ceil(units * 1.25**k) for k in range(1, 25)]  # up to 200 times as many
        enough_units = next((n for n in sizes if half_width(seeds, n) < distance), None)
    return SampleSize(enough_seeds, enough_units, floor)
