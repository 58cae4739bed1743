"""What a study can show: by its number of seeds and test records, and by the noise of its choice of rates."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.config.errors import UserError
from trainer.report.interval import ONE_SIDED, PairedInterval, VarianceComponents, paired_interval, predict_half_width
from trainer.report.run_data import LOSS, MatchedRecords, MatchError, match_records, read_folder, read_records
from trainer.tools.study.rule import Rule
from trainer.tools.study.search import MethodSearch, Results
from trainer.tools.study.trials import run_folder

NUM_DRAWS = 4000
#: Assumed before a search: of LoRA's excess in nats per token, standard deviations of seed, record and rest...
ASSUMED_NATS = VarianceComponents(seed=0.005**2, unit=0.16**2, rest=0.05**2)
#: ... and in points of a score, where one record in eight is right with one method only.
ASSUMED_POINTS = VarianceComponents(seed=0.5**2, unit=1050.0, rest=500.0)
ASSUMED_GAIN = 1.0  # nats per token that full gains
ASSUMED_BYTES = 4.0  # of a token


def describe_power(rule: Rule, num_records: int, losses: MatchedRecords | None = None) -> str:
    """`3 seeds and 136 test records can show about 0.03 nats per token ...`: what the answer's intervals will resolve.

    From the losses of the search's runs where there are any, otherwise from the assumptions above, which it names; of
    scores there are none in a search. Half of a two-sided interval is what can be shown; the margin needs a one-sided
    bound below it for methods that are equal. `num_records`: test records, or groups of them.
    """
    nats, margin, source = ASSUMED_NATS, rule.margin, "by the search's validation records"
    factor = {"share": ASSUMED_GAIN, "bits_per_byte": math.log(2) * ASSUMED_BYTES}.get(margin.kind, 1.0)
    beyond, size = nats, margin.value * factor
    if losses is None:
        deviations = [f"{math.sqrt(variance):g}" for variance in (nats.unit, nats.seed)]
        source = f"assumed: differences vary by {deviations[0]} nats with the record, by {deviations[1]} with the seed"
        source += f"; full gains {ASSUMED_GAIN:g} nat" if margin.kind == "share" else ""
        source += f"; a token has {ASSUMED_BYTES:g} bytes" if margin.kind == "bits_per_byte" else ""
    else:
        differences = losses.lora - losses.full
        nats = paired_interval(differences, losses.weights).components
        if margin.measure == LOSS and not margin.why_not(losses):
            contrast = margin.contrast(losses)
            beyond = paired_interval(contrast, losses.weights).components
            size = losses.mean(differences - contrast)
    name = f"{size:.2g} nats"
    if margin.measure != LOSS:
        beyond, name = ASSUMED_POINTS, f"{size:g} points"
    num_seeds = len(rule.answer_seeds)
    shown, points = (predict_half_width(c, num_seeds, num_records) for c in (nats, ASSUMED_POINTS))
    seeds, points = f"{num_seeds} seed{'s' * (num_seeds > 1)}", float(f"{points:.1g}")
    line = (
        f"{seeds} and {num_records:,} test records can show about {shown:.2g} nats per token ({source}), or {points:g} "
    )
    line += f"point{'s' * (points != 1)} of a score (assumed: 1 record of 8 is right with one method only)"
    return f"{line}; {_describe_needed(beyond, num_seeds, num_records, size, name)}"


def _describe_needed(components: VarianceComponents, num_seeds: int, num_records: int, size: float, name: str) -> str:

    def is_enough(seeds: int, records: int) -> bool:
        return predict_half_width(components, seeds, records, quantile=ONE_SIDED) < size

    sizes = (digits * 10**power for power in range(5) for digits in range(10, 100))  # two digits are enough to plan by
    needed = next((n for n in sizes if is_enough(num_seeds, n)), None)
    more_seeds = next((n for n in range(num_seeds, 65) if is_enough(n, num_records)), None)
    if more_seeds == num_seeds:
        return f"a margin of {name} is within reach"
    options = [f"about {needed:,} records" if needed else "", f"{more_seeds} seeds" if more_seeds else ""]
    return f"a margin of {name} needs {' or '.join(filter(None, options)) or 'more records and more seeds'}"


def read_search_losses(
    study_folder: Path, searches: Sequence[MethodSearch], stage: int = -1
) -> tuple[MatchedRecords, int] | None:
    """(Validation losses of full's and LoRA's best settings at a stage, with all its seeds; number of test records).

    None where they are not known.
    """
    try:
        full, lora = (
            [read_folder(run_folder(study_folder, spec)) for spec in search.specs_at(search.best_at(stage), stage)]
            for search in searches
        )
        pairs = list(zip(full, lora, strict=True))
        return match_records(pairs, read_records(pairs), "val"), int(full[0].get("data.test.units"))
    except (UserError, MatchError, LookupError, TypeError, ValueError):  # it costs a line of text, not the study
        return None


def excess_by_length(study_folder: Path, searches: Sequence[MethodSearch]) -> list[tuple[int, PairedInterval]]:
    """LoRA's excess over full on validation records, each at its best rate, by the steps of a rung's runs."""
    points = []
    for rung, num_steps in enumerate(searches[0].rule.rungs):
        is_last = num_steps == searches[0].rule.total_steps
        known = read_search_losses(study_folder, searches, -1 if is_last else rung)
        if known is not None:
            points.append((num_steps, paired_interval(known[0].lora - known[0].full, known[0].weights)))
    return points


def choice_noise(searches: Sequence[MethodSearch], results: Results) -> float | None:
    """By how much choosing rates again would move the difference between these methods (nats per token, RMS).

    The noise of a run is what is left of the last stage's losses (rates x seeds) without the means of rates and seeds,
    over all methods. Means drawn with it say by how much the chosen rate is behind the best one. None where it is not
    known. It stands beside the interval, which covers the difference at the best rates as it is (launch/README.md).
    """
    stages, squares, freedom = [], 0.0, 0
    for search in searches:
        names = [[spec.name for spec in search.specs_at(candidate, -1)] for candidate in search.chosen_among]
        losses = np.array([[results[name] for name in row] for row in names])
        losses = losses[np.isfinite(losses).all(axis=1)]
        rests = losses - losses.mean(axis=1, keepdims=True) - losses.mean(axis=0) + losses.mean()
        squares, freedom = squares + float((rests**2).sum()), freedom + (len(losses) - 1) * (losses.shape[1] - 1)
        stages.append(losses)
    if not freedom:
        return None
    rng, moved = np.random.default_rng(0), 0.0
    for losses in stages:
        error = math.sqrt(squares / freedom / losses.shape[1])
        means = losses.mean(axis=1) + error * rng.standard_normal((NUM_DRAWS, len(losses)))
        moved += float(((means[:, 0] - means.min(axis=1)) ** 2).mean())
    return math.sqrt(moved)
