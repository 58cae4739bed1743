"""What a comparison shows beside its answer: equal budgets, what was forgotten, and whether adapters can hold the data.

Curves are the evaluations of the paired runs, so within a budget they stand before the end of their schedules: nothing
here is a claim with the answer's level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.report.capacity import Capacity
from trainer.report.full_vs_lora import FullVsLora
from trainer.report.options import StudyContext
from trainer.report.run_data import RunData
from trainer.report.seed_groups import SeedGroup, improvement, mean_std
from trainer.report.views import Curve, Point, View, build_views, disagreements


def build_views_of(pair: FullVsLora, study: StudyContext | None) -> tuple[View, ...]:
    """Both modes at equal tokens, FLOPs, seconds and peak memory; none where they may not be ranked."""
    if pair.blockers or study is not None:
        return study.views if study is not None else ()
    curves = [[_curve(runs[mode_index]) for runs in pair.pairs] for mode_index in (0, 1)]
    if not all(map(all, curves)):
        return ()
    return build_views(curves[0], curves[1], no_seconds=pair.time.reason)


def describe_views(views: Sequence[View], price_per_hour: float | None = None) -> list[str]:
    """One line a view beside equal tokens; a sentence where it puts another mode ahead."""
    different = disagreements(views, price_per_hour)
    lines = [f"Exploratory: {sentence}." for sentence in different]
    agreeing = [view.describe(price_per_hour) for view in views if view.resource != "tokens"]
    return lines + [f"Exploratory: {line}." for line in agreeing if not any(line in sentence for sentence in different)]


def _curve(run: RunData) -> Curve:
    step_flops = run.get("model.step_flops")
    memory = None if run.get("resumed") else run.summary.get("peak_memory_bytes")
    return [
        Point(
            loss=float(loss), tokens=float(tokens), flops=None if step_flops is None else step_flops * float(step),
            peak_memory_bytes=memory,
        )
        for step, tokens, loss in zip(run.evals["step"], run.evals["tokens"], run.evals["loss"], strict=True)
        if step > 0 and np.isfinite(loss)
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tradeoff:
    """What a setting gained on the validation records and forgot of the base's own text, nats per token over seeds."""

    label: str
    mode: str
    gain: float
    forgetting: float

    def is_beaten_by(self, other: "Tradeoff") -> bool:
        """Whether another one gains as much, forgets as little, and is better in one of the two."""
        return (other.gain, -other.forgetting) != (self.gain, -self.forgetting) and (
            other.gain >= self.gain and other.forgetting <= self.forgetting
        )


def list_tradeoffs(groups: Sequence[SeedGroup]) -> list[Tradeoff]:
    """Of every setting whose runs measured both (--retain-data)."""
    tradeoffs = []
    for group in groups:
        gain = improvement(group) if group.finished_runs else None
        known = [run.forgetting for run in group.finished_runs if run.forgetting is not None]
        forgetting = mean_std(known)
        if gain is not None and forgetting is not None and len(known) == len(group.finished_runs):
            tradeoffs.append(
                Tradeoff(label=group.label_with_lr, mode=group.mode, gain=gain.mean, forgetting=forgetting.mean)
            )
    return tradeoffs


def describe_forgetting(groups: Sequence[SeedGroup]) -> list[str]:
    """The settings that none beats in both gain and forgetting, and both modes at equal forgetting."""
    tradeoffs = list_tradeoffs(groups)
    if not tradeoffs:
        return []
    front = [t for t in tradeoffs if not any(t.is_beaten_by(other) for other in tradeoffs)]
    described = "; ".join(f"{t.label} {t.gain:.4f} for {t.forgetting:+.4f}" for t in front)
    lines = [f"Gain for forgetting (nats per token), of {len(tradeoffs)} settings those that none beats: {described}."]
    by_mode = {mode: [t for t in tradeoffs if t.mode == mode] for mode in ("full", "lora")}
    if all(by_mode.values()):
        budget = min(max(t.forgetting for t in members) for members in by_mode.values())
        gains = {
            mode: max((t.gain for t in members if t.forgetting <= budget), default=None)
            for mode, members in by_mode.items()
        }
        parts = [
            f"{name} gains {gain:.4f}" if gain is not None else f"no {name} setting forgets so little"
            for name, gain in (("LoRA", gains["lora"]), ("full", gains["full"]))
        ]
        lines.append(f"Exploratory: at equal forgetting (at most {budget:+.4f}) {', '.join(parts)}.")
    return lines


def describe_capacity(group: SeedGroup) -> list[str]:
    """One line on what a LoRA setting can hold, where its runs were through the training data once."""
    run = group.finished_runs[0]
    train_losses = run.epochs["train_loss"][run.epochs["epoch"] == 1]
    trained, targets, rank = (
        run.get(path) for path in ("model.trainable", "data.train.counted_tokens", "settings.lora.rank")
    )
    if not len(train_losses) or not np.isfinite(train_losses[-1]) or not isinstance(trained, int) or not targets:
        return []
    capacity = Capacity(
        num_trained=trained, num_targets=targets, first_epoch_loss=float(train_losses[-1]), lora_rank=rank
    )
    return [f"{group.label_with_lr}: {capacity.describe()}."]
