"""A LoRA group held against a full one, run by run of the same seed: excess loss with its interval, and what it cost.

Runs are paired by seed. What may not be ranked gets no number; a ratio of time or memory is given only where both were
measured under the same conditions, and is withheld with the reason where they were not.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.report.comparable import (
    MODE_NAMES,
    SeedGroup,
    comparable_sets,
    comparison_blockers,
    ranking_blockers,
    reference_blockers,
)
from trainer.report.interval import (
    MIN_UNITS,
    Matrix,
    PairedInterval,
    paired_interval,
    plan_sample_size,
    seeds_interval,
)
from trainer.report.matched import MatchedLosses, MatchError, Pairs, RefusedError, match_losses
from trainer.report.views import View, build_views

NUM_LEFT_OUT = 5  # records without which LoRA must still be good enough
MarginKind = Literal["share", "nats", "bits_per_byte"]


@dataclass(frozen=True, kw_only=True)
class Margin:
    """How much worse than full is still good enough: a share of what full gained, nats per token, or bits per byte."""

    kind: MarginKind = "share"
    value: float = 0.02

    def describe(self, losses: MatchedLosses | None = None) -> str:
        """`2 % of what full gained (0.0400)`: in nats per token where the losses and the base's are known."""
        if self.kind != "share":
            return f"{self.value:g} {'nats per token' if self.kind == 'nats' else 'bits per byte'}"
        amount = ""
        if losses is not None and losses.base is not None:
            amount = f" ({self.value * losses.mean_loss(losses.base - losses.full):.4f})"
        return f"{100 * self.value:g} % of what full gained{amount}"

    def why_not(self, losses: MatchedLosses) -> str:
        """Why these losses cannot be held against it, "" where they can."""
        if self.kind == "share" and losses.base is None:
            return "the base's losses of these records are not there"
        if self.kind == "bits_per_byte" and not losses.num_bytes.all():
            return "the bytes of these records are not known; give the margin in nats"
        return ""

    def contrast(self, losses: MatchedLosses) -> Matrix:
        """LoRA's excess beyond the margin in nats, (seeds, units): below 0 is inside. `why_not` must have no reason."""
        allowed = losses.targets * self.value
        if self.kind == "share":  # what full gained is an estimate too: its error is part of the contrast
            assert losses.base is not None
            allowed = self.value * (losses.base - losses.full)
        elif self.kind == "bits_per_byte":
            allowed = self.value * (np.log(2) * losses.num_bytes)
        return np.asarray(losses.lora - losses.full - allowed, dtype=np.float64)


DEFAULT_MARGIN = Margin()


def parse_margin(text: str) -> Margin:
    """A number above 0 with its unit, as `2%`, `0.01nats` or `0.005bpb`; UserError otherwise."""
    kinds: dict[str, tuple[MarginKind, float, float]] = {  # by suffix: kind, factor, and what a number must stay under
        "%": ("share", 0.01, 100),
        "nats": ("nats", 1.0, math.inf),
        "bpb": ("bits_per_byte", 1.0, math.inf),
    }
    match = re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?) *(%|nats|bpb)", text)
    if match:
        kind, factor, limit = kinds[match[2]]
        if 0 < float(match[1]) < limit:
            return Margin(kind=kind, value=float(match[1]) * factor)
    raise UserError(f"--margin {text}: expected a number above 0 and its unit, such as 2%, 0.01nats or 0.005bpb")


@dataclass(frozen=True, kw_only=True)
class CostRatio:
    """LoRA's cost over full's, None with the reason where they may not be divided; the costs themselves beside it."""

    ratio: float | None
    reason: str
    full: float | None  #: mean over runs, in seconds or bytes
    lora: float | None
    is_of_a_step: bool = False  #: whether the costs are those of a step instead of a run


@dataclass(frozen=True, kw_only=True)
class RateCurve:
    """Validation losses (nats per token) of one mode by learning rate, of runs of one length."""

    mode: str
    losses: Mapping[float, float]
    num_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """How the compared settings were chosen, by whom and on what: what a study knows and its answer's runs do not."""

    choice: str  #: the end of the sentence
    lines: tuple[str, ...]  #: for people: rule, searches, timing
    rate_curves: tuple[RateCurve, ...]  #: of its searches, the whole runs last
    views: tuple[View, ...]  #: both modes at equal cost, on the searches' curves
    step_time: CostRatio  #: of a step of each mode, timed in alternation
    rule: Mapping[str, Any]  #: the content of its rule.json
    facts: Mapping[str, Any]  #: further content of answer.json


@dataclass(frozen=True, kw_only=True)
class FullVsLora:
    """A LoRA group against a full one on the same data; None where a number cannot be had."""

    full: SeedGroup
    lora: SeedGroup
    pairs: Pairs
    blockers: tuple[str, ...]  #: why they may not be ranked
    margin: Margin
    full_loss: float  #: mean over seeds of what is judged, nats per token
    lora_loss: float
    losses: MatchedLosses | None
    no_losses: str  #: why single records could not be paired
    excess: PairedInterval | None
    contrast: PairedInterval | None  #: excess beyond the margin
    doubts: Mapping[str, str]  #: why these records do not let an answer be given that its interval would, by answer
    decisive: tuple[tuple[str, float], ...]  #: (unit, LoRA's excess in nats per token) that move the interval most
    parameters: float  #: trainable ones, LoRA's / full's
    time: CostRatio
    memory: CostRatio

    @property
    def answer(self) -> str:
        """not ranked, better, good enough, worse (by more than the margin, where it is known) or cannot tell."""
        if self.blockers:
            return "not ranked"
        if self.excess is None:
            return "cannot tell"
        answers = {
            "better": self.excess.high < 0,
            "good enough": self.contrast is not None and self.contrast.upper < 0,
            "worse": self.excess.low > 0 and (self.contrast or self.excess).low > 0,
        }
        shown = (answer for answer, is_shown in answers.items() if is_shown and answer not in self.doubts)
        return next(shown, "cannot tell")

    @property
    def doubt(self) -> str:
        """Why these records do not let LoRA be called good enough, or better; "" where nothing speaks against it."""
        return self.doubts.get("good enough") or self.doubts.get("better", "")

    @property
    def is_margin_under_floor(self) -> bool:
        """Whether it cannot be told, and no number of seeds resolves the margin with these records."""
        if self.answer != "cannot tell" or self.excess is None or self.contrast is None or not self.contrast.num_units:
            return False
        floor = plan_sample_size(self.contrast, is_one_sided=True).floor
        return floor >= self.excess.estimate - self.contrast.estimate

    @property
    def views(self) -> tuple[View, ...]:
        """Both modes at equal tokens, FLOPs, seconds and peak memory; none where they may not be ranked.

        The curves are the evaluations of the paired runs: within a budget they stand before their schedules' ends.
        """
        if self.blockers:
            return ()
        curves: dict[str, list[pd.DataFrame]] = {"full": [], "lora": []}
        for run in (run for pair in self.pairs for run in pair):
            curve = pd.DataFrame({name: run.evals[name] for name in ("step", "loss", "tokens")})
            curve = curve[(curve["step"] > 0) & np.isfinite(curve["loss"])]
            step_flops = run.get("model.step_flops")
            curve["flops"] = np.nan if step_flops is None else step_flops * curve["step"]
            curve["seconds"] = np.nan
            memory = None if run.get("resumed") else run.summary.get("peak_memory_bytes")
            curve["peak_memory_bytes"] = np.nan if memory is None else memory
            curves[run.mode].append(curve)
        return build_views(curves["full"], curves["lora"], no_seconds=self.time.reason)


def compare_groups(full: SeedGroup, lora: SeedGroup, margin: Margin, step_time: CostRatio | None = None) -> FullVsLora:
    """The comparison of two groups on the same data, of which each has a finished run."""
    pairs = pair_by_seed(full, lora)
    reasons = [reason for pair in pairs for reason in ranking_blockers(*pair)]
    reasons += [reason for pair in pairs for run in pair for reason in comparison_blockers(pairs[0][0], run)]
    if not pairs:
        seeds = [
            ", ".join(sorted({str(run.get("settings.train.seed")) for run in group.finished_runs}))
            for group in (lora, full)
        ]
        reasons = [f"other data order (seeds {seeds[0]} against {seeds[1]})"]
    reasons += [group.divergence for group in (full, lora) if group.divergence]
    losses, no_losses, excess, contrast = None, "", None, None
    doubts, decisive = dict[str, str](), tuple[tuple[str, float], ...]()
    full_loss, lora_loss = full.best_loss, lora.best_loss
    try:
        losses = None if reasons else match_losses(pairs)
    except RefusedError as error:
        reasons = [str(error)]
    except MatchError as error:
        no_losses = str(error)

    if losses is not None:
        full_loss, lora_loss = losses.mean_loss(losses.full), losses.mean_loss(losses.lora)
        differences = losses.lora - losses.full
        excess = paired_interval(differences, losses.targets)
        doubts["better"] = question_units(losses, differences, excess, "better")
        order = most_influential(differences, losses.targets, excess)
        if not margin.why_not(losses):
            beyond = margin.contrast(losses)
            contrast = paired_interval(beyond, losses.targets)
            doubts["good enough"] = question_units(losses, beyond, contrast, "good enough")
            order = most_influential(beyond, losses.targets, contrast)
        means = differences.mean(axis=0) / losses.targets
        decisive = tuple((str(losses.units[i]), float(means[i])) for i in order)
        if len(losses.units) < MIN_UNITS:
            few = f"{len(losses.units)} {losses.unit_name} can be told apart, and at least {MIN_UNITS} are needed"
            doubts = dict.fromkeys(("better", "good enough", "worse"), few)
    elif no_losses:  # without single records: whole losses, and intervals over seeds alone
        best = [[run.best_eval["loss"] for run in pair if run.best_eval] for pair in pairs]
        full_loss, lora_loss = (sum(of_mode) / len(best) for of_mode in zip(*best, strict=True))
        if len(pairs) > 1:
            excess = seeds_interval([b - a for a, b in best])
        if len(pairs) > 1 and margin.kind == "nats":
            contrast = seeds_interval([b - a - margin.value for a, b in best])

    if step_time is None:  # runs' own clocks hold whatever else the machine did: 0.98 and 1.14 of the very same runs
        step_time = compare_costs(full, lora, "wall_seconds")
        reason = step_time.reason or "not timed in alternation on one machine"
        step_time = replace(step_time, ratio=None, reason=reason)
    return FullVsLora(
        full=full,
        lora=lora,
        pairs=pairs,
        blockers=tuple(dict.fromkeys(reasons)),
        margin=margin,
        full_loss=full_loss,
        lora_loss=lora_loss,
        losses=losses,
        no_losses=no_losses,
        excess=excess,
        contrast=contrast,
        doubts={answer: doubt for answer, doubt in doubts.items() if doubt},
        decisive=decisive,
        parameters=lora.runs[0].get("model.trainable") / full.runs[0].get("model.trainable"),
        time=step_time,
        memory=compare_costs(full, lora, "peak_memory_bytes"),
    )


def most_influential(values: Matrix, targets: NDArray[np.float64], interval: PairedInterval) -> NDArray[np.int64]:
    """The few units of `values` (seeds, units) that move their interval most."""
    return np.argsort(-np.abs(values.mean(axis=0) - interval.estimate * targets))[:NUM_LEFT_OUT]


def question_units(
    losses: MatchedLosses, values: Matrix, interval: PairedInterval, answer: Literal["better", "good enough"]
) -> str:
    """Why these units do not let LoRA be called so, though the interval of `values` (seeds, units) is below 0.

    Two-sided for better, one-sided for good enough; "" where they let it, or the interval is not below 0.
    """
    name, bound = losses.unit_name, "high" if answer == "better" else "upper"
    if getattr(interval, bound) >= 0:
        return ""
    if interval.effective_units < MIN_UNITS:
        worth = f"{len(losses.units)} {name} count for {interval.effective_units:.0f}, as a few of them differ most"
        return f"{worth}, and at least {MIN_UNITS} are needed"
    order = most_influential(values, losses.targets, interval)
    again = paired_interval(np.delete(values, order, axis=1), np.delete(losses.targets, order))
    if getattr(again, bound) >= 0:
        return f"without the {NUM_LEFT_OUT} {name} that differ most it would not be {answer}"
    return ""


def pair_by_seed(full: SeedGroup, lora: SeedGroup) -> Pairs:
    """(full, LoRA) of each seed that both groups have; a seed twice in a group counts once, by its first run."""
    full_runs, lora_runs = (
        {run.get("settings.train.seed"): run for run in reversed(group.finished_runs)} for group in (full, lora)
    )
    return [(full_runs[seed], lora_runs[seed]) for seed in sorted(full_runs.keys() & lora_runs.keys(), key=str)]


def compare_costs(full: SeedGroup, lora: SeedGroup, key: str) -> CostRatio:
    """Means over finished runs, divided where both groups were measured under the same conditions."""
    costs: list[float | None] = []
    for group in (full, lora):
        values = [run.summary[key] for run in group.finished_runs if key in run.summary]
        costs.append(sum(values) / len(values) if len(values) == len(group.finished_runs) else None)
    full_cost, lora_cost = costs
    resumed = [run.name for run in (*full.finished_runs, *lora.finished_runs) if run.get("resumed")]
    reasons = [f"{resumed[0]} was resumed and measured in parts"] if resumed else []
    conditions = {
        "hardware": ("hardware.cpu", "hardware.cores", "hardware.gpu", "hardware.gpus", "resolved.device"),
        "number of ranks": ("resolved.ranks", "resolved.nodes"),
    }
    for name, paths in conditions.items():
        full_facts, lora_facts = ([group.finished_runs[0].get(path) for path in paths] for group in (full, lora))
        if full_facts != lora_facts:
            reasons.append(f"other {name}")
    ratio = None
    if not lora_cost or not full_cost:
        reasons.append("not measured")
    elif not reasons:
        ratio = lora_cost / full_cost
    return CostRatio(ratio=ratio, reason=reasons[0] if reasons else "", lora=lora_cost, full=full_cost)


def compare_sets(
    groups: Sequence[SeedGroup], margin: Margin, study: StudyContext | None
) -> list[tuple[list[FullVsLora], list[SeedGroup], list[SeedGroup]]]:
    """For each set of finished groups on the same data that has both modes: its comparisons, full and LoRA groups.

    Each LoRA group is held against the best full group that it may be ranked with. The first comparison is the best
    pair ranked, of a study the one that it is about: its first.
    """
    sets = []
    for members in comparable_sets(groups, lambda group: group.runs[0]):
        full_groups, lora_groups = ([group for group in members if group.mode == mode] for mode in MODE_NAMES)
        if not full_groups or not lora_groups:
            continue
        if study is None:
            full_groups.sort(key=lambda group: group.best_loss)
            lora_groups.sort(key=lambda group: group.best_loss)
        comparisons = []
        for lora in lora_groups:
            pairs = {i: pair_by_seed(full, lora) for i, full in enumerate(full_groups)}
            may_be_ranked = (i for i in pairs if pairs[i] and not any(ranking_blockers(*pair) for pair in pairs[i]))
            full = full_groups[next(may_be_ranked, 0)]
            comparisons.append(compare_groups(full, lora, margin, study.step_time if study else None))
        if study is None:
            comparisons.sort(key=lambda comparison: bool(comparison.blockers))
        sets.append((comparisons, full_groups, lora_groups))
    return sets


def difference_to_reference(group: SeedGroup, epoch: float) -> float | None:
    """Mean validation loss minus the card's at `epoch`; None where either is missing or a run is not comparable."""
    row = next((row for row in reference.CURVE if row.epoch == epoch), None)
    if row is None or any(reference_blockers(run) for run in group.runs):
        return None
    run_indices = [(run, run.index_at_epoch(run.evals, epoch)) for run in group.runs]
    losses = [float(run.evals["loss"][index]) for run, index in run_indices if index is not None]
    return sum(losses) / len(losses) - row.val_loss if losses else None
