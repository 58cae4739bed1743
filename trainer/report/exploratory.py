"""What a comparison shows beside its answer: equal budgets, and what was forgotten.

Curves are the evaluations of the paired runs, so within a budget they stand before the end of their schedules: nothing
here is a claim with the answer's level.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from trainer.report.full_vs_lora import FullVsLora
from trainer.report.options import StudyContext
from trainer.report.run_data import RunData
from trainer.report.seed_groups import SeedGroup, improvement
from trainer.report.views import Curve, Point, View, build_views


def build_views_of(pair: FullVsLora, study: StudyContext | None) -> tuple[View, ...]:
    """Both modes at equal tokens, FLOPs, seconds and peak memory; none where they may not be ranked."""
    if pair.blockers or study is not None:
        return study.views if study is not None else ()
    curves = [[_curve(runs[mode_index]) for runs in pair.pairs] for mode_index in (0, 1)]
    if not all(map(all, curves)):
        return ()
    return build_views(curves[0], curves[1], no_seconds=pair.time.reason)


def _curve(run: RunData) -> Curve:
    step_flops = run.get("model.step_flops")
    memory = None if run.get("resumed") else run.summary.get("peak_memory_bytes")
    return [
        Point(
            loss=float(loss),
            tokens=float(tokens),
            flops=None if step_flops is None else step_flops * float(step),
            peak_memory_bytes=memory,
        )
        for step, tokens, loss in zip(run.evals["step"], run.evals["tokens"], run.evals["loss"], strict=True)
        if step > 0 and np.isfinite(loss)
    ]


class Tradeoff(NamedTuple):
    """What a setting gained on the validation records and forgot of the base's own text, nats per token over seeds."""

    label: str
    mode: str
    gain: float
    forgetting: float

    def is_beaten_by(self, other: "Tradeoff") -> bool:
        """Whether another one gains as much, forgets as little, and is better in one of the two."""
        return (other.gain, other.forgetting) != (self.gain, self.forgetting) and (
            other.gain >= self.gain and other.forgetting <= self.forgetting
        )


def list_tradeoffs(groups: Sequence[SeedGroup]) -> list[Tradeoff]:
    """Of every setting whose runs measured both (--retain-data)."""
    tradeoffs = []
    for group in groups:
        gain, forgetting = improvement(group), [run.forgetting for run in group.finished_runs]
        known = [value for value in forgetting if value is not None]
        if gain is not None and known == forgetting:
            tradeoffs.append(Tradeoff(group.label_with_lr, group.mode, gain, fmean(known)))
    return tradeoffs


def describe_forgetting(groups: Sequence[SeedGroup]) -> list[str]:
    """The settings that none beats in both gain and forgetting, and both modes at equal forgetting."""
    tradeoffs = list_tradeoffs(groups)
    if not tradeoffs:
        return []
    front = [t for t in tradeoffs if not any(t.is_beaten_by(other) for other in tradeoffs)]
    described = "; ".join(f"{t.label} {t.gain:.4f} for {t.forgetting:+.4f}" for t in front)
    lines = [f"Gain for forgetting (nats per token), of {len(tradeoffs)} settings those that none beats: {described}."]
    by_mode = {name: [t for t in tradeoffs if t.mode == mode] for mode, name in (("lora", "LoRA"), ("full", "full"))}
    if all(by_mode.values()):
        budget = min(max(t.forgetting for t in members) for members in by_mode.values())
        parts = []
        for name, members in by_mode.items():
            gains = [t.gain for t in members if t.forgetting <= budget]
            parts.append(f"{name} gains {max(gains):.4f}" if gains else f"no {name} setting forgets so little")
        lines.append(f"Exploratory: at equal forgetting (at most {budget:+.4f}) {', '.join(parts)}.")
    return lines
