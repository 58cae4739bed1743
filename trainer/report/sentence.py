"""What the comparison comes to: one sentence with its interval, three numbers, and what explains them line by line."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import fsum, log
from statistics import fmean
from typing import Any, NamedTuple

from trainer.config import reference
from trainer.config.text import capitalize, format_bytes, format_duration, format_percent, join_words, shorten
from trainer.report.comparable import MODE_NAMES, SeedGroup, comparison_blockers
from trainer.report.interval import LEVEL, MIN_SEEDS, PairedInterval, holm, plan_sample_size
from trainer.report.judge import DEFAULT_MARGIN, FullVsLora, Margin, StudyContext, compare_sets, difference_to_reference
from trainer.report.views import View, describe_views

UNIT = "nats per token"
INTERVAL_RULE = (
    f"[a, b] is a {100 * LEVEL:.3g} % interval over seeds and evaluation records taken as crossed random effects, from "
    "the losses of single records of runs paired by seed; it holds for the compared rates, not for others."
)
#: what time and memory depend on, beside the method
COST_SETTINGS = {
    "micro-batch": "resolved.micro_batch",
    "precision": "resolved.precision",
    "ZeRO file": "resolved.ds_config",
    "block length": "data.block_size",
    "threads per rank": "resolved.threads_per_rank",
}


class Headline(NamedTuple):
    """One of the three numbers of the first screen."""

    label: str
    value: str
    note: str

    def __str__(self) -> str:
        return f"{self.label}: {self.value} ({self.note})"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The sentence, three numbers, what explains them, and the comparisons behind (the primary one first)."""

    sentence: str
    headlines: tuple[Headline, ...] = ()
    details: tuple[str, ...] = ()
    comparisons: tuple[FullVsLora, ...] = ()
    views: tuple[View, ...] = ()  #: both modes at equal cost: the primary comparison's, or the study's
    num_not_counted: int = 0
    study: StudyContext | None = None  #: where the settings were chosen by one

    @property
    def primary(self) -> FullVsLora | None:
        """The comparison that the sentence and the numbers are of."""
        return self.comparisons[0] if self.comparisons else None


def build_verdict(
    groups: Sequence[SeedGroup], with_reference: bool, margin: Margin, study: StudyContext | None = None
) -> Verdict:
    """The verdict over all groups; only finished runs count. One sentence for each data set that has both modes."""
    finished = [group for group in groups if group.finished_runs]
    num_left_out = sum(len(group.runs) - len(group.finished_runs) for group in groups)
    diverged = [f"{capitalize(group.divergence)}." for group in groups if group.divergence and not group.finished_runs]
    if not finished:
        sentence = "No run is finished and evaluated, so there is nothing to compare yet."
        return Verdict(sentence=" ".join([sentence, *diverged]), num_not_counted=num_left_out)
    sets = compare_sets(finished, margin, study)
    sentences = [_describe_set(*members, study) for members in sets] or [_describe_unpaired(finished)]
    sentences += diverged
    if num_left_out:
        plural = "s" if num_left_out > 1 else ""
        sentences.append(f"{num_left_out} run{plural} without an end or an evaluation not counted.")

    comparisons = [comparison for members, _, _ in sets for comparison in members]
    details = [line for comparison in comparisons for line in describe_numbers(comparison)]
    others = [(pair, pair.excess) for members, _, _ in sets for pair in members[1:] if pair.excess]
    if others:
        adjusted = holm([excess.p_value for _, excess in others])
        parts = [f"{pair.lora.label_with_lr} p = {p:.2g}" for (pair, _), p in zip(others, adjusted, strict=True)]
        claims = "all comparisons but the first; that their loss differs, after Holm"
        details.append(f"Exploratory: {claims}: {', '.join(parts)}.")
    details += [line for members, _, _ in sets for line in _describe_costs(members[0])]
    views = [study.views if study else members[0].views for members, _, _ in sets]
    for (_, full_groups, lora_groups), views_of_set in zip(sets, views, strict=True):
        details += describe_views(views_of_set)
        details += _describe_forgetting([*full_groups, *lora_groups])
    details += study.lines if study else ()
    if any(comparison.losses for comparison in comparisons):
        details.append(INTERVAL_RULE)
    last_row = reference.CURVE[-1]
    for group in finished if with_reference else ():
        gap = difference_to_reference(group, last_row.epoch)
        if gap is not None:
            position = f"{abs(gap):.4f} {'above' if gap > 0 else 'below'}" if round(gap, 4) else "exactly at"
            end = f"the card's {last_row.val_loss:.4f} at epoch {last_row.epoch}"
            details.append(f"{group.label} ended {position} {end}.")
    return Verdict(
        sentence=" ".join(sentences),
        headlines=_build_headlines(comparisons[0]) if comparisons else (),
        details=tuple(details),
        comparisons=tuple(comparisons),
        views=views[0] if views else (),
        num_not_counted=num_left_out,
        study=study,
    )


# --- the sentence ---


def _describe_set(
    comparisons: Sequence[FullVsLora],
    full_groups: Sequence[SeedGroup],
    lora_groups: Sequence[SeedGroup],
    study: StudyContext | None,
) -> str:
    """The sentence on the best LoRA group of a data set against the best full one, or on the one of a study."""
    pair, excess, losses = comparisons[0], comparisons[0].excess, comparisons[0].losses
    names, ranked = [], [comparison for comparison in comparisons if not comparison.blockers] or comparisons
    for group, num_groups in ((pair.lora, 1 if study else len(ranked)), (pair.full, len(full_groups))):
        mode_name, name = MODE_NAMES[group.mode], group.label_with_lr
        if num_groups > 1:
            name = f"the best of {num_groups} {mode_name} settings{name.removeprefix(mode_name)}"
        names.append(name)
    lora, full = names
    if pair.blockers:
        return f"{capitalize(lora)} and {full} are not ranked: {'; '.join(pair.blockers)}."
    if excess is None:
        return (
            f"Cannot tell whether {lora} is as good as {full}: validation loss {pair.lora_loss:.4f} against "
            f"{pair.full_loss:.4f}, a difference without an interval ({pair.no_losses}, and there is one seed)."
        )

    sentence = ""
    if excess.num_seeds == 1:
        sentence = "of these two models, "
    elif excess.num_seeds < MIN_SEEDS:
        sentence = f"provisionally, with {excess.num_seeds} seeds, "

    interval, margin = f"{UNIT} [{excess.low:+.4f}, {excess.high:+.4f}]", pair.margin.describe(losses)
    amount = f"{abs(excess.estimate):.4f} {interval}"
    if pair.answer == "better":
        sentence += f"{lora} is better than {full} by {amount}"
    elif pair.answer == "good enough":
        side = "worse" if excess.estimate > 0 else "better"
        sentence += f"{lora} is good enough beside {full}: {side} by {amount}, within the margin of {margin}"
    elif pair.answer == "worse":
        sentence += f"{lora} is worse than {full} by {amount}"
        sentence += f", more than the margin of {margin}" if pair.contrast else ""
    else:
        sentence += f"cannot tell yet whether {lora} is good enough beside {full}: loss differs by "
        sentence += f"{excess.estimate:+.4f} {interval}" + (f", beside a margin of {margin}" if pair.contrast else "")

    records = "on this validation set alone"
    if losses:
        num_units = len(losses.targets) if losses.has_clusters else losses.num_records
        records = f"on {num_units:,} {losses.unit_name}"
    seeds = [str(full_run.get("settings.train.seed")) for full_run, _ in pair.pairs]
    steps = sorted({int(run.final_eval["step"]) for runs in pair.pairs for run in runs if run.final_eval})
    sentence += f", {records}, seed{'s' if len(seeds) > 1 else ''} {join_words(seeds, 'and')}, "
    sentence += f"{' and '.join(f'{step:,}' for step in steps)} steps"

    if excess.num_seeds == 1:
        sentence += "; one seed says nothing of the methods"
    for group in (pair.full, pair.lora):
        alone = sorted({str(run.get("settings.train.seed")) for run in group.finished_runs} - set(seeds))
        if alone:
            sentence += f"; of {MODE_NAMES[group.mode]} also seed {join_words(alone, 'and')}, which has no partner"
    full_run, lora_run = pair.full.runs[0], pair.lora.runs[0]
    if quant := lora_run.get("settings.model.quant"):
        sentence += f"; LoRA on {quant} weights"
    sizes = [f"{run.get('resolved.micro_batch')} on {run.get('resolved.ranks')}" for run in (lora_run, full_run)]
    if sizes[0] != sizes[1] and (full_run.get("resolved.dropout") or lora_run.get("settings.lora.dropout")):
        sentence += f"; dropout drew other masks (micro-batch {sizes[0]} against {sizes[1]} ranks)"
    if pair.answer == "cannot tell":
        sentence += f"; {pair.doubt or _describe_needed_records(pair, excess)}"
    if study is not None:
        return capitalize(sentence) + f"; {study.choice}."
    if pair.margin != DEFAULT_MARGIN:
        sentence += "; the margin was chosen after the runs"
    for other in comparisons if ranked[0] is pair else ():
        sentence += f"; {other.lora.label_with_lr} is not ranked ({other.blockers[0]})" if other.blockers else ""
    if (len(ranked) > 1 or len(full_groups) > 1) and not (losses and losses.split == "test"):
        sentence += "; exploratory, for the settings were chosen on these records"
    return capitalize(sentence) + _describe_rates(pair, full_groups, lora_groups) + "."


def _describe_needed_records(pair: FullVsLora, excess: PairedInterval) -> str:
    """The seeds or records that would decide: on which side of the margin, or of 0 where that is nearer."""
    unit_name = pair.losses.unit_name if pair.losses else "validation records"
    options = [] if pair.contrast and excess.estimate >= 0 else [plan_sample_size(excess)]
    if pair.contrast is not None:
        options.append(plan_sample_size(pair.contrast, is_one_sided=pair.contrast.estimate < 0))
    seeds = min((option.num_seeds for option in options if option.num_seeds), default=None)
    units = min((option.num_units for option in options if option.num_units), default=None)
    if seeds is not None:
        return f"at least {seeds} seeds are needed"
    floor = f"with these {unit_name} no number of seeds resolves less than ±{options[-1].floor:.4f}"
    if units is not None:
        return f"{floor}: at least {units:,} {unit_name} are needed"
    return f"{floor}, and the difference is too close to the margin for 200 times as many"


def _describe_rates(pair: FullVsLora, full_groups: Sequence[SeedGroup], lora_groups: Sequence[SeedGroup]) -> str:
    """A clause where a mode may be under-tuned: one rate, or the best at the edge of those that were tried."""
    clauses, rates = [], [sorted({group.lr for group in groups}) for groups in (full_groups, lora_groups)]
    if all(len(tried) == 1 for tried in rates):
        return "; one rate each was tried"
    for chosen, tried in zip((pair.full, pair.lora), rates, strict=True):
        name = MODE_NAMES[chosen.mode]
        if len(tried) == 1:
            clauses.append(f"; one rate of {name} was tried")
        elif chosen.lr in (tried[0], tried[-1]):
            side = "smallest" if chosen.lr == tried[0] else "largest"
            clauses.append(f"; {name}'s best rate is the {side} of {len(tried)}, so a better one may lie beyond")
    return "".join(clauses)


def _describe_unpaired(groups: Sequence[SeedGroup]) -> str:
    """What can be said where no LoRA group is on the data of a full one."""
    parts = []
    for group in groups[:4]:
        best, gain = group.best_loss, group.improvement
        if gain is None:
            parts.append(f"{group.label} reached a best validation loss of {best:.4f} (its base was not evaluated)")
        else:
            verb = "improved" if gain > 0 else "did not improve"
            parts.append(f"{group.label} {verb} on its base ({best + gain:.4f} -> {best:.4f} at best)")
    descriptions = "; ".join(parts)
    full_groups, lora_groups = ([group for group in groups if group.mode == mode] for mode in MODE_NAMES)
    if full_groups and lora_groups:
        reasons = comparison_blockers(lora_groups[0].finished_runs[0], full_groups[0].finished_runs[0])
        short_reasons = ", ".join(dict.fromkeys(reason.split(" (", 1)[0] for reason in reasons))
        return f"LoRA and full are not comparable with one another ({short_reasons}): {descriptions}."
    missing_mode = "LoRA" if full_groups else "full"
    return f"{capitalize(descriptions)}; there is no finished {missing_mode} run to compare with."


# --- the three numbers, and what explains them ---


def _build_headlines(pair: FullVsLora) -> tuple[Headline, ...]:
    """Loss, time and memory, each with its interval or the reason why there is none."""
    loss = Headline("Loss", "-", "; ".join(pair.blockers) or "no interval: " + pair.no_losses)
    if pair.excess is not None:
        interval = f"[{pair.excess.low:+.4f}, {pair.excess.high:+.4f}]"
        note = f"{interval} {UNIT}{_bits_per_byte(pair)}, LoRA − full"
        loss = Headline("Loss", f"{pair.excess.estimate:+.4f}", note)
    headlines = [loss]
    for label, cost, format_value in (("Time", pair.time, format_duration), ("Memory", pair.memory, format_bytes)):
        values = f"{format_value(cost.lora)} against {format_value(cost.full)}"
        is_measured = cost.lora is not None and cost.full is not None
        if cost.is_of_a_step and is_measured:
            values = f"{cost.lora:.3g} s a step against {cost.full:.3g} s, in alternation"
        if cost.ratio is not None:
            headlines.append(Headline(label, f"{cost.ratio:.2f}x", values))
        else:
            headlines.append(Headline(label, "-", f"not compared: {cost.reason}" + f" ({values})" * is_measured))
    return tuple(headlines)


def _bits_per_byte(pair: FullVsLora) -> str:
    """` = +0.0100 bits per byte` of the excess, "" where the bytes of the records are not known."""
    if pair.losses is None or pair.excess is None or not pair.losses.num_bytes.all():
        return ""
    nats = pair.excess.estimate * fsum(pair.losses.targets)  # the same summed loss over these records' bytes
    return f" = {nats / (log(2) * fsum(pair.losses.num_bytes)):+.4f} bits per byte"


def describe_numbers(pair: FullVsLora) -> list[str]:
    """The losses behind a comparison, what cannot be had, and what the costs depend on."""
    names, losses = f"{pair.lora.label_with_lr} against {pair.full.label_with_lr}", pair.losses
    if pair.blockers:
        return [f"{names}: not ranked ({'; '.join(pair.blockers)})."]
    line = f"{names}: {pair.answer}; loss {pair.lora_loss:.4f} against {pair.full_loss:.4f}"
    line += f", {UNIT}" if pair.excess is None else f", difference {pair.excess} {UNIT}"
    line += _bits_per_byte(pair)
    if pair.contrast is not None:
        line += f"; beyond the margin of {pair.margin.describe(losses)}: at most {pair.contrast.upper:+.4f} "
        line += f"(one-sided {100 * LEVEL:.3g} %)"
    elif pair.excess is not None:
        reason = pair.margin.why_not(losses) if losses else "that needs the losses of single records"
        line += f"; whether it is within the margin is not known: {reason}"
    lines = [line + "."]
    if losses and losses.num_in_train:
        lines.append(f"{names}: {losses.num_in_train:,} records that equal a training record are left out.")
    if losses and losses.are_blocks and (column := pair.full.runs[0].get("data.split_by")):
        lines.append(
            f"{names}: records of one {column} may stand in several blocks, which the interval takes for independent; "
            "it may be too narrow, and --objective completion keeps records apart."
        )
    if losses and pair.excess:
        records = ", ".join(f"{shorten(unit, 24)} ({excess:+.4f})" for unit, excess in pair.decisive)
        lines.append(
            f"{names}: {len(losses.units):,} {losses.unit_name} count for {pair.excess.effective_units:,.0f} equal "
            f"ones, a tenth of them has {pair.excess.top_tenth:.0%} of the spread; LoRA's excess a token where it "
            f"counts most: {records}."
        )
    if pair.no_losses:
        lines.append(f"{names}: {pair.no_losses}; an interval over seeds alone holds for this validation set only.")
    return lines


def _describe_costs(pair: FullVsLora) -> list[str]:
    """`LoRA against full: 0.95% of its trainable parameters, 0.43x its memory; time not compared (other hardware).`

    And what time and memory depend on and was not the same.
    """
    parts = [f"{format_percent(pair.parameters)} of its trainable parameters"]
    withheld: dict[str, list[str]] = {}
    for name, cost in (("time", pair.time), ("memory", pair.memory)):
        if cost.ratio is None:
            withheld.setdefault(cost.reason, []).append(name)
        else:
            parts.append(f"{cost.ratio:.2f}x its {name}")
    text = join_words(parts, "and")
    text += "".join(f"; {join_words(names, 'and')} not compared ({why})" for why, names in withheld.items())
    lines = [f"{pair.lora.label_with_lr} against {pair.full.label_with_lr}: {text}."]
    lora, full = pair.lora.finished_runs[0], pair.full.finished_runs[0]
    differences = [
        f"{name} {lora.get(path)} against {full.get(path)}"
        for name, path in COST_SETTINGS.items()
        if lora.get(path) != full.get(path)
    ]
    if differences and len(parts) > 1:
        lines.append(
            f"Time and memory of {pair.lora.label} and {pair.full.label} were measured with different settings: "
            f"{', '.join(differences)}."
        )
    return lines


def _describe_forgetting(groups: Sequence[SeedGroup]) -> list[str]:
    """The settings that none beats in both gain and forgetting, and both modes at equal forgetting.

    Of the settings whose runs measured both (--retain-data), in nats per token over seeds.
    """
    tradeoffs: list[tuple[SeedGroup, float, float]] = []  # (setting, gain on validation, forgetting)
    for group in groups:
        gain, forgetting = group.improvement, [run.forgetting for run in group.finished_runs]
        known = [value for value in forgetting if value is not None]
        if gain is not None and known == forgetting:
            tradeoffs.append((group, gain, fmean(known)))
    if not tradeoffs:
        return []
    front = [
        f"{group.label_with_lr} {gain:.4f} for {forgetting:+.4f}"
        for group, gain, forgetting in tradeoffs
        if not any(g >= gain and f <= forgetting and (g, f) != (gain, forgetting) for _, g, f in tradeoffs)
    ]
    lines = [
        f"Gain for forgetting (nats per token), of {len(tradeoffs)} settings those that none beats: {'; '.join(front)}."
    ]
    by_mode = {mode: [(gain, f) for group, gain, f in tradeoffs if group.mode == mode] for mode in ("lora", "full")}
    if all(by_mode.values()):
        budget = min(max(forgetting for _, forgetting in members) for members in by_mode.values())
        parts = []
        for mode, members in by_mode.items():
            gains = [gain for gain, forgetting in members if forgetting <= budget]
            name = MODE_NAMES[mode]
            parts.append(f"{name} gains {max(gains):.4f}" if gains else f"no {name} setting forgets so little")
        lines.append(f"Exploratory: at equal forgetting (at most {budget:+.4f}) {', '.join(parts)}.")
    return lines


# --- for machines ---


def to_answer(verdict: Verdict) -> dict[str, Any]:
    """The content of answer.json: the sentence, the three numbers, and each comparison with its interval."""
    comparisons = []
    for pair in verdict.comparisons:
        content: dict[str, Any] = {"answer": pair.answer, "not_ranked_because": list(pair.blockers)}
        for mode, group, loss in (("full", pair.full, pair.full_loss), ("lora", pair.lora, pair.lora_loss)):
            run_ids = [run.run_id for run in group.finished_runs]
            content[mode] = {"label": group.label_with_lr, "lr": group.lr, "runs": run_ids, "loss": loss}
        content |= {
            "seeds": [full.get("settings.train.seed") for full, _ in pair.pairs],
            "split": pair.losses.split if pair.losses else None,
            "records": pair.losses.num_records if pair.losses else None,
            "no_records_because": pair.no_losses,
            "excess": asdict(pair.excess) if pair.excess else None,
            "beyond_margin": asdict(pair.contrast) if pair.contrast else None,
            "margin": asdict(pair.margin),
            "doubt": pair.doubt,
            "decisive_records": [{"id": unit, "excess": excess} for unit, excess in pair.decisive],
            "is_margin_under_floor": pair.is_margin_under_floor,
            "parameters": pair.parameters,
            "time": asdict(pair.time),
            "memory": asdict(pair.memory),
        }
        comparisons.append(content)
    return {
        "format": 1,
        "sentence": verdict.sentence,
        "answer": verdict.primary.answer if verdict.primary else None,
        "numbers": [headline._asdict() for headline in verdict.headlines],
        "comparisons": comparisons,
        "views": [asdict(view) | {"favours": view.favours} for view in verdict.views],
        "not_counted": verdict.num_not_counted,
        **({"study": dict(verdict.study.facts)} if verdict.study else {}),
    }
