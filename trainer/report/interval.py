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

Few long records, or few that carry the excess, make such an interval too narrow, and "good enough" is then said too
often. So residuals are weighed by their leverage, sqrt((1 - 1/N) / (1 - n[i] / sum n)), units of unequal length have
(sum n^2)^2 / sum n^4 - 1 degrees of freedom, and the skewness of the unit means widens the side that it threatens
(Hall, J. R. Stat. Soc. B 54, 1992); it never narrows one. `effective_units`, the number of equal records that the units
are worth, is 3 (sum u^2)^2 / sum u^4 of the unit means, at most N: about N where they are normal, few where a handful
decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, poch, stdtr, stdtrit

LEVEL = 0.95
TWO_SIDED, ONE_SIDED = (1 + LEVEL) / 2, LEVEL  # the quantiles of an interval and of an upper bound
MIN_SEEDS = 3  #: below it nothing is said of a method
MIN_UNITS = 20  #: below so many (effective) ones LoRA is not called good enough
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
    effective_units: float  #: the equal units that they are worth
    top_tenth: float  #: the share of the squared residuals that a tenth of the units has
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
    unit_freedom: float
    third_moment: float = 0.0  #: of the unit means

    def errors(self) -> list[tuple[float, float, float]]:
        """(standard error, degrees of freedom, skewness) of the estimate, and after it of the seeds' means alone."""
        s, n = self.num_seeds, self.num_units
        total, freedom = self.unit, self.unit_freedom
        if s > 1:
            denominator = self.seed**2 / (s - 1) + self.unit**2 / freedom + self.rest**2 / ((s - 1) * freedom)
            total = self.seed + self.unit - self.rest
            freedom = max(s - 1, total**2 / denominator) if denominator > 0 else s - 1
        error = math.sqrt(max(total, self.seed) / (s * n))
        skewness = self.third_moment / n**2 / error**3 if error > 0 else 0.0
        alone = [(math.sqrt(self.seed / (s * n)), s - 1, 0.0)] if s > 1 else []
        return [(error, freedom, skewness), *alone]

    def interval(self, estimate: float) -> PairedInterval:
        """The interval, wherever the estimate lies; p: the level at which it reaches 0."""
        s, n, errors = self.num_seeds, self.num_units, self.errors()

        def half_width(quantile: float, side: int) -> float:
            return max(error * _skewed(float(stdtrit(f, quantile)), side * skewness) for error, f, skewness in errors)

        components = VarianceComponents(seed=0.0, unit=self.unit, rest=0.0)
        if s > 1:
            seed, unit = max(0.0, self.seed - self.rest) / n, max(0.0, self.unit - self.rest) / s
            components = VarianceComponents(seed=seed, unit=unit, rest=self.rest)
        p_values = []
        for error, freedom, skewness in errors:
            x = abs(estimate) / error if error > 0 else math.inf if estimate else 0.0
            k = math.copysign(skewness, skewness * estimate)
            t = min(x, x + k * x**2 / 3 + k**2 * x**3 / 27 + k / 6) if k and math.isfinite(x) else x
            p_values.append(2 * float(stdtr(freedom, -max(t, 0.0))))
        return PairedInterval(
            estimate=estimate,
            low=estimate - half_width(TWO_SIDED, 1),
            high=estimate + half_width(TWO_SIDED, -1),
            upper=estimate + half_width(ONE_SIDED, -1),
            p_value=max(p_values),
            num_seeds=s,
            num_units=n,
            effective_units=float(n),
            top_tenth=0.0,
            components=components,
        )


def _skewed(t: float, skewness: float) -> float:
    """The quantile of a statistic of such a skewness, not below `t`: Hall's transformation, inverted."""
    if abs(skewness) < 1e-6:
        return t
    return max(t, 3 / skewness * (float(np.cbrt(1 + skewness * (t - skewness / 6))) - 1))


def paired_interval(differences: Matrix, targets: NDArray[np.float64]) -> PairedInterval:
    """The interval of the module's docstring; with one seed it is of these two models alone (V = MS_b / N). Shapes:
    `differences` (seeds, units), `targets` (units,), of two units or more."""
    estimate = math.fsum(differences.ravel()) / (len(differences) * math.fsum(targets))
    s, n = differences.shape
    leverage = np.sqrt((1 - 1 / n) / (1 - targets / targets.sum()))
    residuals = leverage * (differences - estimate * targets) / targets.mean()
    unit_means, seed_means = residuals.mean(axis=0), residuals.mean(axis=1)
    deviations = unit_means - unit_means.mean()
    squares, sum_squares = deviations**2, float((deviations**2).sum())
    seed, rest, unit = 0.0, 0.0, s * float(unit_means.var(ddof=1))
    if s > 1:
        rests = residuals - unit_means - seed_means[:, None] + residuals.mean()
        seed, rest = n * float(seed_means.var(ddof=1)), float((rests**2).sum()) / ((s - 1) * (n - 1))
    interval = _MeanSquares(
        seed=seed,
        unit=unit,
        rest=rest,
        num_seeds=s,
        num_units=n,
        unit_freedom=max(1.0, float((targets**2).sum() ** 2 / (targets**4).sum()) - 1),
        third_moment=float((deviations**3).sum()) * n / ((n - 1) * (n - 2)) if n > 2 else 0.0,
    ).interval(estimate)
    if sum_squares == 0:  # the same difference in every unit
        return interval
    effective = min(n, 3 * sum_squares**2 / float((squares**2).sum()))
    top_tenth = float(np.sort(squares)[-math.ceil(n / 10) :].sum()) / sum_squares
    return replace(interval, effective_units=effective, top_tenth=top_tenth)


def score_interval(differences: Matrix, counts: NDArray[np.float64]) -> PairedInterval:
    """The interval of a difference of scores: `paired_interval` with two records more, points of 100. In one of them
    LoRA alone is right, in the other full alone (Bonett and Price, J. Educ. Behav. Stat. 37, 2012): where the modes
    seldom differ, a variance over records as they are is too small, and none where they never do."""
    both = np.tile([100.0, -100.0], (len(differences), 1))
    interval = paired_interval(np.hstack([differences, both]), np.append(counts, [1.0, 1.0]))
    estimate = math.fsum(differences.ravel()) / (len(differences) * math.fsum(counts))
    return replace(interval, estimate=estimate, num_units=len(counts))


def mcnemar_p(num_worse: int, num_better: int) -> float:
    """McNemar's exact test, two-sided: of the records that differ either mode has as many."""
    total = num_worse + num_better
    return min(1.0, 2 * float(bdtr(min(num_worse, num_better), total, 0.5))) if total else 1.0


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
    """The half width (nats per token) that so many seeds and units give on average, by the same rule. A standard
    deviation of f degrees of freedom is on average sqrt(2/f) Gamma((f+1)/2) / Gamma(f/2) times the true one."""
    seed, unit, rest = components.seed, components.unit, components.rest
    squares = _MeanSquares(
        seed=rest + num_units * seed,
        unit=rest + num_seeds * unit,
        rest=rest,
        num_seeds=num_seeds,
        num_units=num_units,
        unit_freedom=num_units - 1,
    )
    errors = squares.errors()
    return max(float(stdtrit(f, quantile) * np.sqrt(2 / f) * poch(f / 2, 0.5)) * error for error, f, _ in errors)


class SampleSize(NamedTuple):
    """What resolves a distance: seeds with today's units, units with today's seeds; None where no number does."""

    num_seeds: int | None
    num_units: int | None
    floor: float  # half width (nats per token) that today's units allow with any number of seeds


def plan_sample_size(interval: PairedInterval, *, is_one_sided: bool = False) -> SampleSize:
    """The seeds or units that make the half width smaller than the estimate: its distance to 0, or to the margin. `unit
    / N` of the variance is a floor that no number of seeds lowers. One seed knows no variance between seeds, so from
    one the answer is the smallest number of seeds by which a method can be judged."""
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
