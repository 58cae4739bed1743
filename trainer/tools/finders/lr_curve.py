"""What a learning-rate range test says: smoothing, divergence, suggestion. Pure.

The test: Smith, "Cyclical Learning Rates for Training Neural Networks" (2017, arXiv 1506.01186), section 3.3: raise the
rate step by step and watch the loss. The exponential sweep, the smoothing and the rule "a tenth of the rate at the
lowest loss" are those of fastai (Howard and Gugger 2020, arXiv 2002.04688).
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LAG = 0.1  # share of the sweep that smoothing looks back; fastai's 0.98 looks 50 steps back, half of a sweep of 100
CALM = 0.1  # share of the sweep, its lowest rates, that says where the loss stands and how much it jumps
RISEN = 0.25  # share of the loss at the start above it that counts as diverging; of its fall, as having risen again
FALLEN = 0.02  # share of it below it that counts as learning
JUMPS = 4.0  # standard errors that a rise or a fall must have as well


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the curve says; `suggestion` is None where it says nothing, `warning` how the range fell short."""

    suggestion: float | None
    lowest: float | None  #: rate at the lowest smoothed loss
    steepest: float | None  #: rate where the smoothed loss falls fastest
    warning: str


def rates(start: float, end: float, steps: int) -> list[float]:
    """`steps` rates from `start` to `end`, each the same factor above the last."""
    return [start * (end / start) ** (n / (steps - 1)) for n in range(steps)]


def smoothing(steps: int) -> float:
    """The weight of what came before, for a sweep of so many steps: 0.9 for 100."""
    return max(0.5, 1 - 1 / (LAG * steps))


def smooth(losses: Sequence[float], beta: float) -> list[float]:
    """The exponential mean of what came so far, without the pull of its start at zero (fastai's; Adam's correction)."""
    mean, means = 0.0, []
    for n, loss in enumerate(losses, start=1):
        mean = beta * mean + (1 - beta) * loss
        means.append(mean / (1 - beta**n))
    return means


def calm(losses: Sequence[float], steps: int) -> tuple[float, float]:
    """(loss at the start, standard error of a smoothed loss against it), from the first CALM of a sweep of `steps`.

    The noise is that of the differences from step to step, so that a steady rise is none.
    """
    first = losses[: _few(steps)]
    jumps = [b - a for a, b in itertools.pairwise(first)]
    noise = statistics.stdev(jumps) / math.sqrt(2) if len(jumps) > 1 else 0.0
    few = max(3, len(first) // 2)
    beta = smoothing(steps)
    return statistics.fmean(first[:few]), noise * math.sqrt((1 - beta) / (1 + beta) + 1 / few)


def _few(steps: int) -> int:
    return max(5, round(CALM * steps))


def diverged(losses: Sequence[float], steps: int) -> bool:
    """Whether the newest smoothed loss stands well above the start's, or is no number any more."""
    if not losses:
        return False
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) <= _few(steps):
        return False
    start, error = calm(losses, steps)
    return smooth(losses, smoothing(steps))[-1] > start + max(RISEN * start, JUMPS * error)


def judge(tried: Sequence[float], losses: Sequence[float], steps: int) -> Verdict:
    """The suggestion of a sweep of `steps` that ended after `losses`, or why there is none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    blown = diverged(losses, steps)
    few = _few(steps)
    if len(finite) <= few:
        return Verdict(
            suggestion=None, lowest=None, steepest=None,
            warning=f"the loss diverges from the start: begin lower than {tried[0]:g}",
        )  # fmt: skip
    means = smooth(finite, smoothing(steps))
    start, error = calm(finite, steps)
    best = min(range(few - 1, len(means)), key=means.__getitem__)
    fallen = start - means[best] > max(FALLEN * start, JUMPS * error)
    if not fallen:
        said = (
            f"the loss never falls before it rises: begin lower than {tried[0]:g}, or take more steps"
            if blown
            else f"the loss neither falls nor rises up to {tried[len(finite) - 1]:g}: end higher"
        )
        return Verdict(suggestion=None, lowest=None, steepest=None, warning=said)
    steepest = min(range(few, best + 1), key=lambda n: means[n] - means[n - 1], default=best)
    warning = ""
    # A small model's loss need not climb above where it began: it settles where the weights say nothing any more.
    risen = means[-1] - means[best] > max(RISEN * (start - means[best]), JUMPS * error)
    if not (blown or risen):
        top = tried[len(finite) - 1]
        warning = f"the loss does not rise again up to {top:g}: end higher, the best rate may lie above"
    elif best < 2 * few:
        warning = f"the loss is at its lowest close to the start of the range: begin lower than {tried[0]:g}"
    return Verdict(
        suggestion=_round(max(tried[best] / 10, tried[0])),
        lowest=tried[best],
        steepest=tried[steepest],
        warning=warning,
    )


def _round(rate: float) -> float:
    """Two digits: a range test knows no more."""
    return float(f"{rate:.1e}")
