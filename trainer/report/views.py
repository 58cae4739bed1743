"""Full against LoRA at equal tokens, FLOPs, seconds and peak memory: from what runs had spent for a loss.

A curve is one seed's way of one mode, a frame of losses (nats per token) and what was spent until then, one column a
resource: from the evaluations of a run or from whole runs of several lengths. Within a budget a curve has the loss that
it reaches: linear in the logarithm of what was spent between two points, never beyond its last. The budget of a view is
the largest that every curve reaches. Views are exploratory: the sentence is about the comparison at equal tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import pandas as pd

from trainer.report.interval import PairedInterval, seeds_interval

#: of each resource its name, and how an amount reads; seconds are timed in alternation, a run's own clock is none
RESOURCES: dict[str, tuple[str, Callable[[float], str]]] = {
    "tokens": ("tokens", "{:,.0f}".format),
    "flops": ("FLOPs", "{:.3g}".format),
    "seconds": ("seconds", "{:.4g} s".format),
    "peak_memory_bytes": ("peak memory", lambda amount: f"{amount / 1e9:.2f} GB"),
}
MEMORY_SLACK = 0.05  # peaks of a processor's process differ by so much from run to run: 1 % decided a study's view


@dataclass(frozen=True)
class View:
    """Both modes within one budget, losses as means over seeds; `reason` says why there is none."""

    resource: str
    budget: float | None = None
    full_loss: float | None = None  #: None where full does not fit into the budget
    lora_loss: float | None = None
    difference: PairedInterval | None = None  #: LoRA - full over seeds, None below two pairs
    reason: str = ""

    @property
    def favours(self) -> Literal["lora", "full", ""]:
        """The mode ahead: the one that fits, or by the interval where there is one; "" where that is not known."""
        if self.difference is not None and not self.difference.excludes_zero:
            return ""
        full, lora = (math.inf if loss is None else loss for loss in (self.full_loss, self.lora_loss))
        return "lora" if lora < full else "full" if full < lora else ""

    def describe(self) -> str:
        """`at equal FLOPs (1.2e+12): LoRA 2.1034, full 2.1423, difference -0.0389 [-0.0500, -0.0278]`."""
        name, format_amount = RESOURCES[self.resource]
        if self.budget is None:
            return f"at equal {name}: not known ({self.reason})"
        losses = {"LoRA": self.lora_loss, "full": self.full_loss}
        parts = [f"{mode} does not fit" if loss is None else f"{mode} {loss:.4f}" for mode, loss in losses.items()]
        if self.difference is not None:
            parts.append(f"difference {self.difference} over seeds")
        elif self.full_loss is not None and self.lora_loss is not None:
            parts.append(f"difference {self.lora_loss - self.full_loss:+.4f}")
        return f"at equal {name} ({format_amount(self.budget)}): {', '.join(parts)}"


def build_views(
    full: Sequence[pd.DataFrame], lora: Sequence[pd.DataFrame], *, no_seconds: str = "not timed"
) -> tuple[View, ...]:
    """One view a resource, of one or more curves paired by seed; `no_seconds`: why there are none."""
    views = []
    for resource in RESOURCES:
        if any(curve.empty or curve[resource].isna().any() for curve in (*full, *lora)):
            reason = no_seconds if resource == "seconds" else "not recorded by every run"
            views.append(View(resource, reason=reason))
            continue
        if resource == "peak_memory_bytes":
            # memory is held, not used up: the budget is what the thriftier mode needs, and a mode fits or does not
            budget = min(max(float(curve[resource].min()) for curve in curves) for curves in (full, lora))
        else:
            budget = min(float(curve[resource].max()) for curve in (*full, *lora))
        losses = [[_loss_within(curve, resource, budget) for curve in curves] for curves in (full, lora)]
        fitting = [[loss for loss in values if loss is not None] for values in losses]
        full_loss, lora_loss = (fmean(a) if len(a) == len(b) else None for a, b in zip(fitting, losses, strict=True))
        difference = None
        if len(full) > 1 and full_loss is not None and lora_loss is not None:
            difference = seeds_interval([b - a for a, b in zip(*fitting, strict=True)])
        views.append(View(resource, budget, full_loss, lora_loss, difference))
    return tuple(views)


def _loss_within(curve: pd.DataFrame, resource: str, budget: float) -> float | None:
    """The lowest loss that a curve reaches within a budget; None where its first point is beyond it."""
    if resource == "peak_memory_bytes":
        budget *= 1 + MEMORY_SLACK
    points = sorted(zip(curve[resource].astype(float).tolist(), curve["loss"].tolist(), strict=True))
    within = [loss for spent, loss in points if spent <= budget]
    if within and len(within) < len(points) and resource != "peak_memory_bytes":
        (a, loss_a), (b, loss_b) = points[len(within) - 1], points[len(within)]
        if 0 < a < b:
            within.append(loss_a + (loss_b - loss_a) * math.log(budget / a) / math.log(b / a))
    return min(within, default=None)


def describe_views(views: Sequence[View]) -> list[str]:
    """One line a view beside equal tokens; where another mode is ahead than at equal tokens, it says so."""
    names = {"lora": "LoRA is ahead", "full": "full is ahead", "": "neither is ahead for certain"}
    by_tokens = names[next((view.favours for view in views if view.resource == "tokens"), "")]
    lines = []
    for view in (view for view in views if view.resource != "tokens"):
        line, ahead = view.describe(), names[view.favours]
        if view.budget is not None and ahead != by_tokens:
            line = f"{ahead} {line}, where at equal tokens {by_tokens}"
        lines.append(f"Exploratory: {line}.")
    return lines
