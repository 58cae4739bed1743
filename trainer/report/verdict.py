"""What the comparison comes to, in one sentence that a person can repeat, and the numbers behind it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import reference
from trainer.report.comparability import comparison_blockers, reference_blockers, shorten_reason
from trainer.report.full_vs_lora import (
    FullVsLora,
    best_loss,
    comparable_groups,
    compare_with_full,
    difference_to_reference,
    improvement,
)
from trainer.report.seed_groups import MODE_NAMES, WELCH_RULE, MeanStd, SeedGroup


@dataclass(frozen=True)
class Verdict:
    """One sentence, what explains it line by line, and its numbers for comparison.json."""

    sentence: str
    details: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


def build_verdict(groups: Sequence[SeedGroup], with_reference: bool) -> Verdict:
    """The verdict over all groups; only finished runs count."""
    finished_groups = [group for group in groups if group.finished_runs]
    num_left_out = sum(len(group.runs) - len(group.finished_runs) for group in groups)
    unfinished_note = (
        f"{num_left_out} run{'s' if num_left_out > 1 else ''} without an end or an evaluation not counted"
        if num_left_out
        else ""
    )
    if not finished_groups:
        return Verdict(
            "No run is finished and evaluated, so there is nothing to compare yet.",
            numbers={"pairs": [], "not_counted": num_left_out},
        )
    sets_with_both_modes = comparable_groups(finished_groups)
    pairs_by_set = [compare_with_full(full_groups[0], lora_groups) for full_groups, lora_groups in sets_with_both_modes]
    clauses = [
        _describe_best_pair(set_pairs, len(full_groups))
        for set_pairs, (full_groups, _) in zip(pairs_by_set, sets_with_both_modes, strict=True)
    ]
    clauses = clauses or [_describe_unpaired(finished_groups)]
    shown_groups = [
        group for set_pairs in pairs_by_set for group in (set_pairs[0].full, set_pairs[0].lora)
    ] or finished_groups
    if with_reference:
        clauses += _reference_clauses(shown_groups)
    sentence = "; ".join(clause for clause in [*clauses, unfinished_note] if clause)
    pairs = [pair for set_pairs in pairs_by_set for pair in set_pairs]
    details = [line for pair in pairs for line in _describe_pair(pair)] + _interval_notes(pairs)
    numbers = {"pairs": [_pair_to_dict(pair) for pair in pairs], "not_counted": num_left_out}
    return Verdict(sentence[0].upper() + sentence[1:] + ".", tuple(details), numbers)


def _describe_best_pair(pairs: Sequence[FullVsLora], num_full_groups: int) -> str:
    """LoRA against full: of several groups of a mode (`num_full_groups` is the number of full ones), the best."""
    pair = pairs[0]
    lora_name, full_name = _describe_best(len(pairs), pair.lora), _describe_best(num_full_groups, pair.full)
    cost = _describe_cost(pair)
    spread_text = (
        ""
        if pair.gap.exceeds is None
        else ", a difference that "
        + ("exceeds" if pair.gap.exceeds else "does not exceed")
        + " the spread between seeds"
    )
    losses_text = f"best validation loss {pair.lora_best.mean:.4f} against {pair.full_best.mean:.4f}"
    if pair.share is None:
        assert pair.no_share
        reason = f"no share of improvement is given because {pair.no_share}"
        return f"{lora_name} and {full_name} ended at a {losses_text}{spread_text}; {reason}; LoRA ran with {cost}"
    if pair.lora_gain is not None and pair.lora_gain.mean <= 0:
        return (
            f"{lora_name} did not improve on its base where {full_name} did ({losses_text}){spread_text}, with {cost}"
        )
    improvement_text = f"{full_name}'s improvement" if full_name == "full" else f"the improvement of {full_name}"
    return f"{lora_name} reached {pair.share:.1%} of {improvement_text} ({losses_text}{spread_text}) with {cost}"


def _describe_best(num_groups: int, group: SeedGroup) -> str:
    """The name of a group that was the best of `count` of its mode."""
    mode_name = MODE_NAMES[group.mode]
    return (
        group.label
        if num_groups == 1
        else f"the best of {num_groups} {mode_name} settings{group.label.removeprefix(mode_name)}"
    )


def _describe_cost(pair: FullVsLora) -> str:
    """`0.95% of its trainable parameters, 0.61x its time and 0.43x its memory`, with what is not compared and why."""
    ratios, not_compared = [], []
    ratios.append(
        "an unknown share of its trainable parameters"
        if pair.parameters is None
        else f"{format_percent(pair.parameters)} of its trainable parameters"
    )
    for name, ratio, reason in (("time", pair.time, pair.no_time), ("memory", pair.memory, pair.no_memory)):
        if ratio is not None:
            ratios.append(f"{ratio:.2f}x its {name}")
        else:
            not_compared.append((name, reason or "not measured"))
    text = ratios[0] if len(ratios) == 1 else ", ".join(ratios[:-1]) + " and " + ratios[-1]
    if len({reason for _, reason in not_compared}) == 1:
        not_compared = [(" and ".join(name for name, _ in not_compared), not_compared[0][1])]
    return text + "".join(f"; {name} not compared ({reason})" for name, reason in not_compared)


def format_percent(share: float) -> str:
    """A share with two significant digits: 0.95%, 12%, 100%."""
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _describe_unpaired(groups: Sequence[SeedGroup]) -> str:
    """What can be said where no LoRA group is comparable with a full one."""
    full_groups = [group for group in groups if group.mode == "full"]
    lora_groups = [group for group in groups if group.mode == "lora"]
    descriptions = "; ".join(_describe_group(group) for group in groups[:4])
    if full_groups and lora_groups:
        reasons = comparison_blockers(lora_groups[0].finished_runs[0], full_groups[0].finished_runs[0])
        reason = ", ".join(dict.fromkeys(map(shorten_reason, reasons)))
        return f"LoRA and full are not comparable with one another ({reason}): {descriptions}"
    missing_mode = "LoRA" if full_groups else "full"
    return f"{descriptions}; there is no finished {missing_mode} run to compare with"


def _describe_group(group: SeedGroup) -> str:
    best_stats, gain_stats = best_loss(group), improvement(group)
    if gain_stats is None:
        return f"{group.label} reached a best validation loss of {best_stats.mean:.4f} (its base was not evaluated)"
    verb = "improved" if gain_stats.mean > 0 else "did not improve"
    return (
        f"{group.label} {verb} on its base ({best_stats.mean + gain_stats.mean:.4f} -> {best_stats.mean:.4f} at best)"
    )


def _reference_clauses(groups: Sequence[SeedGroup]) -> list[str]:
    """How the groups stand to the card, those with the same answer in one clause."""
    by_reason: dict[tuple[str, ...], list[SeedGroup]] = {}
    for group in groups:
        by_reason.setdefault(tuple(map(shorten_reason, reference_blockers(group.finished_runs[0]))), []).append(group)
    clauses = []
    for reasons, members in by_reason.items():
        names = [group.label for group in members]
        if reasons:
            subject = (
                names[0] + " is not"
                if len(names) == 1
                else ("neither is" if len(names) == 2 else "none is")
                if len(names) == len(groups)
                else ", ".join(names[:-1]) + " and " + names[-1] + " are not"
            )
            clauses.append(f"{subject} comparable with the card: {', '.join(reasons)}")
        else:
            clauses.append(
                "; ".join(_describe_against_reference(group) for group in members)
                + " (as far as the card tells; see what is unknown of it)"
            )
    return clauses


def _describe_against_reference(group: SeedGroup) -> str:
    last_row = reference.CURVE[-1]
    gap = difference_to_reference(group, last_row.epoch)
    if gap is None:
        return f"{group.label} has no evaluation at the card's epoch {last_row.epoch}"
    position = f"{abs(gap):.4f} {'above' if gap > 0 else 'below'}" if round(gap, 4) else "exactly at"
    return f"{group.label} ended {position} the card's {last_row.val_loss:.4f} at epoch {last_row.epoch}"


def _describe_pair(pair: FullVsLora) -> list[str]:
    """The numbers behind the verdict on a pair, and under which conditions its cost was measured."""
    full_text, lora_text = _format_mean_std(pair.full_best), _format_mean_std(pair.lora_best)
    text = f"{pair.lora.label} against {pair.full.label}: best validation loss {lora_text} against {full_text}, "
    text += f"difference {pair.gap.difference:+.4f} nats per token"
    if pair.gap.low is not None and pair.gap.high is not None:
        verb = "exceeds" if pair.gap.exceeds else "does not exceed"
        text += f" (95 % interval {pair.gap.low:+.4f} to {pair.gap.high:+.4f}), which {verb} the spread between seeds"
    if pair.full_gain and pair.lora_gain and not pair.no_share:
        text += f". Improvement on the base: {pair.lora_gain.mean:.4f} against {pair.full_gain.mean:.4f}"
    return [text + ".", *_cost_notes(pair)]


def _interval_notes(pairs: Sequence[FullVsLora]) -> list[str]:
    """How a difference is held against the spread between seeds, and for which pairs that is not known."""
    labels_without_interval = [pair.lora.label for pair in pairs if pair.gap.exceeds is None]
    lines = [WELCH_RULE] if len(labels_without_interval) < len(pairs) else []
    if labels_without_interval:
        scope = f" for {', '.join(labels_without_interval)}" if lines else ""
        lines.append(
            f"Whether the difference exceeds the spread between seeds is not known{scope}: "
            "it takes two different seeds or more on both sides."
        )
    return lines


def _cost_notes(pair: FullVsLora) -> list[str]:
    """What time and memory depend on and was not the same."""
    if pair.time is None and pair.memory is None:
        return []
    a, b = pair.lora.finished_runs[0], pair.full.finished_runs[0]
    paths = {
        "micro-batch": "resolved.micro_batch",
        "precision": "resolved.precision",
        "ZeRO file": "resolved.ds_config",
        "block length": "data.block_size",
        "threads per rank": "resolved.threads_per_rank",
    }
    differences = [
        f"{name} {a.get(path)} against {b.get(path)}" for name, path in paths.items() if a.get(path) != b.get(path)
    ]
    return (
        [
            f"Time and memory of {pair.lora.label} and {pair.full.label} were measured with different settings: "
            f"{', '.join(differences)}."
        ]
        if differences
        else []
    )


def _format_mean_std(stats: MeanStd) -> str:
    text = f"{stats.mean:.4f}"
    return text if stats.sd is None else f"{text} ± {stats.sd:.4f} (n = {stats.n})"


def _pair_to_dict(pair: FullVsLora) -> dict[str, Any]:
    fields = dataclasses.asdict(dataclasses.replace(pair, full=None, lora=None))  # type: ignore[arg-type]
    labels = {
        "full": pair.full.label,
        "lora": pair.lora.label,
        "full_runs": [run.run_id for run in pair.full.finished_runs],
    }
    return {**fields, **labels, "lora_runs": [run.run_id for run in pair.lora.finished_runs]}
