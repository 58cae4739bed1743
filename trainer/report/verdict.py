"""What the comparison comes to, in one sentence that a person can repeat, and the numbers behind it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import reference
from trainer.report.comparability import short, why_not, why_not_card
from trainer.report.full_vs_lora import Pair, best_loss, card_difference, classes, improvement, pair_up
from trainer.report.paired_interval import MODE_NAMES, RULE, Group, Spread


@dataclass(frozen=True)
class Verdict:
    """One sentence, what explains it line by line, and its numbers for comparison.json."""

    sentence: str
    details: tuple[str, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)


def judge(groups: Sequence[Group], with_card: bool) -> Verdict:
    """The verdict over all groups; only finished runs count."""
    counted = [group for group in groups if group.finished]
    left_out = sum(len(group.runs) - len(group.finished) for group in groups)
    unfinished = (
        f"{left_out} run{'s' if left_out > 1 else ''} without an end or an evaluation not counted" if left_out else ""
    )
    if not counted:
        return Verdict(
            "No run is finished and evaluated, so there is nothing to compare yet.",
            numbers={"pairs": [], "not_counted": left_out},
        )
    both = classes(counted)
    pairs = [pair_up(fulls[0], loras) for fulls, loras in both]
    clauses = [_pair_clause(found, len(fulls)) for found, (fulls, _) in zip(pairs, both, strict=True)]
    clauses = clauses or [_no_pair(counted)]
    shown = [group for found in pairs for group in (found[0].full, found[0].lora)] or counted
    if with_card:
        clauses += _card_clauses(shown)
    sentence = "; ".join(clause for clause in [*clauses, unfinished] if clause)
    flat = [pair for found in pairs for pair in found]
    details = [line for pair in flat for line in _details(pair)] + _spread_lines(flat)
    numbers = {"pairs": [_numbers(pair) for pair in flat], "not_counted": left_out}
    return Verdict(sentence[0].upper() + sentence[1:] + ".", tuple(details), numbers)


def _pair_clause(found: Sequence[Pair], fulls: int) -> str:
    """LoRA against full: of several groups of a mode (`fulls` is the number of full ones), the best."""
    pair = found[0]
    name, other = _best_of(len(found), pair.lora), _best_of(fulls, pair.full)
    cost = _cost(pair)
    spread_text = (
        ""
        if pair.gap.exceeds is None
        else ", a difference that "
        + ("exceeds" if pair.gap.exceeds else "does not exceed")
        + " the spread between seeds"
    )
    losses = f"best validation loss {pair.lora_best.mean:.4f} against {pair.full_best.mean:.4f}"
    if pair.share is None:
        assert pair.no_share
        why = f"no share of improvement is given because {pair.no_share}"
        return f"{name} and {other} ended at a {losses}{spread_text}; {why}; LoRA ran with {cost}"
    if pair.lora_gain is not None and pair.lora_gain.mean <= 0:
        return f"{name} did not improve on its base where {other} did ({losses}){spread_text}, with {cost}"
    whose = f"{other}'s improvement" if other == "full" else f"the improvement of {other}"
    return f"{name} reached {pair.share:.1%} of {whose} ({losses}{spread_text}) with {cost}"


def _best_of(count: int, group: Group) -> str:
    """The name of a group that was the best of `count` of its mode."""
    mode = MODE_NAMES[group.mode]
    return group.label if count == 1 else f"the best of {count} {mode} settings{group.label.removeprefix(mode)}"


def _cost(pair: Pair) -> str:
    """`0.95% of its trainable parameters, 0.61x its time and 0.43x its memory`, with what is not compared and why."""
    told, untold = [], []
    told.append(
        "an unknown share of its trainable parameters"
        if pair.parameters is None
        else f"{percent(pair.parameters)} of its trainable parameters"
    )
    for name, ratio, why in (("time", pair.time, pair.no_time), ("memory", pair.memory, pair.no_memory)):
        if ratio is not None:
            told.append(f"{ratio:.2f}x its {name}")
        else:
            untold.append((name, why or "not measured"))
    text = told[0] if len(told) == 1 else ", ".join(told[:-1]) + " and " + told[-1]
    if len({why for _, why in untold}) == 1:
        untold = [(" and ".join(name for name, _ in untold), untold[0][1])]
    return text + "".join(f"; {name} not compared ({why})" for name, why in untold)


def percent(share: float) -> str:
    """A share with two significant digits: 0.95%, 12%, 100%."""
    return f"{100 * share:.2g}%" if share < 0.995 else f"{100 * share:.0f}%"


def _no_pair(groups: Sequence[Group]) -> str:
    """What can be said where no LoRA group is comparable with a full one."""
    fulls = [group for group in groups if group.mode == "full"]
    loras = [group for group in groups if group.mode == "lora"]
    alone = "; ".join(_alone(group) for group in groups[:4])
    if fulls and loras:
        reasons = why_not(loras[0].finished[0], fulls[0].finished[0])
        why = ", ".join(dict.fromkeys(map(short, reasons)))
        return f"LoRA and full are not comparable with one another ({why}): {alone}"
    missing = "LoRA" if fulls else "full"
    return f"{alone}; there is no finished {missing} run to compare with"


def _alone(group: Group) -> str:
    best, gain = best_loss(group), improvement(group)
    if gain is None:
        return f"{group.label} reached a best validation loss of {best.mean:.4f} (its base was not evaluated)"
    how = "improved" if gain.mean > 0 else "did not improve"
    return f"{group.label} {how} on its base ({best.mean + gain.mean:.4f} -> {best.mean:.4f} at best)"


def _card_clauses(groups: Sequence[Group]) -> list[str]:
    """How the groups stand to the card, those with the same answer in one clause."""
    by_reason: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        by_reason.setdefault(tuple(map(short, why_not_card(group.finished[0]))), []).append(group)
    clauses = []
    for reasons, members in by_reason.items():
        names = [group.label for group in members]
        if reasons:
            who = (
                names[0] + " is not"
                if len(names) == 1
                else ("neither is" if len(names) == 2 else "none is")
                if len(names) == len(groups)
                else ", ".join(names[:-1]) + " and " + names[-1] + " are not"
            )
            clauses.append(f"{who} comparable with the card: {', '.join(reasons)}")
        else:
            clauses.append(
                "; ".join(_against_card(group) for group in members)
                + " (as far as the card tells; see what is unknown of it)"
            )
    return clauses


def _against_card(group: Group) -> str:
    last = reference.CURVE[-1]
    gap = card_difference(group, last.epoch)
    if gap is None:
        return f"{group.label} has no evaluation at the card's epoch {last.epoch}"
    where = f"{abs(gap):.4f} {'above' if gap > 0 else 'below'}" if round(gap, 4) else "exactly at"
    return f"{group.label} ended {where} the card's {last.val_loss:.4f} at epoch {last.epoch}"


def _details(pair: Pair) -> list[str]:
    """The numbers behind the verdict on a pair, and under which conditions its cost was measured."""
    full, lora = _with_spread(pair.full_best), _with_spread(pair.lora_best)
    text = f"{pair.lora.label} against {pair.full.label}: best validation loss {lora} against {full}, "
    text += f"difference {pair.gap.difference:+.4f} nats per token"
    if pair.gap.low is not None and pair.gap.high is not None:
        verb = "exceeds" if pair.gap.exceeds else "does not exceed"
        text += f" (95 % interval {pair.gap.low:+.4f} to {pair.gap.high:+.4f}), which {verb} the spread between seeds"
    if pair.full_gain and pair.lora_gain and not pair.no_share:
        text += f". Improvement on the base: {pair.lora_gain.mean:.4f} against {pair.full_gain.mean:.4f}"
    return [text + ".", *_conditions(pair)]


def _spread_lines(pairs: Sequence[Pair]) -> list[str]:
    """How a difference is held against the spread between seeds, and for which pairs that is not known."""
    unknown = [pair.lora.label for pair in pairs if pair.gap.exceeds is None]
    lines = [RULE] if len(unknown) < len(pairs) else []
    if unknown:
        whose = f" for {', '.join(unknown)}" if lines else ""
        lines.append(
            f"Whether the difference exceeds the spread between seeds is not known{whose}: "
            "it takes two different seeds or more on both sides."
        )
    return lines


def _conditions(pair: Pair) -> list[str]:
    """What time and memory depend on and was not the same."""
    if pair.time is None and pair.memory is None:
        return []
    a, b = pair.lora.finished[0], pair.full.finished[0]
    paths = {
        "micro-batch": "resolved.micro_batch",
        "precision": "resolved.precision",
        "ZeRO file": "resolved.ds_config",
        "block length": "data.block_size",
        "threads per rank": "resolved.threads_per_rank",
    }
    other = [
        f"{name} {a.fact(path)} against {b.fact(path)}" for name, path in paths.items() if a.fact(path) != b.fact(path)
    ]
    return (
        [
            f"Time and memory of {pair.lora.label} and {pair.full.label} were measured with different settings: "
            f"{', '.join(other)}."
        ]
        if other
        else []
    )


def _with_spread(value: Spread) -> str:
    text = f"{value.mean:.4f}"
    return text if value.sd is None else f"{text} ± {value.sd:.4f} (n = {value.n})"


def _numbers(pair: Pair) -> dict[str, Any]:
    plain = dataclasses.asdict(dataclasses.replace(pair, full=None, lora=None))  # type: ignore[arg-type]
    names = {"full": pair.full.label, "lora": pair.lora.label, "full_runs": [run.run_id for run in pair.full.finished]}
    return {**plain, **names, "lora_runs": [run.run_id for run in pair.lora.finished]}
