"""A LoRA group held against a full one, run by run of the same seed: excess loss with its interval, and what it cost.

What may not be ranked gets no number; a ratio of time or memory only what was measured under the same conditions.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from trainer.config.errors import UserError
from trainer.report.comparable import MODE_NAMES, SeedGroup, comparable_sets, comparison_blockers, ranking_blockers
from trainer.report.interval import (
    MIN_UNITS,
    Matrix,
    PairedInterval,
    mcnemar_p,
    paired_interval,
    plan_sample_size,
    score_interval,
)
from trainer.report.run_data import (
    LOSS,
    UNIT,
    MatchedRecords,
    MatchError,
    NotNewError,
    Pairs,
    RefusedError,
    match_records,
    read_records,
)

NUM_LEFT_OUT = 5  # records without which LoRA must still be good enough
NEAR_ZERO = 5  # points of 100
#: what time and memory depend on, beside the method
COST_CONDITIONS = {
    "hardware": ("hardware.cpu", "hardware.cores", "hardware.gpu", "hardware.gpus", "resolved.device"),
    "number of ranks": ("resolved.ranks", "resolved.nodes"),
    "ZeRO file": ("resolved.ds_config",),
    "micro-batch": ("resolved.micro_batch",),
    "number of threads": ("resolved.threads_per_rank",),
}
MarginKind = Literal["share", "nats", "bits_per_byte", "points"]


@dataclass(frozen=True, kw_only=True)
class Margin:
    """How much worse than full is still good enough, and in which measure. Of a loss: a share of what full gained, nats
    per token, or bits per byte; of a score: points of 100."""

    kind: MarginKind = "share"
    value: float = 0.02
    measure: str = LOSS  #: what decides: loss or score:NAME

    @property
    def is_default(self) -> bool:
        return self == parse_margin(None, self.measure)

    def describe(self, judged: MatchedRecords | None = None, full: str = "full") -> str:
        """`2 % of what full gained (0.0400)`: with its amount where the losses and the base's are known."""
        if self.kind != "share":
            return f"{self.value:g} {dict(nats=UNIT, bits_per_byte='bits per byte', points='points')[self.kind]}"
        amount = ""
        if judged is not None and judged.base is not None:
            amount = f" ({self.value * judged.mean(judged.base - judged.full):.4f})"
        return f"{100 * self.value:g} % of what {full} gained{amount}"

    def why_not(self, judged: MatchedRecords) -> str:
        """Why these records cannot be held against it, "" where they can."""
        if self.kind == "share" and judged.base is None:
            return "the base's losses of these records are not there"
        if self.kind == "bits_per_byte" and judged.unit == UNIT and not judged.num_bytes.all():
            return "the bytes of these records are not known; give the margin in nats"
        return ""

    def contrast(self, judged: MatchedRecords) -> Matrix:
        """LoRA's excess beyond the margin, (seeds, units): below 0 is inside. `why_not` must have no reason."""
        allowed = judged.weights * self.value
        if self.kind == "share":  # what full gained is an estimate too: its error is part of the contrast
            assert judged.base is not None
            allowed = self.value * (judged.base - judged.full)
        elif self.kind == "bits_per_byte" and judged.unit == UNIT:
            allowed = self.value * (np.log(2) * judged.num_bytes)
        return np.asarray(judged.lora - judged.full - allowed, dtype=np.float64)


DEFAULT_MARGIN = Margin()


def parse_margin(text: str | None, measure: str = LOSS) -> Margin:
    """The margin of `measure`, `loss` or `score:NAME`: a number above 0 with a unit of that measure; UserError. `2%`,
    `0.01nats` or `0.005bpb` of a loss, `2pt` of a score. None: 2 % or 2 points."""
    if measure != LOSS and not re.fullmatch(r"score:.+", measure):
        raise UserError(f"--decide-by {measure}: expected loss or score:NAME, such as score:exact")
    units: dict[str, tuple[MarginKind, float, float]] = {  # by suffix: kind, factor, and what a number must stay under
        "%": ("share", 0.01, 100),
        "nats": ("nats", 1.0, math.inf),
        "bpb": ("bits_per_byte", 1.0, math.inf),
    }
    examples = "2%, 0.01nats or 0.005bpb of a loss"
    if measure != LOSS:
        units, examples = {"pt": ("points", 1.0, 100)}, f"2pt of {measure}"
    text = text or examples[:3].rstrip(",")
    match = re.fullmatch(r"(\d*\.?\d+(?:e-?\d+)?) *(%|nats|bpb|pt)", text)
    if match and match[2] in units:
        kind, factor, limit = units[match[2]]
        if 0 < float(match[1]) < limit:
            return Margin(kind=kind, value=float(match[1]) * factor, measure=measure)
    raise UserError(f"--margin {text}: expected a number above 0 and its unit, such as {examples}")


@dataclass(frozen=True, kw_only=True)
class CostRatio:
    """LoRA's time of a step or memory over full's, None with the reason where there is none; both beside it."""

    ratio: float | None
    reason: str
    full: float | None  #: seconds of a step, or bytes as a mean over runs
    lora: float | None


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
    step_time: CostRatio  #: of a step of each mode, timed in alternation
    memory: CostRatio  #: their peak memory, from the same runs
    rule: Mapping[str, Any]  #: the content of its rule.json
    facts: Mapping[str, Any]  #: further content of answer.json
    by_length: Sequence[tuple[int, PairedInterval]] = ()  #: LoRA's excess on validation records, by steps of a run


class Tradeoff(NamedTuple):
    """What one setting gained on the judged records and forgot of the retained text, nats per token."""

    gain: PairedInterval
    forgetting: PairedInterval


@dataclass(kw_only=True, eq=False)
class FullVsLora:
    """A LoRA group against a full one on the same data; None where a number cannot be had."""

    full: SeedGroup
    lora: SeedGroup
    pairs: Pairs
    margin: Margin
    blockers: Sequence[str]  #: why they may not be ranked
    are_records_new: bool = True  #: False where too many were trained on
    full_loss: float  #: mean over seeds of what is judged, nats per token
    lora_loss: float
    losses: MatchedRecords | None = None
    judged: MatchedRecords | None = None  #: by what the answer is drawn: the losses, or a score of the same records
    no_losses: str = ""  #: why single records could not be paired
    excess: PairedInterval | None = None  #: in the unit of the margin's measure
    contrast: PairedInterval | None = None  #: excess beyond the margin
    mcnemar: float | None = None  #: p of McNemar's exact test, of one seed whose records are right or wrong
    #: by mode, where both measured what they forgot
    tradeoffs: Mapping[str, Tradeoff] = field(default_factory=dict)
    forgetting: PairedInterval | None = None  #: LoRA's minus full's, nats per token of the retained text
    forgetting_points: PairedInterval | None = None  #: likewise of a score that decides, where there is one
    #: why these records do not let an answer be given that its interval would, by answer
    doubts: Mapping[str, str] = field(default_factory=dict)
    decisive: Sequence[tuple[str, float]] = ()  #: (excerpt or id of a unit, LoRA's excess) that move the interval most
    parameters: float | None  #: trainable ones, LoRA's / full's
    time: CostRatio
    memory: CostRatio

    @property
    def is_judged(self) -> bool:
        return self.full.runs[0].is_judged

    @property
    def unit(self) -> str:
        return self.judged.unit if self.judged else UNIT if self.margin.measure == LOSS else "points"

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
        return next((name for name, is_shown in answers.items() if is_shown and name not in self.doubts), "cannot tell")

    @property
    def base_loss(self) -> float | None:
        """The loss before the first step on the judged records, None where it was not evaluated."""
        if self.losses is not None:
            return None if self.losses.base is None else self.losses.mean(self.losses.base)
        return self.pairs[0][0].initial_loss if self.pairs else None

    @property
    def doubt(self) -> str:
        """Why these records do not let LoRA be called good enough, or better; "" where nothing speaks against it."""
        return self.doubts.get("good enough") or self.doubts.get("better", "")

    @property
    def is_margin_under_floor(self) -> bool:
        """Whether it cannot be told, and no number of seeds resolves the margin with these records."""
        if self.answer != "cannot tell" or self.excess is None or self.contrast is None:
            return False
        floor = plan_sample_size(self.contrast, is_one_sided=True).floor
        return floor >= self.excess.estimate - self.contrast.estimate


def compare_groups(full: SeedGroup, lora: SeedGroup, margin: Margin, study: StudyContext | None = None) -> FullVsLora:
    """The comparison of two groups on the same data, of which each has a finished run; `study`: has their costs."""
    pairs = pair_by_seed(full, lora)
    reasons = [reason for pair in pairs for reason in ranking_blockers(*pair)]
    reasons += [reason for pair in pairs for run in pair for reason in comparison_blockers(pairs[0][0], run)]
    if not pairs:
        seeds = [
            ", ".join(str(run.get("settings.train.seed")) for run in group.finished_runs) for group in (lora, full)
        ]
        reasons = [f"other data order (seeds {seeds[0]} against {seeds[1]})"]
    if margin.measure != LOSS:
        limits = [group.runs[0].get("settings.output.score_tokens") for group in (lora, full)]
        reasons += [f"other length of scored texts ({limits[0]} against {limits[1]})"] * (limits[0] != limits[1])
    reasons += [group.divergence for group in (full, lora) if group.divergence]
    trainable = [group.runs[0].get("model.trainable") for group in (full, lora)]
    # runs' own clocks hold whatever else the machine did: 0.98 and 1.14 of equals
    time = CostRatio(ratio=None, reason="not timed in alternation on one machine", full=None, lora=None)
    result = FullVsLora(
        full=full,
        lora=lora,
        pairs=pairs,
        margin=margin,
        blockers=[*dict.fromkeys(reasons)],
        full_loss=full.best_loss,
        lora_loss=lora.best_loss,
        parameters=None if full.runs[0].is_judged else trainable[1] / trainable[0],
        time=study.step_time if study else time,
        memory=study.memory if study else compare_memory(full, lora),
    )
    if reasons:
        return result
    try:
        frames = read_records(pairs)
        have_tests = all((frame["split"] == "test").any() for frame in frames)
        losses = judged = match_records(pairs, frames, "test" if have_tests else "val")
        if margin.measure != LOSS:
            judged = match_records(pairs, frames, "test", margin.measure)
        measure_forgetting(result, frames, losses)
    except RefusedError as error:
        result.blockers, result.are_records_new = [str(error)], not isinstance(error, NotNewError)
    except MatchError as error:
        result.no_losses = str(error)
    else:
        result.losses, result.judged = losses, judged
        result.full_loss, result.lora_loss = losses.mean(losses.full), losses.mean(losses.lora)
        judge_records(result, judged)
    return result


def judge_records(pair: FullVsLora, judged: MatchedRecords) -> None:
    """Add to `pair` the intervals of these records and what speaks against an answer by them. A record's score has an
    end at 0 and at 100, so no few of them can carry an answer as losses do: `score_interval`."""
    is_loss, weights = judged.measure == LOSS, judged.weights
    interval_of = paired_interval if is_loss else score_interval
    values = differences = judged.lora - judged.full
    pair.excess = interval = interval_of(differences, weights)
    doubts = {"better": question_units(judged, values, interval, "better") if is_loss else ""}
    if not pair.margin.why_not(judged):
        values = pair.margin.contrast(judged)
        pair.contrast = interval = interval_of(values, weights)
        if is_loss:
            doubts["good enough"] = question_units(judged, values, interval, "good enough")
        elif are_near_zero(judged):
            doubts["good enough"] = f"both score under {NEAR_ZERO} points, and two that learnt nothing are equal"
    if len(judged.units) < MIN_UNITS:
        few = f"{len(judged.units)} {judged.unit_name} can be told apart, and at least {MIN_UNITS} are needed"
        doubts = dict.fromkeys(("better", "good enough", "worse"), few)
    pair.doubts = {answer: doubt for answer, doubt in doubts.items() if doubt}
    if not is_loss and len(differences) == 1 and judged.is_of_right_answers:
        pair.mcnemar = mcnemar_p(int((differences > 0).sum()), int((differences < 0).sum()))
    means = differences.mean(axis=0) / weights
    names = [judged.excerpts.get(unit, str(unit)) for unit in judged.units]
    pair.decisive = [(names[i], float(means[i])) for i in most_influential(values, weights, interval)]


def are_near_zero(judged: MatchedRecords) -> bool:
    """Whether it is a score of which both modes have next to nothing."""
    return judged.measure != LOSS and max(map(judged.score, MODE_NAMES)) < NEAR_ZERO


def measure_forgetting(pair: FullVsLora, frames: Sequence[pd.DataFrame], losses: MatchedRecords) -> None:
    """Add to `pair` what both modes forgot, by the interval of the judged losses or scores. Nothing where a run left no
    losses of retained text before its first step and at its end, or no such score."""
    with contextlib.suppress(MatchError, UserError):
        if pair.margin.measure != LOSS:
            scored = match_records(pair.pairs, frames, "retain", pair.margin.measure)
            pair.forgetting_points = score_interval(scored.lora - scored.full, scored.weights)
    with contextlib.suppress(MatchError):
        retained = match_records(pair.pairs, frames, "retain")
        if retained.base is None or losses.base is None:
            return
        pair.tradeoffs = {
            mode: Tradeoff(
                paired_interval(losses.base - getattr(losses, mode), losses.weights),
                paired_interval(getattr(retained, mode) - retained.base, retained.weights),
            )
            for mode in MODE_NAMES
        }
        pair.forgetting = paired_interval(retained.lora - retained.full, retained.weights)


def most_influential(values: Matrix, weights: NDArray[np.float64], interval: PairedInterval) -> NDArray[np.int64]:
    """The few units of `values` (seeds, units) that move their interval most."""
    return np.argsort(-np.abs(values.mean(axis=0) - interval.estimate * weights))[:NUM_LEFT_OUT]


def question_units(
    losses: MatchedRecords, values: Matrix, interval: PairedInterval, answer: Literal["better", "good enough"]
) -> str:
    """Why these units do not let LoRA be called so, though the interval of `values` (seeds, units) is below 0.
    Two-sided for better, one-sided for good enough; "" where they let it, or the interval is not below 0."""
    name, bound = losses.unit_name, "high" if answer == "better" else "upper"
    if getattr(interval, bound) >= 0:
        return ""
    if interval.effective_units < MIN_UNITS:
        worth = f"{len(losses.units)} {name} count for {interval.effective_units:.0f}, as a few of them differ most"
        return f"{worth}, and at least {MIN_UNITS} are needed"
    order = most_influential(values, losses.weights, interval)
    again = paired_interval(np.delete(values, order, axis=1), np.delete(losses.weights, order))
    if getattr(again, bound) >= 0:
        return f"without the {NUM_LEFT_OUT} {name} that differ most it would not be {answer}"
    return ""


def pair_by_seed(full: SeedGroup, lora: SeedGroup) -> Pairs:
    """(full, LoRA) of each seed that both groups have; a seed twice in a group counts once, by its first run."""
    full_runs, lora_runs = (
        {run.get("settings.train.seed"): run for run in reversed(group.finished_runs)} for group in (full, lora)
    )
    return [(full_runs[seed], lora_runs[seed]) for seed in sorted(full_runs.keys() & lora_runs.keys(), key=str)]


def compare_memory(full: SeedGroup, lora: SeedGroup) -> CostRatio:
    """Means over finished runs, divided where both groups were measured under the same conditions."""
    costs: list[float | None] = []
    for group in (full, lora):
        values = [run.summary["peak_memory_bytes"] for run in group.finished_runs if "peak_memory_bytes" in run.summary]
        costs.append(fmean(values) if len(values) == len(group.finished_runs) else None)
    full_bytes, lora_bytes = costs
    resumed = [run.name for run in (*full.finished_runs, *lora.finished_runs) if run.get("resumed")]
    reasons = [f"{name} was resumed and measured in parts" for name in resumed]
    for name, paths in COST_CONDITIONS.items():
        if len({repr([group.finished_runs[0].get(path) for path in paths]) for group in (full, lora)}) > 1:
            reasons.append(f"other {name}")
    if full_bytes and lora_bytes and not reasons:
        return CostRatio(ratio=lora_bytes / full_bytes, reason="", full=full_bytes, lora=lora_bytes)
    return CostRatio(ratio=None, reason=[*reasons, "not measured"][0], full=full_bytes, lora=lora_bytes)


def compare_sets(
    groups: Sequence[SeedGroup], margin: Margin, study: StudyContext | None
) -> list[tuple[list[FullVsLora], list[SeedGroup], list[SeedGroup]]]:
    """For each set of finished groups on the same data that has both modes: its comparisons, full and LoRA groups. Each
    LoRA group is held against the best full group that it may be ranked with. The first comparison is the best pair
    ranked, of a study or of judged models the first that was given."""
    sets = []
    for members in comparable_sets(groups, lambda group: group.runs[0]):
        full_groups, lora_groups = ([group for group in members if group.mode == mode] for mode in MODE_NAMES)
        if not full_groups or not lora_groups:
            continue
        if study is None and not members[0].runs[0].is_judged:
            full_groups.sort(key=lambda group: group.best_loss)
            lora_groups.sort(key=lambda group: group.best_loss)
        comparisons: list[FullVsLora] = []
        for lora in lora_groups:
            pairs = {i: pair_by_seed(full, lora) for i, full in enumerate(full_groups)}
            may_be_ranked = (i for i in pairs if pairs[i] and not any(ranking_blockers(*pair) for pair in pairs[i]))
            full = full_groups[next(may_be_ranked, 0)]
            is_timed = study is not None and not comparisons  # the finalists, which its first groups are
            comparisons.append(compare_groups(full, lora, margin, study if is_timed else None))
        if study is None:
            comparisons.sort(key=lambda comparison: bool(comparison.blockers))
        sets.append((comparisons, full_groups, lora_groups))
    return sets
