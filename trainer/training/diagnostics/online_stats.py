"""The statistics of the rules: running sums, so that a run of any length costs the same."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, variance


@dataclass
class Line:
    """A straight line through (x, y) by least squares, from running sums."""

    n: int = 0
    x: float = 0.0  #: mean
    y: float = 0.0  #: mean
    xx: float = 0.0  #: sum of squared deviations
    yy: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Take one more point; the update of mean and deviations is Welford's (Technometrics 4, 1962)."""
        self.n += 1
        before_x, before_y = x - self.x, y - self.y
        self.x += before_x / self.n
        self.y += before_y / self.n
        self.xx += before_x * (x - self.x)
        self.yy += before_y * (y - self.y)
        self.xy += before_x * (y - self.y)

    @property
    def slope(self) -> float:
        """Change of y for one x; 0 where it is not determined."""
        return self.xy / self.xx if self.xx else 0.0

    @property
    def noise(self) -> float:
        """The variance of y around the line."""
        residual = self.yy - (self.xy**2 / self.xx if self.xx else 0.0)
        return max(0.0, residual) / max(1, self.n - 2)

    @property
    def t(self) -> float:
        """The slope over its own standard error, sqrt(noise / sum of squares of x).

        Draper and Smith, Applied Regression Analysis, chapter 1. It answers how far the trend stands out of the noise
        around it; 0 where there are too few points, infinite where there is no noise at all.
        """
        if self.n < 3 or not self.xx:
            return 0.0
        error = math.sqrt(self.noise / self.xx)
        return self.slope / error if error else math.copysign(math.inf, self.slope) if self.slope else 0.0


@dataclass(frozen=True)
class Mean:
    """The mean of some values and the variance of that mean."""

    value: float
    variance: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """Of two values or more."""
        values = list(values)
        return cls(fmean(values), variance(values) / len(values))


def welch(a: Mean, b: Mean) -> float:
    """By how many standard errors `a` lies above `b`, each with its own variance (Welch, Biometrika 34, 1947)."""
    error = math.sqrt(a.variance + b.variance)
    return (a.value - b.value) / error if error else math.copysign(math.inf, a.value - b.value) * (a.value != b.value)
