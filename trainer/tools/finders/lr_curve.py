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

SMOOTHING_SHARE = (
    0.1  # share of the sweep that smoothing looks back; fastai's 0.98 looks 50 steps back, half of a sweep of 100
)
BASELINE_SHARE = 0.1  # share of the sweep, its lowest rates, that says where the loss stands and how much it jumps
RISE_SHARE = (
    0.25  # share of the loss at the start above it that counts as diverging; of its fall, as having risen again
)
FALL_SHARE = 0.02  # share of it below it that counts as learning
MIN_STANDARD_ERRORS = 4.0  # standard errors that a rise or a fall must have as well


@dataclass(frozen=True, kw_only=True)
class LRSuggestion:
    """What the curve says; `lr` is None where it says nothing, `warning` how the range fell short."""

    lr: float | None
    lr_at_lowest_loss: float | None  #: rate at the lowest smoothed loss
    lr_at_steepest_fall: float | None  #: rate where the smoothed loss falls fastest
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
    return statistics.fmean(first_losses[:num_start_losses]), noise * math.sqrt(
        (1 - beta) / (1 + beta) + 1 / num_start_losses
    )


def _num_baseline_steps(steps: int) -> int:
    return max(5, round(BASELINE_SHARE * steps))


def has_diverged(losses: Sequence[float], steps: int) -> bool:
    """Whether the newest smoothed loss stands well above the start's, or is no number any more."""
    if not losses:
        return False
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) <= _num_baseline_steps(steps):
        return False
    start_loss, standard_error = estimate_baseline(losses, steps)
    return smooth(losses, smoothing_beta(steps))[-1] > start_loss + max(
        RISE_SHARE * start_loss, MIN_STANDARD_ERRORS * standard_error
    )


def suggest_lr(lrs: Sequence[float], losses: Sequence[float], steps: int) -> LRSuggestion:
    """The suggestion of a sweep of `steps` that ended after `losses`, or why there is none."""
    finite_losses = [loss for loss in losses if math.isfinite(loss)]
    is_diverged = has_diverged(losses, steps)
    num_baseline_steps = _num_baseline_steps(steps)
    if len(finite_losses) <= num_baseline_steps:
        return LRSuggestion(
            lr=None, lr_at_lowest_loss=None, lr_at_steepest_fall=None,
            warning=f"the loss diverges from the start: begin lower than {lrs[0]:g}",
        )  # fmt: skip
    smoothed_losses = smooth(finite_losses, smoothing_beta(steps))
    start_loss, standard_error = estimate_baseline(finite_losses, steps)
    best_index = min(range(num_baseline_steps - 1, len(smoothed_losses)), key=smoothed_losses.__getitem__)
    has_fallen = start_loss - smoothed_losses[best_index] > max(
        FALL_SHARE * start_loss, MIN_STANDARD_ERRORS * standard_error
    )
    if not has_fallen:
        reason = (
            f"the loss never falls before it rises: begin lower than {lrs[0]:g}, or take more steps"
            if is_diverged
            else f"the loss neither falls nor rises up to {lrs[len(finite_losses) - 1]:g}: end higher"
        )
        return LRSuggestion(lr=None, lr_at_lowest_loss=None, lr_at_steepest_fall=None, warning=reason)
    steepest_index = min(
        range(num_baseline_steps, best_index + 1),
        key=lambda n: smoothed_losses[n] - smoothed_losses[n - 1],
        default=best_index,
    )
    warning = ""
    # A small model's loss need not climb above where it began: it settles where the weights say nothing any more.
    has_risen = smoothed_losses[-1] - smoothed_losses[best_index] > max(
        RISE_SHARE * (start_loss - smoothed_losses[best_index]), MIN_STANDARD_ERRORS * standard_error
    )
    if not (is_diverged or has_risen):
        last_lr = lrs[len(finite_losses) - 1]
        warning = f"the loss does not rise again up to {last_lr:g}: end higher, the best rate may lie above"
    elif best_index < 2 * num_baseline_steps:
        warning = f"the loss is at its lowest close to the start of the range: begin lower than {lrs[0]:g}"
    return LRSuggestion(
        lr=_round_lr(max(lrs[best_index] / 10, lrs[0])),
        lr_at_lowest_loss=lrs[best_index],
        lr_at_steepest_fall=lrs[steepest_index],
        warning=warning,
    )


def _round_lr(lr: float) -> float:
    """Two digits: a range test knows no more."""
    return float(f"{lr:.1e}")
