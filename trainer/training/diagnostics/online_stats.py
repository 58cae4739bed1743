"""The statistics of the rules: running sums, so that a run of any length costs the same."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean


@dataclass
class OnlineLinearRegression:
    """A straight line through (x, y) by least squares, from running sums."""

    n: int = 0
    mean_x: float = 0.0
    mean_y: float = 0.0
    sum_xx: float = 0.0  #: sums of products of deviations from the means
    sum_yy: float = 0.0
    sum_xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take one more point; the update of mean and deviations is Welford's (Technometrics 4, 1962)."""
        self.n += 1
        delta_x, delta_y = x - self.mean_x, y - self.mean_y
        self.mean_x += delta_x / self.n
        self.mean_y += delta_y / self.n
        self.sum_xx += delta_x * (x - self.mean_x)
        self.sum_yy += delta_y * (y - self.mean_y)
        self.sum_xy += delta_x * (y - self.mean_y)

    @property
    def slope(self) -> float:
        """Change of y for one x; 0 where it is not determined."""
        return self.sum_xy / self.sum_xx if self.sum_xx else 0.0

    @property
    def mean_variance(self) -> float:
        """The variance of the mean of y, of two points or more."""
        return self.sum_yy / (self.n - 1) / self.n

    @property
    def residual_variance(self) -> float:
        """The variance of y around the line."""
        residual = self.sum_yy - (self.sum_xy**2 / self.sum_xx if self.sum_xx else 0.0)
        return max(0.0, residual) / max(1, self.n - 2)

    @property
    def t_statistic(self) -> float:
        """The slope over its own standard error, sqrt(noise / sum of squares of x).

        Draper and Smith, Applied Regression Analysis, chapter 1. It answers how far the trend stands out of the noise
        around it; 0 where there are too few points, infinite where there is no noise at all.
        """
        if self.n < 3 or not self.sum_xx:
            return 0.0
        return _in_std_errors(self.slope, self.residual_variance / self.sum_xx)


@dataclass(frozen=True)
class MeanEstimate:
    """The mean of some values and the variance of that mean."""

    value: float
    variance: float

    @classmethod
    def from_values(cls, values: Iterable[float]) -> "MeanEstimate":
        """Of two values or more."""
        values = list(values)  # in floats: statistics.variance takes fractions, 100 us for the 20 values of every step
        mean = fmean(values)
        return cls(mean, math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def welch_t(a: MeanEstimate, b: MeanEstimate) -> float:
    """By how many standard errors `a` lies above `b`, each with its own variance (Welch, Biometrika 34, 1947)."""
    return _in_std_errors(a.value - b.value, a.variance + b.variance)


def _in_std_errors(value: float, variance: float) -> float:
    if not value or not variance:
        return math.copysign(math.inf, value) if value else 0.0
    return value / math.sqrt(variance)
