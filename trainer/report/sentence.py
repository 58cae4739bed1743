"""What the comparison comes to: one sentence with its interval, its numbers, and what explains them line by line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainer.config.text import capitalize, format_bytes, format_percent, join_words
from trainer.report.advice import advise_unpaired, describe_needed_sample, next_step
from trainer.report.comparable import MODE_NAMES, SeedGroup, comparison_blockers
from trainer.report.interval import LEVEL, MIN_SEEDS, PairedInterval, holm
from trainer.report.judge import FullVsLora, Margin, StudyContext, compare_sets
from trainer.report.run_data import LOSS, UNIT

INTERVAL_RULE = (
    f"[a, b] is a {100 * LEVEL:.3g} % interval over seeds and evaluation records taken as crossed random effects, from "
    "the losses of single records of runs paired by seed"
)


class Headline(NamedTuple):
    """One of the numbers of the first screen."""

    label: str
    value: str
    note: str

    def __str__(self) -> str:
        return f"{self.label}: {self.value} ({self.note})"


class RankResult(NamedTuple):
    """LoRA of one rank against full."""

    rank: int
    excess: PairedInterval
    p_value: float  #: of an excess at the margin or above it, one-sided, raised after Holm over the ranks
    is_good_enough: bool


class Statement(NamedTuple):
    """The sentence on one data set: what was found, and for which records, seeds and rates it holds."""

    claim: str
    scope: str = ""

    def __str__(self) -> str:
        return f"{capitalize(self.claim)}{self.scope}."


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The sentence, its numbers, what explains them, and the comparisons behind (the primary one first)."""

    answer: str | None  #: the primary comparison's, "not ranked" where there may be none, None of one mode alone
    sentence: str
    statement: Statement  #: the sentence's first part: of the primary comparison, where there is one
    next_step: str = ""
    headlines: tuple[Headline, ...] = ()
    details: tuple[str, ...] = ()
    comparisons: tuple[FullVsLora, ...] = ()
    ranks: tuple[RankResult, ...] = ()  #: of several that were compared, which are good enough
    num_not_counted: int = 0
    study: StudyContext | None = None  #: where the settings were chosen by one

    @property
    def primary(self) -> FullVsLora | None:
        """The comparison that the sentence and the numbers are of."""
        return self.comparisons[0] if self.comparisons else None


def build_verdict(groups: Sequence[SeedGroup], margin: Margin, study: StudyContext | None = None) -> Verdict:
    """The verdict over all groups; only finished runs count. One sentence for each data set that has both modes."""
    finished = [group for group in groups if group.finished_runs]
    num_left_out = sum(len(group.runs) - len(group.finished_runs) for group in groups)
    sets = compare_sets(finished, margin, study)
    statements = [_describe_set(*members, study) for members in sets] or [Statement(_describe_unpaired(finished))]
    sentences = [*map(str, statements)]
    diverged = [text for group in groups if (text := group.divergence)]
    sentences += [f"{capitalize(text)}." for text in diverged if text not in " ".join(sentences)]
    num_unsaid = num_left_out - sum(run.has_diverged for group in groups for run in group.runs)
    if finished and num_unsaid:
        sentences.append(f"Not counted, as without an end or an evaluation: {num_unsaid}.")

    comparisons = [comparison for members, _, _ in sets for comparison in members]
    details = [line for comparison in comparisons for line in describe_numbers(comparison, comparisons[0])]
    if study is None and comparisons and not comparisons[0].is_judged:  # a study's own lines say it
        costs = {"Time": comparisons[0].time, "Memory": comparisons[0].memory}
        details += [f"{name} not compared ({cost.reason})." for name, cost in costs.items() if cost.ratio is None]
    ranks = judge_ranks(comparisons)
    details += describe_ranks(ranks)
    details += [*describe_lengths(study, ranks), *study.lines] if study else ()
    if any(comparison.losses for comparison in comparisons):
        rates = "" if comparisons[0].is_judged else "; it holds for the compared rates, not for others"
        details.append(f"{INTERVAL_RULE}{rates}.")
    is_refused = bool(diverged) or {group.mode for group in finished} == set(MODE_NAMES)  # without a comparison
    return Verdict(
        answer=comparisons[0].answer if comparisons else "not ranked" if is_refused else None,
        sentence=" ".join(sentences),
        statement=statements[0],
        next_step=next_step(*sets[0], study) if sets else advise_unpaired(groups),
        headlines=_build_headlines(comparisons[0]) if comparisons else (),
        details=tuple(details),
        comparisons=tuple(comparisons),
        ranks=tuple(ranks),
        num_not_counted=num_left_out,
        study=study,
    )


# --- the sentence ---


def _describe_set(
    comparisons: Sequence[FullVsLora],
    full_groups: Sequence[SeedGroup],
    lora_groups: Sequence[SeedGroup],
    study: StudyContext | None,
) -> Statement:
    """The sentence on the best LoRA group of a data set against the best full one, or on the one of a study."""
    pair, excess = comparisons[0], comparisons[0].excess
    names, ranked = [], [comparison for comparison in comparisons if not comparison.blockers] or comparisons
    for group, num_groups in ((pair.lora, 1 if study else len(ranked)), (pair.full, len(full_groups))):
        mode_name, name = MODE_NAMES[group.mode], group.label_with_lr
        if num_groups > 1 and not pair.is_judged:
            name = f"the best of {num_groups} {mode_name} settings{name.removeprefix(mode_name)}"
        names.append(name)
    lora, full = names
    if pair.blockers:
        return Statement(f"{lora} and {full} are not ranked: {'; '.join(pair.blockers)}")
    if excess is None:
        claim = f"cannot tell whether {lora} is as good as {full}: validation loss {pair.lora_loss:.4f} against "
        return Statement(claim + f"{pair.full_loss:.4f}, a difference without an interval ({pair.no_losses})")

    claim = "of these two models, " if excess.num_seeds == 1 else f"provisionally, with {excess.num_seeds} seeds, "
    claim = "" if excess.num_seeds >= MIN_SEEDS else claim
    claim += (_claim_of_losses if pair.margin.measure == LOSS else _claim_of_scores)(pair, excess, lora, full)
    if forgetting := pair.forgetting_points or pair.forgetting:
        digits, unit = (".1f", "points") if pair.forgetting_points else ("+.4f", UNIT)
        low, high, word = forgetting.low, forgetting.high, "more"
        if forgetting.estimate < 0:
            low, high, word = -high, -low, "less"
        amount = f"{abs(forgetting.estimate):{digits.lstrip('+')}}"
        claim += f", and forgets {amount} [{low:{digits}}, {high:{digits}}] {unit} {word}"
    return Statement(claim, _describe_scope(comparisons, ranked, full_groups, lora_groups, study))


def _claim_of_losses(pair: FullVsLora, excess: PairedInterval, lora: str, full: str) -> str:
    interval = f"{pair.unit} [{excess.low:+.4f}, {excess.high:+.4f}]"
    margin = f"margin of {pair.margin.describe(pair.losses, pair.full.name)}"
    side, amount = "worse" if excess.estimate > 0 else "better", f"{abs(excess.estimate):.4f} {interval}"
    if pair.answer == "good enough":
        return f"{lora} is good enough beside {full}: {side} by {amount}, within the {margin}"
    if pair.answer in ("better", "worse"):
        is_beyond = pair.contrast and side == "worse"
        return f"{lora} is {side} than {full} by {amount}" + f", more than the {margin}" * bool(is_beyond)
    claim = f"cannot tell yet whether {lora} is good enough beside {full}: loss differs by {excess.estimate:+.4f} "
    return claim + interval + f", beside a {margin}" * bool(pair.contrast)


def _claim_of_scores(pair: FullVsLora, excess: PairedInterval, lora: str, full: str) -> str:
    """`LoRA answers 1.2 points fewer correctly than full (71.0 % against 72.2 %; ...): good enough by your margin`."""
    assert pair.judged is not None
    are_answers = pair.judged.is_of_right_answers
    fewer, more = ("fewer", "more") if are_answers else ("lower", "higher")
    low, high = f"{abs(excess.low):.1f}", f"{abs(excess.high):.1f}"
    interval = f"{low} {more} to {high} {fewer}"
    if excess.excludes_zero:
        interval = f"{low} to {high} {fewer}" if excess.low > 0 else f"{high} to {low} {more}"
    points = f"{abs(excess.estimate):.1f} points {fewer if excess.estimate > 0 else more}"
    lora_score, full_score = (f"{pair.judged.score(mode):.1f}{' %' * are_answers}" for mode in ("lora", "full"))
    is_equal, scorer = abs(excess.estimate) < 0.05, pair.margin.measure.partition(":")[2]  # 0.0 points
    if are_answers:
        verb = f"answers {'as many' if is_equal else points} correctly {'as' if is_equal else 'than'} {full}"
    else:
        verb = f"scores {'as much as' if is_equal else f'{points} than'} {full} by {scorer}"
    margin = f"{'the' if pair.margin.is_default else 'your'} margin of {pair.margin.describe()}"
    end = {
        "better": "better",
        "good enough": f"good enough by {margin}",
        "worse": f"worse, by more than {margin}",
    }.get(pair.answer, f"cannot tell yet whether that is good enough by {margin}")
    return f"{lora} {verb} ({lora_score} against {full_score}; {100 * LEVEL:.3g} % interval {interval}): {end}"


def _describe_scope(
    comparisons: Sequence[FullVsLora],
    ranked: Sequence[FullVsLora],
    full_groups: Sequence[SeedGroup],
    lora_groups: Sequence[SeedGroup],
    study: StudyContext | None,
) -> str:
    """Of which records, seeds and rates it holds; what else differs between the modes, and what would tell more."""
    pair, judged = comparisons[0], comparisons[0].judged
    assert judged is not None
    records = f"on {len(judged.units) if judged.has_clusters else judged.num_records:,} {judged.unit_name}"
    if pair.is_judged:
        scope = f", {records}" + f", {len(pair.pairs)} pairs of models" * (len(pair.pairs) > 1)
        unpaired = max(len(pair.full.runs), len(pair.lora.runs)) - len(pair.pairs)
        scope += f"; models without a partner: {unpaired}" * bool(unpaired)
        scope += "; whether a model was trained on these records is not known"
        scope += "".join(f"; {note}" for note in pair.full.runs[0].get("judged.notes"))
        return scope + f"; {pair.doubt or describe_needed_sample(pair)}" * (pair.answer == "cannot tell")
    seeds = [str(full_run.get("settings.train.seed")) for full_run, _ in pair.pairs]
    steps = sorted({int(run.final_eval["step"]) for runs in pair.pairs for run in runs if run.final_eval})
    scope = f", {records}, seed{'s' if len(seeds) > 1 else ''} {join_words(seeds, 'and')}, "
    scope += f"{' and '.join(f'{step:,}' for step in steps)} steps"

    if len(pair.pairs) == 1:
        scope += "; one seed says nothing of the methods"
    if pair.mcnemar is not None:
        scope += f"; McNemar's exact test: p = {pair.mcnemar:.2g}"
    for group in (pair.full, pair.lora):
        alone = sorted({str(run.get("settings.train.seed")) for run in group.finished_runs} - set(seeds))
        if alone:
            scope += f"; of {group.name} without a partner: seeds {', '.join(alone)}"
        if num_again := len(group.finished_runs) - len({run.get("settings.train.seed") for run in group.finished_runs}):
            scope += f"; runs of {group.name} left out, as another has their seed: {num_again}"
    full_run, lora_run = pair.full.runs[0], pair.lora.runs[0]
    sizes = [f"{run.get('resolved.micro_batch')} on {run.get('resolved.ranks')}" for run in (lora_run, full_run)]
    if sizes[0] != sizes[1] and (full_run.get("resolved.dropout") or lora_run.get("settings.lora.dropout")):
        scope += f"; dropout drew other masks (micro-batch {sizes[0]} against {sizes[1]} ranks)"
    if pair.answer == "cannot tell":
        scope += f"; {pair.doubt or describe_needed_sample(pair)}"
    if study is not None:
        return f"{scope}; {study.choice}"
    if not pair.margin.is_default:
        scope += "; the margin was chosen after the runs"
    for other in comparisons if ranked[0] is pair else ():
        scope += f"; {other.lora.label_with_lr} is not ranked ({other.blockers[0]})" if other.blockers else ""
    if (len(ranked) > 1 or len(full_groups) > 1) and judged.split != "test":
        scope += "; exploratory, for the settings were chosen on these records"
    for chosen, groups in ((pair.full, full_groups), (pair.lora, lora_groups)):
        tried = [group.lr for group in groups]
        if min(tried) == max(tried):
            scope += f"; one rate of {chosen.name} was tried"
        elif chosen.lr in (min(tried), max(tried)):
            scope += f"; {chosen.name}'s best rate is at the edge of those tried, so a better one may lie beyond"
    return scope


def _describe_unpaired(groups: Sequence[SeedGroup]) -> str:
    if not groups:
        return "no run is finished and evaluated, so there is nothing to compare yet"
    descriptions = "; ".join(f"{group.label}: validation loss {group.best_loss:.4f} at best" for group in groups[:4])
    full_groups, lora_groups = ([group for group in groups if group.mode == mode] for mode in MODE_NAMES)
    if full_groups and lora_groups:
        reasons = comparison_blockers(lora_groups[0].finished_runs[0], full_groups[0].finished_runs[0])
        short_reasons = ", ".join(dict.fromkeys(reason.split(" (", 1)[0] for reason in reasons))
        return f"LoRA and full are not comparable with one another ({short_reasons}): {descriptions}"
    missing_mode = "LoRA" if full_groups else "full"
    return f"{capitalize(descriptions)}; there is no finished {missing_mode} run to compare with"


# --- the numbers, and what explains them ---


def _build_headlines(pair: FullVsLora) -> tuple[Headline, ...]:
    if pair.blockers:
        return ()
    judged, base = pair.judged, pair.base_loss
    unit, full, lora = pair.losses.unit if pair.losses else UNIT, pair.full.name, pair.lora.name
    where = f"{unit} on {pair.losses.unit_name if pair.losses else 'validation records'}"
    before = "" if base is None else f"{base:.4f} → "
    headlines = [Headline("Loss", f"{before}{pair.full_loss:.4f} ({full}), {pair.lora_loss:.4f} ({lora})", where)]
    if judged is not None and judged.measure != LOSS:
        values = f"{judged.score('full'):.1f} (full), {judged.score('lora'):.1f} (LoRA)"
        headlines.insert(0, Headline("Score", values, f"{judged.measure.partition(':')[2]}, points of 100"))
    for mode, tradeoff in pair.tradeoffs.items():
        headlines.append(Headline(f"Forgotten by {MODE_NAMES[mode]}", f"{tradeoff.forgetting.estimate:+.4f}", UNIT))
    time, memory = pair.time, pair.memory
    if time.ratio is not None:
        values = f"{time.lora:.3g} s a step against {time.full:.3g} s, in alternation"
        headlines.append(Headline("Time", f"{time.ratio:.2f}x", values))
    if memory.ratio is not None:
        values = f"{format_bytes(memory.lora)} against {format_bytes(memory.full)}"
        headlines.append(Headline("Memory", f"{memory.ratio:.2f}x", values))
    if pair.parameters is not None:
        headlines.append(Headline("Trained weights", format_percent(pair.parameters), "LoRA's, of full's"))
    if judged is not None and judged.measure == LOSS and pair.excess is not None:
        note = f"of {len(judged.units):,} {judged.unit_name}; a tenth has {pair.excess.top_tenth:.0%} of the spread"
        headlines.append(Headline("Effective records", f"{pair.excess.effective_units:,.0f}", note))
    return tuple(headlines)


def describe_numbers(pair: FullVsLora, primary: FullVsLora) -> list[str]:
    """What is behind a comparison and the sentence does not say of it, and what cannot be had; of others one line."""
    losses, judged, unit, lines = pair.losses, pair.judged, pair.unit, []
    names = "" if pair is primary else f"Exploratory, {pair.lora.label_with_lr} against {pair.full.label_with_lr}: "
    if judged is None or losses is None or pair.excess is None:  # of the primary the sentence has it
        return [f"{names}not ranked ({'; '.join(pair.blockers) or pair.no_losses})."] if names else []
    margin = f"whether it is within the margin is not known: {pair.margin.why_not(judged)}"
    if pair.contrast is not None:
        margin = (
            f"beyond the margin of {pair.margin.describe(judged, pair.full.name)} at most {pair.contrast.upper:+.4f} "
        )
        margin += f"{unit} (one-sided {100 * LEVEL:.3g} %)"
    if names:
        about = f"{pair.answer}; loss {pair.lora_loss:.4f} against {pair.full_loss:.4f} {losses.unit}"
        return [f"{names}{about}; difference {pair.excess} {unit}; {margin}."]
    lines.append(f"{capitalize(margin)}.")
    if losses.num_seen:
        lines.append(f"{losses.num_seen:,} records that are not new (see the plan) are left out.")
    if losses.are_blocks and (column := pair.full.runs[0].get("data.split_by")):
        lines.append(
            f"Records of one {column} may stand in several blocks, which the interval takes for independent; it may be "
            "too narrow, and --objective completion keeps records apart."
        )
    if judged.measure == LOSS:
        records = ", ".join(f"“{name}” ({excess:+.4f})" for name, excess in pair.decisive)
        lines.append(f"{pair.lora.name}'s excess ({unit}) where it counts most: {records}.")
    return lines


# --- how much LoRA is enough: its excess by rank, and by length of training ---


def judge_ranks(comparisons: Sequence[FullVsLora]) -> list[RankResult]:
    """Each rank of a study, in order, of the first comparison's kind of adapter, each at its own best rate; none where
    there is only one rank or the margin cannot be had."""
    ranked, kinds = [], []
    for pair in comparisons:
        run = pair.lora.runs[0]
        kinds.append([run.get(f"settings.{name}") for name in ("lora.adapter", "lora.peft_config", "model.quant")])
        rank = run.get("settings.lora.rank")  # None of a model that launch/judge.py was given
        if rank and kinds[-1] == kinds[0] and pair.excess is not None and pair.contrast is not None:
            p = pair.contrast.p_value / 2
            p = p if pair.contrast.estimate < 0 else 1 - p
            can_be = "good enough" not in pair.doubts
            ranked.append(RankResult(rank, pair.excess, p, can_be))
    if len({result.rank for result in ranked}) < 2:
        return []
    raised = zip(ranked, holm([result.p_value for result in ranked]), strict=True)
    results = [r._replace(p_value=p, is_good_enough=r.is_good_enough and p < 1 - LEVEL) for r, p in raised]
    return sorted(results, key=lambda result: result.rank)


def describe_ranks(results: Sequence[RankResult]) -> list[str]:
    """`LoRA's excess by rank: ...; the smallest rank that is good enough is 4.`"""
    if not results:
        return []
    parts = ", ".join(f"rank {r.rank} {r.excess} (p = {r.p_value:.2g})" for r in results)
    smallest = next((r.rank for r in results if r.is_good_enough), None)
    answer = (
        f"the smallest rank that is good enough is {smallest}" if smallest else "no rank is shown to be good enough"
    )
    test = f"one-sided against the margin, after Holm over {len(results)} ranks"
    return [f"LoRA's excess by rank, each at its own best rate: {parts}; {answer} ({test})."]


def describe_lengths(study: StudyContext, results: Sequence[RankResult]) -> list[str]:
    """The excess by length of training, and what it says of ten times the data."""
    if len(study.by_length) < 2:
        return []
    (first_steps, first), *_, (last_steps, last) = study.by_length
    parts = [f"{steps:,} steps {interval}" for steps, interval in study.by_length]
    trend = "does not clearly change with the length"
    if last.low > first.high or last.high < first.low:
        trend = f"{'grows' if last.low > first.high else 'shrinks'} from {first_steps:,} to {last_steps:,} steps"
    ranks = "one rank was tried, so they do not say whether a higher one would help"
    if results:
        helps = results[-1].excess.high < results[0].excess.low
        ranks = f"rank {results[-1].rank} is {'' if helps else 'not clearly '}better than rank {results[0].rank}"
    return [
        f"LoRA's excess by length of training, on validation records, each at its own best rates: {', '.join(parts)} "
        f"nats per token (seeds: {first.num_seeds}, of the last {last.num_seeds}).",
        "Would it hold with ten times the data? These plots cannot say: every length and rank saw these data alone. "
        f"They show that the excess {trend}, and that {ranks}. If it grows with length, or falls with rank, there is "
        "reason to expect a larger one with more data; study a part of them and all of them to know.",
    ]
