"""What the comparison comes to: one sentence with its interval, three numbers, and what explains them line by line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config import reference
from trainer.report.comparability import comparison_blockers
from trainer.report.exploratory import build_views_of, describe_forgetting
from trainer.report.formats import capitalize, join_words
from trainer.report.full_vs_lora import (
    FullVsLora,
    comparable_groups,
    compare_set,
    difference_to_reference,
)
from trainer.report.headlines import (
    UNIT,
    Headline,
    build_headlines,
    describe_costs,
    describe_margin,
    describe_numbers,
)
from trainer.report.options import DEFAULT_OPTIONS, ComparisonOptions, StudyContext
from trainer.report.paired_interval import MIN_SEEDS, PairedInterval, holm, what_would_tell
from trainer.report.seed_groups import MODE_NAMES, SeedGroup, best_loss, improvement
from trainer.report.views import describe_views

INTERVAL_RULE = (
    "[a, b] is a {level:.3g} % interval over seeds and evaluation records taken as crossed random effects, from the "
    "losses of single records of runs paired by seed; it holds for the compared rates, not for others."
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The sentence, three numbers, what explains them, and the comparisons behind (the primary one first)."""

    sentence: str
    headlines: tuple[Headline, ...] = ()
    details: tuple[str, ...] = ()
    comparisons: tuple[FullVsLora, ...] = ()
    num_not_counted: int = 0
    study: StudyContext | None = None  #: where the settings were chosen by one

    @property
    def primary(self) -> FullVsLora | None:
        """The comparison that the sentence and the numbers are of."""
        return self.comparisons[0] if self.comparisons else None


def build_verdict(
    groups: Sequence[SeedGroup], with_reference: bool, options: ComparisonOptions = DEFAULT_OPTIONS
) -> Verdict:
    """The verdict over all groups; only finished runs count. One sentence for each data set that has both modes."""
    study = options.study
    finished = [group for group in groups if group.finished_runs]
    num_left_out = sum(len(group.runs) - len(group.finished_runs) for group in groups)
    if not finished:
        return Verdict(
            sentence="No run is finished and evaluated, so there is nothing to compare yet.",
            num_not_counted=num_left_out,
        )
    sets = [
        (compare_set(full_groups, lora_groups, options), full_groups, lora_groups)
        for full_groups, lora_groups in comparable_groups(finished, best_first=study is None)
    ]
    sentences = [_describe_set(*members, study) for members in sets] or [_describe_unpaired(finished)]
    if num_left_out:
        plural = "s" if num_left_out > 1 else ""
        sentences.append(f"{num_left_out} run{plural} without an end or an evaluation not counted.")
    comparisons = [comparison for members, _, _ in sets for comparison in members]
    details = [line for comparison in comparisons for line in describe_numbers(comparison)]
    details += _describe_other_comparisons([comparison for members, _, _ in sets for comparison in members[1:]])
    details += [line for members, _, _ in sets for line in describe_costs(members[0])]
    for members, full_groups, lora_groups in sets:
        details += describe_views(build_views_of(members[0], study))
        details += describe_forgetting([*full_groups, *lora_groups])
    details += study.lines if study else ()
    if any(comparison.losses for comparison in comparisons):
        details.append(INTERVAL_RULE.format(level=100 * options.level))
    if with_reference:
        details += [line for group in finished if (line := _describe_against_reference(group))]
    return Verdict(
        sentence=" ".join(sentences),
        headlines=build_headlines(comparisons[0]) if comparisons else (),
        details=tuple(details),
        comparisons=tuple(comparisons),
        num_not_counted=num_left_out,
        study=study,
    )


# --- the sentence ---


def _describe_other_comparisons(others: Sequence[FullVsLora]) -> list[str]:
    """That those beside the first of a data set are exploratory, and what is left of them after Holm's correction."""
    judged = [(pair.lora.label_with_lr, pair.excess.p_value) for pair in others if pair.excess is not None]
    if not judged:
        return []
    adjusted = holm([p_value for _, p_value in judged])
    parts = [f"{label} p = {p_value:.2g}" for (label, _), p_value in zip(judged, adjusted, strict=True)]
    return [f"Exploratory: all comparisons but the first; that their loss differs, after Holm: {', '.join(parts)}."]


def _describe_set(
    comparisons: Sequence[FullVsLora],
    full_groups: Sequence[SeedGroup],
    lora_groups: Sequence[SeedGroup],
    study: StudyContext | None,
) -> str:
    """The sentence on the best LoRA group of a data set against the best full one, or on the one of a study."""
    pair, num_full_groups = comparisons[0], len(full_groups)
    num_loras = len(comparisons) if study is None else 1
    lora, full = _describe_group(pair.lora, num_loras), _describe_group(pair.full, num_full_groups)
    if pair.blockers:
        return f"{capitalize(lora)} and {full} are not ranked: {'; '.join(pair.blockers)}."
    if pair.excess is None:
        return (
            f"Cannot tell whether {lora} is as good as {full}: validation loss {pair.lora_loss:.4f} against "
            f"{pair.full_loss:.4f}, a difference without an interval ({pair.no_losses}, and there is one seed)."
        )
    sentence = f"{_scope_prefix(pair.excess)}{_describe_answer(pair, pair.excess, lora, full)}, {_describe_basis(pair)}"
    if pair.excess.num_seeds == 1:
        sentence += "; one seed says nothing of the methods"
    if pair.answer == "cannot tell":
        sentence += f"; {_describe_what_would_tell(pair, pair.excess)}"
    if study is not None:
        return capitalize(sentence) + f"; {study.choice}."
    if (len(comparisons) > 1 or num_full_groups > 1) and not (pair.losses and pair.losses.split == "test"):
        sentence += "; exploratory, for the settings were chosen on these records"
    sentence += _describe_rates(pair, {"full": full_groups, "lora": lora_groups})
    return capitalize(sentence) + "."


def _describe_rates(pair: FullVsLora, groups_by_mode: Mapping[str, Sequence[SeedGroup]]) -> str:
    """A clause where a mode may be under-tuned: one rate, or the best at the edge of those that were tried."""
    rates = {mode: sorted({group.lr for group in groups}) for mode, groups in groups_by_mode.items()}
    if all(len(tried) == 1 for tried in rates.values()):
        return "; one rate each was tried"
    clauses = []
    for chosen in (pair.full, pair.lora):
        name, tried = MODE_NAMES[chosen.mode], rates[chosen.mode]
        if len(tried) == 1:
            clauses.append(f"; one rate of {name} was tried")
        elif chosen.lr in (tried[0], tried[-1]):
            side = "smallest" if chosen.lr == tried[0] else "largest"
            clauses.append(f"; {name}'s best rate is the {side} of {len(tried)}, so a better one may lie beyond")
    return "".join(clauses)


def _describe_answer(pair: FullVsLora, excess: PairedInterval, lora: str, full: str) -> str:
    interval = f"{UNIT} [{excess.low:+.4f}, {excess.high:+.4f}]"
    amount = f"{abs(excess.estimate):.4f} {interval}"
    if pair.answer == "better":
        return f"{lora} is better than {full} by {amount}"
    if pair.answer == "good enough":
        side = "worse" if excess.estimate > 0 else "better"
        return f"{lora} is good enough beside {full}: {side} by {amount}, within the margin of {describe_margin(pair)}"
    if pair.answer == "worse":
        more = "" if pair.contrast is None else f", more than the margin of {describe_margin(pair)}"
        return f"{lora} is worse than {full} by {amount}{more}"
    beside = "" if pair.contrast is None else f", beside a margin of {describe_margin(pair)}"
    return (
        f"cannot tell yet whether {lora} is good enough beside {full}: loss differs by {excess.estimate:+.4f} "
        f"{interval}{beside}"
    )


def _scope_prefix(excess: PairedInterval) -> str:
    if excess.num_seeds == 1:
        return "of these two models, "
    return "" if excess.num_seeds >= MIN_SEEDS else f"provisionally, with {excess.num_seeds} seeds, "


def _describe_basis(pair: FullVsLora) -> str:
    """`on 200 test records, seeds 1, 2 and 3, 90 steps`."""
    seeds = [str(full.get("settings.train.seed")) for full, _ in pair.pairs]
    steps = sorted({int(run.final_eval["step"]) for runs in pair.pairs for run in runs if run.final_eval})
    records = (
        f"on {pair.losses.num_records:,} {pair.losses.unit_name}"
        if pair.losses and not pair.losses.has_groups
        else f"on {len(pair.losses.targets):,} {pair.losses.unit_name}"
        if pair.losses
        else "on this validation set alone"
    )
    steps_text = " and ".join(f"{step:,}" for step in steps)
    return f"{records}, seed{'s' if len(seeds) > 1 else ''} {join_words(seeds)}, {steps_text} steps"


def _describe_what_would_tell(pair: FullVsLora, excess: PairedInterval) -> str:
    """The seeds or records that would decide: on which side of the margin, or of 0 where that is nearer."""
    unit_name = pair.losses.unit_name if pair.losses else "validation records"
    options = [what_would_tell(excess, excess.estimate, level=excess.level)]
    if (gap := pair.contrast) is not None:
        options = options if excess.estimate < 0 else []
        options.append(what_would_tell(gap, gap.estimate, level=gap.level, is_one_sided=gap.estimate < 0))
    seeds = min((option.num_seeds for option in options if option.num_seeds), default=None)
    units = min((option.num_units for option in options if option.num_units), default=None)
    if seeds is not None:
        return f"about {seeds} seeds would tell" + (" at least" if excess.num_seeds == 1 else "")
    floor = f"these {unit_name} tell no less than ±{options[-1].floor:.4f}, however many seeds"
    if units is not None:
        return f"{floor}: about {units:,} {unit_name} would tell"
    return f"{floor}, and the difference is too close to the margin for 200 times as many"


def _describe_group(group: SeedGroup, num_groups: int) -> str:
    """`LoRA (lr 0.005)`, or `the best of 3 LoRA settings (lr 0.005)`."""
    mode_name = MODE_NAMES[group.mode]
    label = group.label_with_lr
    return label if num_groups == 1 else f"the best of {num_groups} {mode_name} settings{label.removeprefix(mode_name)}"


def _describe_unpaired(groups: Sequence[SeedGroup]) -> str:
    """What can be said where no LoRA group is on the data of a full one."""
    full_groups, lora_groups = ([group for group in groups if group.mode == mode] for mode in ("full", "lora"))
    descriptions = "; ".join(_describe_alone(group) for group in groups[:4])
    if full_groups and lora_groups:
        reasons = comparison_blockers(lora_groups[0].finished_runs[0], full_groups[0].finished_runs[0])
        short_reasons = ", ".join(dict.fromkeys(reason.split(" (", 1)[0] for reason in reasons))
        return f"LoRA and full are not comparable with one another ({short_reasons}): {descriptions}."
    missing_mode = "LoRA" if full_groups else "full"
    return f"{capitalize(descriptions)}; there is no finished {missing_mode} run to compare with."


def _describe_alone(group: SeedGroup) -> str:
    best, gain = best_loss(group), improvement(group)
    if gain is None:
        return f"{group.label} reached a best validation loss of {best:.4f} (its base was not evaluated)"
    verb = "improved" if gain > 0 else "did not improve"
    return f"{group.label} {verb} on its base ({best + gain:.4f} -> {best:.4f} at best)"


def _describe_against_reference(group: SeedGroup) -> str:
    """How a group ended beside the card, "" where it is not comparable with it."""
    last_row = reference.CURVE[-1]
    gap = difference_to_reference(group, last_row.epoch)
    if gap is None:
        return ""
    position = f"{abs(gap):.4f} {'above' if gap > 0 else 'below'}" if round(gap, 4) else "exactly at"
    return f"{group.label} ended {position} the card's {last_row.val_loss:.4f} at epoch {last_row.epoch}."
