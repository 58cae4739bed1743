"""LoRA groups held against the full group that they are comparable with, in numbers.

Improvement is the validation loss before the first step minus the lowest one after it. No number is taken across
runs that are not comparable; cost is compared only on the same hardware with the same number of ranks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import reference
from trainer.report.comparability import comparison_blockers, reference_blockers
from trainer.report.run_data import RunData
from trainer.report.seed_groups import MeanDifference, MeanStd, SeedGroup, mean_std, welch_difference


@dataclass(frozen=True)
class FullVsLora:
    """A LoRA group held against a full one that it is comparable with; None where a number cannot be had."""

    full: SeedGroup
    lora: SeedGroup
    full_best: MeanStd
    lora_best: MeanStd
    full_gain: MeanStd | None
    lora_gain: MeanStd | None
    gap: MeanDifference
    share: float | None  #: LoRA's improvement / full's
    parameters: float | None  #: trainable ones, LoRA's / full's
    time: float | None
    memory: float | None
    no_share: str  #: why there is no share, "" where there is one
    no_time: str
    no_memory: str


def compare_with_full(full: SeedGroup, lora_groups: Sequence[SeedGroup]) -> list[FullVsLora]:
    """Each LoRA group against `full`, the one with the lowest mean loss first."""
    pairs = [_compare_pair(full, lora) for lora in lora_groups]
    return sorted(pairs, key=lambda pair: pair.lora_best.mean)


def comparable_groups(groups: Sequence[SeedGroup]) -> list[tuple[list[SeedGroup], list[SeedGroup]]]:
    """For each set of comparable groups that has both modes: its full groups, the best first, and its LoRA groups."""
    sets: list[list[SeedGroup]] = []
    for group in groups:
        matching_set = next(
            (members for members in sets if not comparison_blockers(members[0].runs[0], group.runs[0])), None
        )
        if matching_set is None:
            sets.append([group])
        else:
            matching_set.append(group)
    sets_with_both_modes = []
    for members in sets:
        full_groups = [group for group in members if group.mode == "full"]
        lora_groups = [group for group in members if group.mode == "lora"]
        if full_groups and lora_groups:
            sets_with_both_modes.append((sorted(full_groups, key=lambda group: best_loss(group).mean), lora_groups))
    return sets_with_both_modes


def best_loss(group: SeedGroup) -> MeanStd:
    """The lowest validation losses of the finished runs of a group, of which there must be one."""
    stats = mean_std([run.best_eval["loss"] for run in group.finished_runs if run.best_eval])
    assert stats is not None, "only groups with evaluated runs get here"
    return stats


def improvement(group: SeedGroup) -> MeanStd | None:
    """Improvement on the base; None where a run was not evaluated at step 0."""
    gains = [
        run.initial_loss - run.best_eval["loss"]
        for run in group.finished_runs
        if run.best_eval and run.initial_loss is not None
    ]
    return mean_std(gains) if len(gains) == len(group.finished_runs) else None


def _compare_pair(full: SeedGroup, lora: SeedGroup) -> FullVsLora:
    full_best, lora_best, full_gain, lora_gain = best_loss(full), best_loss(lora), improvement(full), improvement(lora)
    gap = welch_difference(lora_best, full_best)
    if _has_repeated_seeds(full) or _has_repeated_seeds(lora):  # the same seed twice is not a second sample
        gap = dataclasses.replace(gap, low=None, high=None, exceeds=None)
    no_share = _share_blocker(full, lora, full_gain, lora_gain)
    no_memory = _cost_blocker(full.finished_runs[0], lora.finished_runs[0])
    no_time = no_memory or _time_blocker(full.finished_runs[0], lora.finished_runs[0])
    return FullVsLora(
        full=full,
        lora=lora,
        full_best=full_best,
        lora_best=lora_best,
        full_gain=full_gain,
        lora_gain=lora_gain,
        gap=gap,
        share=None if no_share or not full_gain or not lora_gain else lora_gain.mean / full_gain.mean,
        parameters=_ratio(full, lora, lambda run: run.get("model.trainable")),
        time=None if no_time else _ratio(full, lora, lambda run: run.summary.get("wall_seconds")),
        memory=None if no_memory else _ratio(full, lora, lambda run: run.summary.get("peak_memory_bytes")),
        no_share=no_share,
        no_time=no_time,
        no_memory=no_memory,
    )


def _share_blocker(full: SeedGroup, lora: SeedGroup, full_gain: MeanStd | None, lora_gain: MeanStd | None) -> str:
    base_models = {_base_model_key(run) for run in (*full.finished_runs, *lora.finished_runs)}
    if len(base_models) > 1:
        return "they started from different base models"
    if full_gain is None or lora_gain is None:
        return "there was no evaluation at step 0"
    if full_gain.mean <= 0:
        return "full did not improve on its base"
    return ""


def _base_model_key(run: RunData) -> tuple[Any, ...]:
    """What a run started from; random weights differ by seed and still are the same kind of base."""
    init = run.get("settings.model.init")
    return (
        str(run.get("model.name")).rstrip("/").rsplit("/", 1)[-1],
        init,
        None if init == "random" else run.get("model.fingerprint"),
    )


def _cost_blocker(a: RunData, b: RunData) -> str:
    """Why time and memory of two runs cannot be held against one another, "" where they can."""
    cost_conditions = {
        "hardware": ("hardware.cpu", "hardware.cores", "hardware.gpu", "hardware.gpus", "resolved.device"),
        "number of ranks": ("resolved.ranks", "resolved.nodes"),
    }
    for name, paths in cost_conditions.items():
        if any(a.get(path) != b.get(path) for path in paths):
            return f"other {name}"
        if all(a.get(path) is None for path in paths):
            return f"{name} unknown"
    return ""


def _time_blocker(a: RunData, b: RunData) -> str:
    final_epochs = [run.final_eval["epoch"] if run.final_eval else 0.0 for run in (a, b)]
    return (
        ""
        if abs(final_epochs[0] - final_epochs[1]) < 1e-3
        else f"{final_epochs[0]:g} epochs against {final_epochs[1]:g}"
    )


def _ratio(full: SeedGroup, lora: SeedGroup, get_value: Callable[[RunData], Any]) -> float | None:
    """LoRA's mean / full's; None where a run does not tell, or full's is zero."""
    means = []
    for group in (full, lora):
        values = [get_value(run) for run in group.finished_runs]
        if any(not isinstance(value, int | float) for value in values):
            return None
        means.append(sum(values) / len(values))
    return means[1] / means[0] if means[0] > 0 else None


def _has_repeated_seeds(group: SeedGroup) -> bool:
    seeds = [run.get("settings.train.seed") for run in group.finished_runs]
    return len(set(seeds)) < len(seeds)


def difference_to_reference(group: SeedGroup, epoch: float) -> float | None:
    """Mean validation loss minus the card's at `epoch`; None where either is missing or a run is not comparable."""
    row = next((row for row in reference.CURVE if row.epoch == epoch), None)
    if row is None or any(reference_blockers(run) for run in group.runs):
        return None
    run_indices = [(run, run.index_at_epoch(run.evals, epoch)) for run in group.runs]
    losses = [float(run.evals["loss"][index]) for run, index in run_indices if index is not None]
    return sum(losses) / len(losses) - row.val_loss if losses else None
