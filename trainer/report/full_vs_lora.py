"""A LoRA group held against a full one, run by run of the same seed: excess loss with its interval, and what it cost.

Runs are paired by seed. What may not be ranked gets no number; a ratio of time or memory is given only where both were
measured under the same conditions, and is withheld with the reason where they were not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.config import reference
from trainer.report.comparability import (
    comparable_sets,
    comparison_blockers,
    ranking_blockers,
    reference_blockers,
)
from trainer.report.margin import Margin
from trainer.report.options import ComparisonOptions, CostRatio
from trainer.report.paired_interval import PairedInterval, paired_interval, seeds_interval, what_would_tell
from trainer.report.record_losses import (
    MatchedLosses,
    MatchError,
    SharedRecordsError,
    match_losses,
    refuse_shared_records,
)
from trainer.report.run_data import RunData
from trainer.report.seed_groups import MODE_NAMES, SeedGroup, best_loss


@dataclass(frozen=True, kw_only=True)
class FullVsLora:
    """A LoRA group against a full one on the same data; None where a number cannot be had."""

    full: SeedGroup
    lora: SeedGroup
    pairs: tuple[tuple[RunData, RunData], ...]  #: (full, LoRA) of one seed each
    blockers: tuple[str, ...]  #: why they may not be ranked
    margin: Margin
    full_loss: float  #: mean over seeds of what is judged, nats per token
    lora_loss: float
    losses: MatchedLosses | None = None
    no_losses: str = ""  #: why single records could not be paired
    excess: PairedInterval | None = None
    contrast: PairedInterval | None = None  #: excess beyond the margin
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
        if self.excess.high < 0:
            return "better"
        if self.contrast is not None and self.contrast.upper < 0:
            return "good enough"
        return "worse" if (self.contrast or self.excess).low > 0 else "cannot tell"

    @property
    def is_margin_under_floor(self) -> bool:
        """Whether it cannot be told, and these records tell nothing as small as the margin with any number of seeds."""
        if self.answer != "cannot tell" or self.excess is None or self.contrast is None or not self.contrast.num_units:
            return False
        missing = what_would_tell(self.contrast, self.contrast.estimate, level=self.contrast.level, is_one_sided=True)
        return missing.floor >= self.excess.estimate - self.contrast.estimate


def compare_groups(full: SeedGroup, lora: SeedGroup, options: ComparisonOptions) -> FullVsLora:
    """The comparison of two groups on the same data, of which each has a finished run."""
    pairs = pair_by_seed(full, lora)
    reasons = [reason for pair in pairs for reason in ranking_blockers(*pair)]
    reasons += [reason for pair in pairs for run in pair for reason in comparison_blockers(pairs[0][0], run)]
    blockers = tuple(dict.fromkeys(reasons))
    if not pairs:
        seeds = [", ".join(sorted({str(_seed(run)) for run in group.finished_runs})) for group in (lora, full)]
        blockers = (f"other data order (seeds {seeds[0]} against {seeds[1]})",)
    pair = FullVsLora(
        full=full,
        lora=lora,
        pairs=tuple(pairs),
        blockers=blockers,
        margin=options.margin,
        full_loss=best_loss(full),
        lora_loss=best_loss(lora),
        parameters=lora.runs[0].get("model.trainable") / full.runs[0].get("model.trainable"),
        time=options.step_time or _own_clocks(full, lora),
        memory=_cost(full, lora, "peak_memory_bytes"),
    )
    if blockers:
        return pair
    try:
        return replace(pair, **_judge(pairs, options))
    except SharedRecordsError as error:
        return replace(pair, blockers=(str(error),))


def pair_by_seed(full: SeedGroup, lora: SeedGroup) -> list[tuple[RunData, RunData]]:
    """(full, LoRA) of each seed that both groups have; a seed twice in a group counts once, by its first run."""
    full_runs, lora_runs = ({_seed(run): run for run in reversed(group.finished_runs)} for group in (full, lora))
    return [(full_runs[seed], lora_runs[seed]) for seed in sorted(full_runs.keys() & lora_runs.keys(), key=str)]


def _seed(run: RunData) -> Any:
    return run.get("settings.train.seed")


def _judge(pairs: Sequence[tuple[RunData, RunData]], options: ComparisonOptions) -> dict[str, Any]:
    """Losses and intervals of pairs that may be ranked; SharedRecordsError where too many records were trained on."""
    refuse_shared_records(pairs)
    margin, level = options.margin, options.level
    best = [tuple(run.best_eval["loss"] for run in pair if run.best_eval) for pair in pairs]
    judged: dict[str, Any] = {
        name: sum(losses[i] for losses in best) / len(best) for i, name in enumerate(("full_loss", "lora_loss"))
    }
    try:
        losses = match_losses(pairs)
    except MatchError as error:
        judged["no_losses"] = str(error)
        if len(pairs) > 1:
            judged["excess"] = seeds_interval([lora - full for full, lora in best], level)
            if margin.kind == "nats":
                judged["contrast"] = seeds_interval([lora - full - margin.value for full, lora in best], level)
        return judged
    contrast = None
    if not margin.why_not(losses):
        contrast = paired_interval(margin.contrast(losses), losses.targets, level)
    return {
        "full_loss": losses.mean_loss(losses.full),
        "lora_loss": losses.mean_loss(losses.lora),
        "losses": losses,
        "excess": paired_interval(losses.lora - losses.full, losses.targets, level),
        "contrast": contrast,
    }


def comparable_groups(
    groups: Sequence[SeedGroup], *, best_first: bool = True
) -> list[tuple[list[SeedGroup], list[SeedGroup]]]:
    """For each set of groups on the same data that has both modes: its full and its LoRA groups."""

    def rank(group: SeedGroup) -> float:
        return best_loss(group) if best_first else 0.0

    sets = []
    for members in comparable_sets(groups, lambda group: group.runs[0]):
        full, lora = (sorted((group for group in members if group.mode == mode), key=rank) for mode in MODE_NAMES)
        if full and lora:
            sets.append((full, lora))
    return sets


def compare_set(
    full_groups: Sequence[SeedGroup], lora_groups: Sequence[SeedGroup], options: ComparisonOptions
) -> list[FullVsLora]:
    """Each LoRA group against the best full group that it may be ranked with; the first is the best pair ranked."""

    def may_be_ranked(full: SeedGroup, lora: SeedGroup) -> bool:
        pairs = pair_by_seed(full, lora)
        return bool(pairs) and not any(ranking_blockers(*pair) for pair in pairs)

    comparisons = []
    for lora in lora_groups:
        partner = next((full for full in full_groups if may_be_ranked(full, lora)), full_groups[0])
        comparisons.append(compare_groups(partner, lora, options))
    return comparisons if options.study else sorted(comparisons, key=lambda comparison: bool(comparison.blockers))


# --- cost ---


def _own_clocks(full: SeedGroup, lora: SeedGroup) -> CostRatio:
    """The runs' own clocks side by side, and not divided.

    They hold whatever else the machine did: of the very same runs 0.98 and 1.14 were said.
    """
    clocks = _cost(full, lora, "wall_seconds")
    return replace(clocks, ratio=None, reason=clocks.reason or "not timed in alternation on one machine")


def _cost(full: SeedGroup, lora: SeedGroup, key: str) -> CostRatio:
    full_cost, lora_cost = _mean_cost(full, key), _mean_cost(lora, key)
    resumed = [run.name for run in (*full.finished_runs, *lora.finished_runs) if run.get("resumed")]
    if resumed:
        reason = f"{resumed[0]} was resumed and measured in parts"
    else:
        reason = _conditions_blocker(full.finished_runs[0], lora.finished_runs[0])
    if not lora_cost or not full_cost:
        reason = reason or "not measured"
    ratio = lora_cost / full_cost if lora_cost and full_cost and not reason else None
    return CostRatio(ratio=ratio, reason=reason, lora=lora_cost, full=full_cost)


def _conditions_blocker(a: RunData, b: RunData) -> str:
    """Why costs of two runs cannot be held against one another, "" where they can."""
    conditions = {
        "hardware": ("hardware.cpu", "hardware.cores", "hardware.gpu", "hardware.gpus", "resolved.device"),
        "number of ranks": ("resolved.ranks", "resolved.nodes"),
    }
    for name, paths in conditions.items():
        if any(a.get(path) != b.get(path) for path in paths):
            return f"other {name}"
        if all(a.get(path) is None for path in paths):
            return f"{name} unknown"
    return ""


def _mean_cost(group: SeedGroup, key: str) -> float | None:
    """The mean over finished runs; None where one does not tell."""
    values = [run.summary[key] for run in group.finished_runs if key in run.summary]
    return sum(values) / len(values) if len(values) == len(group.finished_runs) else None


def difference_to_reference(group: SeedGroup, epoch: float) -> float | None:
    """Mean validation loss minus the card's at `epoch`; None where either is missing or a run is not comparable."""
    row = next((row for row in reference.CURVE if row.epoch == epoch), None)
    if row is None or any(reference_blockers(run) for run in group.runs):
        return None
    run_indices = [(run, run.index_at_epoch(run.evals, epoch)) for run in group.runs]
    losses = [float(run.evals["loss"][index]) for run, index in run_indices if index is not None]
    return sum(losses) / len(losses) - row.val_loss if losses else None
