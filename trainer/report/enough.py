"""How much LoRA is enough: its excess over full by rank, with the smallest rank that is good enough, and by length."""

from collections.abc import Sequence
from typing import NamedTuple

from trainer.report.interval import LEVEL, PairedInterval, holm
from trainer.report.judge import FullVsLora, StudyContext


class RankResult(NamedTuple):
    """LoRA of one rank against full."""

    rank: int
    excess: PairedInterval
    p_value: float  #: of an excess at the margin or above it, one-sided, raised after Holm over the ranks
    is_good_enough: bool


def judge_ranks(comparisons: Sequence[FullVsLora]) -> list[RankResult]:
    """Each rank of a study, in order; none where it has only one or the margin cannot be had.

    Others than the first comparison are of the same kind of adapter, LoRA, at their own best rates.
    """
    ranked, p_values = [], []
    for pair in comparisons:
        run = pair.lora.runs[0]
        is_plain = run.get("settings.lora.adapter") == "lora" and not run.get("settings.model.quant")
        if is_plain and pair.excess is not None and pair.contrast is not None:
            p = pair.contrast.p_value / 2
            ranked.append((int(run.get("settings.lora.rank")), pair))
            p_values.append(p if pair.contrast.estimate < 0 else 1 - p)
    if len({rank for rank, _ in ranked}) < 2:
        return []
    results = []
    for (rank, pair), p in zip(ranked, holm(p_values), strict=True):
        assert pair.excess is not None
        results.append(RankResult(rank, pair.excess, p, p < 1 - LEVEL and "good enough" not in pair.doubts))
    return sorted(results, key=lambda result: result.rank)


def describe_ranks(results: Sequence[RankResult]) -> list[str]:
    """`LoRA's excess by rank: ...; the smallest rank that is good enough is 4.`"""
    if not results:
        return []
    parts = [f"rank {r.rank} {r.excess} (p = {r.p_value:.2g})" for r in results]
    enough = [str(r.rank) for r in results if r.is_good_enough]
    answer = f"the smallest rank that is good enough is {enough[0]}" if enough else "no rank is shown to be good enough"
    return [
        f"LoRA's excess by rank, each at its own best rate: {', '.join(parts)}; {answer} (one-sided against "
        f"the margin, after Holm over {len(results)} ranks)."
    ]


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
