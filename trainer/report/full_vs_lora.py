"""LoRA groups held against the full group that they are comparable with, in numbers.

Improvement is the validation loss before the first step minus the lowest one after it. No number is taken across
runs that are not comparable; cost is compared only on the same hardware with the same number of ranks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import reference
from trainer.report.comparability import why_not, why_not_card
from trainer.report.paired_interval import Difference, Group, Spread, difference, spread
from trainer.report.run_data import Run


@dataclass(frozen=True)
class Pair:
    """A LoRA group held against a full one that it is comparable with; None where a number cannot be had."""

    full: Group
    lora: Group
    full_best: Spread
    lora_best: Spread
    full_gain: Spread | None
    lora_gain: Spread | None
    gap: Difference
    share: float | None  #: LoRA's improvement / full's
    parameters: float | None  #: trainable ones, LoRA's / full's
    time: float | None
    memory: float | None
    no_share: str  #: why there is no share, "" where there is one
    no_time: str
    no_memory: str


def pair_up(full: Group, loras: Sequence[Group]) -> list[Pair]:
    """Each LoRA group against `full`, the one with the lowest mean loss first."""
    found = [_pair(full, lora) for lora in loras]
    return sorted(found, key=lambda pair: pair.lora_best.mean)


def classes(groups: Sequence[Group]) -> list[tuple[list[Group], list[Group]]]:
    """For each set of comparable groups that has both modes: its full groups, the best first, and its LoRA groups."""
    sets: list[list[Group]] = []
    for group in groups:
        home = next((members for members in sets if not why_not(members[0].runs[0], group.runs[0])), None)
        if home is None:
            sets.append([group])
        else:
            home.append(group)
    both = []
    for members in sets:
        fulls = [group for group in members if group.mode == "full"]
        loras = [group for group in members if group.mode == "lora"]
        if fulls and loras:
            both.append((sorted(fulls, key=lambda group: best_loss(group).mean), loras))
    return both


def best_loss(group: Group) -> Spread:
    """The lowest validation losses of the finished runs of a group, of which there must be one."""
    found = spread([run.best["loss"] for run in group.finished if run.best])
    assert found is not None, "only groups with evaluated runs get here"
    return found


def improvement(group: Group) -> Spread | None:
    """Improvement on the base; None where a run was not evaluated at step 0."""
    gains = [run.base_loss - run.best["loss"] for run in group.finished if run.best and run.base_loss is not None]
    return spread(gains) if len(gains) == len(group.finished) else None


def _pair(full: Group, lora: Group) -> Pair:
    full_best, lora_best, full_gain, lora_gain = best_loss(full), best_loss(lora), improvement(full), improvement(lora)
    gap = difference(lora_best, full_best)
    if _seeds_repeat(full) or _seeds_repeat(lora):  # the same seed twice is not a second sample
        gap = dataclasses.replace(gap, low=None, high=None, exceeds=None)
    no_share = _why_no_share(full, lora, full_gain, lora_gain)
    no_memory = _why_no_cost(full.finished[0], lora.finished[0])
    no_time = no_memory or _why_no_time(full.finished[0], lora.finished[0])
    return Pair(
        full=full,
        lora=lora,
        full_best=full_best,
        lora_best=lora_best,
        full_gain=full_gain,
        lora_gain=lora_gain,
        gap=gap,
        share=None if no_share or not full_gain or not lora_gain else lora_gain.mean / full_gain.mean,
        parameters=_ratio(full, lora, lambda run: run.fact("model.trainable")),
        time=None if no_time else _ratio(full, lora, lambda run: run.end.get("wall_seconds")),
        memory=None if no_memory else _ratio(full, lora, lambda run: run.end.get("peak_memory_bytes")),
        no_share=no_share,
        no_time=no_time,
        no_memory=no_memory,
    )


def _why_no_share(full: Group, lora: Group, full_gain: Spread | None, lora_gain: Spread | None) -> str:
    bases = {_base(run) for run in (*full.finished, *lora.finished)}
    if len(bases) > 1:
        return "they started from different base models"
    if full_gain is None or lora_gain is None:
        return "there was no evaluation at step 0"
    if full_gain.mean <= 0:
        return "full did not improve on its base"
    return ""


def _base(run: Run) -> tuple[Any, ...]:
    """What a run started from; random weights differ by seed and still are the same kind of base."""
    init = run.fact("settings.model.init")
    return (
        str(run.fact("model.name")).rstrip("/").rsplit("/", 1)[-1],
        init,
        None if init == "random" else run.fact("model.fingerprint"),
    )


def _why_no_cost(a: Run, b: Run) -> str:
    """Why time and memory of two runs cannot be held against one another, "" where they can."""
    paths = {
        "hardware": ("hardware.cpu", "hardware.cores", "hardware.gpu", "hardware.gpus", "resolved.device"),
        "number of ranks": ("resolved.ranks", "resolved.nodes"),
    }
    for name, places in paths.items():
        if any(a.fact(path) != b.fact(path) for path in places):
            return f"other {name}"
        if all(a.fact(path) is None for path in places):
            return f"{name} unknown"
    return ""


def _why_no_time(a: Run, b: Run) -> str:
    ends = [run.final["epoch"] if run.final else 0.0 for run in (a, b)]
    return "" if abs(ends[0] - ends[1]) < 1e-3 else f"{ends[0]:g} epochs against {ends[1]:g}"


def _ratio(full: Group, lora: Group, value: Callable[[Run], Any]) -> float | None:
    """LoRA's mean / full's; None where a run does not tell, or full's is zero."""
    means = []
    for group in (full, lora):
        found = [value(run) for run in group.finished]
        if any(not isinstance(one, int | float) for one in found):
            return None
        means.append(sum(found) / len(found))
    return means[1] / means[0] if means[0] > 0 else None


def _seeds_repeat(group: Group) -> bool:
    seeds = [run.fact("settings.train.seed") for run in group.finished]
    return len(set(seeds)) < len(seeds)


def card_difference(group: Group, epoch: float) -> float | None:
    """Mean validation loss minus the card's at `epoch`; None where either is missing or a run is not comparable."""
    row = next((row for row in reference.CURVE if row.epoch == epoch), None)
    if row is None or any(why_not_card(run) for run in group.runs):
        return None
    places = [(run, run.at_epoch(run.evals, epoch)) for run in group.runs]
    losses = [float(run.evals["loss"][at]) for run, at in places if at is not None]
    return sum(losses) / len(losses) - row.val_loss if losses else None
