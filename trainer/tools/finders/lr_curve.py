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

#: Share of the sweep that smoothing looks back; fastai's 0.98 looks 50 steps back, half of a sweep of 100.
SMOOTHING_SHARE = 0.1
BASELINE_SHARE = 0.1  # share of the sweep, its lowest rates, that says where the loss stands and how much it jumps
#: Share of the loss at the start above it that counts as diverging; of its fall, as having risen again.
RISE_SHARE = 0.25
FALL_SHARE = 0.02  # share of it below it that counts as learning
MIN_STANDARD_ERRORS = 4.0  # standard errors that a rise or a fall must have as well


@dataclass(frozen=True, kw_only=True)
class LRSuggestion:
    """What the curve says; `lr` is None where it says nothing, `warning` how the range fell short."""

    lr: float | None = None
    lr_at_lowest_loss: float | None = None  #: rate at the lowest smoothed loss
    lr_at_steepest_fall: float | None = None  #: rate where the smoothed loss falls fastest
    warning: str


def geometric_lrs(start: float, end: float, steps: int) -> list[float]:
    """`steps` rates from `start` to `end`, each the same factor above the last."""
    return [start * (end / start) ** (n / (steps - 1)) for n in range(steps)]


def smoothing_beta(steps: int) -> float:
    """The weight of what came before, for a sweep of so many steps: 0.9 for 100."""
    return max(0.5, 1 - 1 / (SMOOTHING_SHARE * steps))


def smooth(losses: Sequence[float], beta: float) -> list[float]:
    """The exponential mean of what came so far, without the pull of its start at zero (fastai's; Adam's correction)."""
    mean, means = 0.0, []
    for n, loss in enumerate(losses, start=1):
        mean = beta * mean + (1 - beta) * loss
        means.append(mean / (1 - beta**n))
    return means


def estimate_baseline(losses: Sequence[float], steps: int) -> tuple[float, float]:
    """(loss at the start, standard error of a smoothed loss against it), from the first BASELINE_SHARE of `steps`.

    The noise is that of the differences from step to step, so that a steady rise is none.
    """
    first_losses = losses[: _num_baseline_steps(steps)]
    differences = [b - a for a, b in itertools.pairwise(first_losses)]
    noise = statistics.stdev(differences) / math.sqrt(2) if len(differences) > 1 else 0.0
    num_start_losses = max(3, len(first_losses) // 2)
    beta = smoothing_beta(steps)
    standard_error = noise * math.sqrt((1 - beta) / (1 + beta) + 1 / num_start_losses)
    return statistics.fmean(first_losses[:num_start_losses]), standard_error


def _num_baseline_steps(steps: int) -> int:
    return max(5, round(BASELINE_SHARE * steps))


def has_diverged(losses: Sequence[float], steps: int) -> bool:
    """Whether the newest smoothed loss stands well above the start's, or is no number any more."""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) <= _num_baseline_steps(steps):
        return False
    start_loss, standard_error = estimate_baseline(losses, steps)
    min_rise = max(RISE_SHARE * start_loss, MIN_STANDARD_ERRORS * standard_error)
    return smooth(losses, smoothing_beta(steps))[-1] > start_loss + min_rise


def suggest_lr(lrs: Sequence[float], losses: Sequence[float], steps: int) -> LRSuggestion:
    """The suggestion of a sweep of `steps` that ended after `losses`, or why there is none."""
    finite_losses = [loss for loss in losses if math.isfinite(loss)]
    is_diverged = has_diverged(losses, steps)
    num_baseline_steps = _num_baseline_steps(steps)
    if len(finite_losses) <= num_baseline_steps:
        return LRSuggestion(warning=f"the loss diverges from the start: begin lower than {lrs[0]:g}")
    last_lr = lrs[len(finite_losses) - 1]
    smoothed = smooth(finite_losses, smoothing_beta(steps))
    start_loss, standard_error = estimate_baseline(finite_losses, steps)
    best = min(range(num_baseline_steps - 1, len(smoothed)), key=smoothed.__getitem__)
    fall, min_change = start_loss - smoothed[best], MIN_STANDARD_ERRORS * standard_error
    if fall <= max(FALL_SHARE * start_loss, min_change):
        if is_diverged:
            reason = f"the loss never falls before it rises: begin lower than {lrs[0]:g}, or take more steps"
        else:
            reason = f"the loss neither falls nor rises up to {last_lr:g}: end higher"
        return LRSuggestion(warning=reason)
    falls = range(num_baseline_steps, best + 1)
    steepest = min(falls, key=lambda n: smoothed[n] - smoothed[n - 1], default=best)
    warning = ""
    # A small model's loss need not climb above where it began: it settles where the weights say nothing any more.
    has_risen = smoothed[-1] - smoothed[best] > max(RISE_SHARE * fall, min_change)
    if not (is_diverged or has_risen):
        warning = f"the loss does not rise again up to {last_lr:g}: end higher, the best rate may lie above"
    elif best < 2 * num_baseline_steps:
        warning = f"the loss is at its lowest close to the start of the range: begin lower than {lrs[0]:g}"
    lr = float(f"{max(lrs[best] / 10, lrs[0]):.1e}")  # two digits: a range test knows no more
    return LRSuggestion(lr=lr, lr_at_lowest_loss=lrs[best], lr_at_steepest_fall=lrs[steepest], warning=warning)
