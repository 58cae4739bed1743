"""What a comparison shows beside its answer: equal budgets, what was forgotten, and whether adapters can hold the data.

Curves are the evaluations of the paired runs, so within a budget they stand before the end of their schedules: nothing
here is a claim with the answer's level.
"""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from trainer.report.full_vs_lora import FullVsLora
from trainer.report.options import StudyContext
from trainer.report.run_data import RunData
from trainer.report.seed_groups import SeedGroup, improvement
from trainer.report.views import Curve, Point, View, build_views

BITS_PER_PARAMETER = 2.0
CAPACITY_SOURCE = "rule of thumb: 2 bits a trained weight, arXiv 2404.05405, as in LoRA Without Regret"


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


def describe_group_capacity(group: SeedGroup) -> list[str]:
    """One line on what a LoRA setting can hold, where its runs were through the training data once."""
    run = group.finished_runs[0]
    train_losses = run.epochs["train_loss"][run.epochs["epoch"] == 1]
    if not len(train_losses) or not np.isfinite(train_losses[-1]):
        return []
    capacity = describe_capacity(
        run.get("model.trainable"),
        run.get("data.train.counted_tokens"),
        float(train_losses[-1]),
        run.get("settings.lora.rank"),
    )
    return [f"{group.label_with_lr}: {capacity}."]


def describe_capacity(
    num_trained: int, num_targets: int, first_epoch_loss: float, lora_rank: int, other_rank: int = 32
) -> str:
    """`adapters hold 0.2 Mbit, the data 3.1 Mbit: expect a plateau; rank 32 holds 0.8 (rule of thumb: ...)`.

    Trained weights store about two bits of knowledge each (Allen-Zhu and Li, arXiv 2404.05405, measured on synthetic
    facts in whole models); the training targets carry at most their first-epoch loss (nats per token) in bits, the
    length of their code while the model learns them. "LoRA Without Regret" (Thinking Machines, 2025) uses the two so:
    below capacity LoRA keeps up with full fine-tuning, above it its curve falls behind.
    """
    weight_bits, data_bits = BITS_PER_PARAMETER * num_trained, first_epoch_loss / math.log(2) * num_targets
    line = f"adapters hold {_format_mbit(weight_bits)} Mbit, the data {_format_mbit(data_bits)} Mbit: "
    if weight_bits >= data_bits:
        line += "no plateau for want of weights is expected"
    else:
        line += "expect a plateau"
        if other_rank > lora_rank:
            line += f"; rank {other_rank} holds {_format_mbit(weight_bits * other_rank / lora_rank)}"
    return f"{line} ({CAPACITY_SOURCE})"


def _format_mbit(bits: float) -> str:
    """Millions of bits with one digit behind the point, two significant ones where that would be 0."""
    return f"{bits / 1e6:,.1f}" if bits >= 1e5 else f"{bits / 1e6:.2g}"
