"""The answer of a study: its fresh runs compared on the test split by its rule, as launch/compare.py compares any.

What a study adds: which comparison is the primary one, that only test records may judge, that all runs must have been
computed alike, what the claim is conditional on, and what can be shown before the records and seeds are spent.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from trainer.config.errors import UserError
from trainer.config.text import capitalize
from trainer.report.comparable import SeedGroup, label_parts
from trainer.report.compare_cli import REFUSED_EXIT_CODE
from trainer.report.interval import LEVEL, MIN_UNITS, ONE_SIDED, VarianceComponents, paired_interval, predict_half_width
from trainer.report.judge import FullVsLora, RateCurve, StudyContext, compare_groups
from trainer.report.page import Comparison, compare
from trainer.report.run_data import LOSS, MatchedRecords, MatchError, RunData, match_records, read_folder, read_records
from trainer.tools.study.rule import RULE_FILE, Rule
from trainer.tools.study.search import Candidate, MethodSearch, Results, StudyState, TrialSpec
from trainer.tools.study.trials import Timing, run_folder

NUM_DRAWS = 4000
#: Assumed before a search: of LoRA's excess in nats per token, standard deviations of seed, record and rest...
ASSUMED_NATS = VarianceComponents(seed=0.005**2, unit=0.16**2, rest=0.05**2)
#: ... and in points of a score, where one record in eight is right with one method only.
ASSUMED_POINTS = VarianceComponents(seed=0.5**2, unit=1050.0, rest=500.0)
ASSUMED_GAIN = 1.0  # nats per token that full gains
ASSUMED_BYTES = 4.0  # of a token


class AnswerRefusedError(UserError):
    """The study will not rank what it has; one line says why."""

    exit_code = REFUSED_EXIT_CODE


def read_groups(study_folder: Path, specs: Sequence[TrialSpec]) -> dict[Candidate, SeedGroup]:
    """Each candidate's runs over the seeds, full's first, then those of the LoRA that is judged first."""
    runs: dict[Candidate, list[RunData]] = {}
    for spec in specs:
        folder = run_folder(study_folder, spec)
        try:
            runs.setdefault(spec.candidate, []).append(read_folder(folder))
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    groups = {}
    for candidate, members in runs.items():
        label, get = "full", members[0].get
        if candidate.method == "lora":
            label = f"LoRA ({', '.join(dict.fromkeys([*label_parts(members[0]), f'rank {candidate.lora_rank}']))})"
            if config := get("settings.lora.peft_config"):
                label = f"LoRA's place: {json.loads(config)['peft_type']}, --peft-config"
        groups[candidate] = SeedGroup(label, members[0].mode, tuple(members))
    return groups


def judge(groups: Mapping[Candidate, SeedGroup], rule: Rule) -> FullVsLora:
    """The primary comparison by the rule. AnswerRefusedError where it may not be drawn, as where runs were not computed
    alike (device, precision, ranks, execution or torch differ); UserError for few records."""
    ways: dict[str, RunData] = {}
    for run in (run for group in groups.values() for run in group.runs):
        paths = dict.fromkeys(plan["path"] for plan in run.get("execution"))
        device = run.get("hardware.gpu") or run.get("hardware.cpu")
        way = f"{run.get('resolved.precision')} on {run.get('resolved.ranks')} x {device}"
        ways.setdefault(f"{way}, execution {' then '.join(paths)}, torch {run.get('versions.torch')}", run)
    if len(ways) > 1:
        (way, run), (other_way, other_run) = list(ways.items())[:2]
        raise AnswerRefusedError(
            f"{run.name} ran in {way}, {other_run.name} in {other_way}: these cannot be compared; run the answer's "
            "trials on one kind of machine"
        )
    full, lora, *_ = groups.values()
    pair = compare_groups(full, lora, rule.margin)
    if pair.blockers:
        raise AnswerRefusedError(f"refused to rank: {'; '.join(pair.blockers)}")
    if pair.losses is None or pair.losses.split != "test":
        raise AnswerRefusedError(f"refused to rank: {pair.no_losses or 'not every run has losses of test records'}")
    if len(pair.losses.units) < MIN_UNITS:
        raise UserError(
            f"{len(pair.losses.units)} test records that can be told apart: expected {MIN_UNITS} or more; "
            "raise --test-fraction or give --test-data"
        )
    if pair.contrast is None:
        raise UserError(f"--margin {rule.margin.describe()}: {rule.margin.why_not(pair.losses)}")
    return pair


def compare_study(study_folder: Path, rule: Rule, state: StudyState, results: Results, timing: Timing) -> Comparison:
    groups, outcomes = read_groups(study_folder, state.answers), state.outcomes
    notes = [*(f"search of {outcome.describe()}" for outcome in outcomes.values()), timing.describe()]
    for outcome in outcomes.values():
        if not outcome.problem and outcome.winner not in groups:
            notes.append(f"{outcome.name}: left out, a fresh run diverged or failed")
    rule_line = (
        f"Written before the first trial (rule.json, {rule.sha256[:12]}): LoRA against full is the primary comparison, "
        f"margin {rule.margin.describe()}, level {100 * LEVEL:g} %, runs of {rule.total_steps:,} steps, rungs of "
        f"{', '.join(map(str, rule.rungs))}; the claim holds for these rates and this budget. What is equal: grids, "
        "rungs, seeds, and each run's steps, tokens and data order; not the number of trials, which a search decides."
    )
    searches = {
        method: {
            "lr": outcome.winner and outcome.winner.lr,
            "loss": outcome.loss if outcome.winner else None,  # JSON has no infinity
            "problem": outcome.problem or None,
            "num_trials": len(outcome.trials),
            "num_steps": outcome.num_steps,
        }
        for method, outcome in outcomes.items()
    }
    primary, curves = list(outcomes.values())[:2], []
    for search in primary:  # a curve a rung: means over seeds
        trials = pd.DataFrame([(s.num_steps, s.candidate.lr, results[s.name]) for s in search.trials])
        for num_steps in rule.rungs:
            means = trials[trials[0] == num_steps].groupby(1)[2].mean()
            losses = means[np.isfinite(means)].to_dict()
            curves.append(RateCurve(mode=search.method, losses=losses, num_steps=num_steps))
    num_full, num_lora = (len(outcome.trials) for outcome in primary)
    noise, by_length = choice_noise(primary, results), []
    for stage, num_steps in zip((*range(len(rule.rungs) - 1), -1), rule.rungs, strict=True):  # the last with all seeds
        if (known := read_search_losses(study_folder, primary, stage)) is not None:
            by_length.append((num_steps, paired_interval(known[0].lora - known[0].full, known[0].weights)))
    moved = "" if noise is None else f"; choosing again would move the loss by about {noise:.2g}"
    study = StudyContext(
        choice=f"rates chosen by validation loss ({num_full} trials of full, {num_lora} of LoRA{moved}), fresh seeds",
        lines=(*(f"{capitalize(note)}." for note in notes), rule_line),
        rate_curves=tuple(curves),
        step_time=timing.cost,
        memory=timing.memory,
        rule=json.loads((study_folder / RULE_FILE).read_bytes()),
        facts={"rule_sha256": rule.sha256, "searches": searches, "timing": timing.model_dump(), "notes": notes}
        | {"choice_noise": noise, "by_length": [{"steps": n, "excess": asdict(interval)} for n, interval in by_length]},
        by_length=by_length,
    )
    runs = [run for group in groups.values() for run in group.runs]
    return compare(runs, with_reference=False, margin=rule.margin, study=study, groups=list(groups.values()))


# --- what a study can show: by its number of seeds and test records, and by the noise of its choice of rates ---


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

    def is_enough(seeds: int, records: int) -> bool:
        return predict_half_width(beyond, seeds, records, quantile=ONE_SIDED) < size

    sizes = (digits * 10**power for power in range(5) for digits in range(10, 100))  # two digits are enough to plan by
    needed = next((n for n in sizes if is_enough(num_seeds, n)), None)
    more_seeds = next((n for n in range(num_seeds, 65) if is_enough(n, num_records)), None)
    if more_seeds == num_seeds:
        return f"{line}; a margin of {name} is within reach"
    options = [f"about {needed:,} records" if needed else "", f"{more_seeds} seeds" if more_seeds else ""]
    return f"{line}; a margin of {name} needs {' or '.join(filter(None, options)) or 'more records and more seeds'}"


def read_search_losses(
    study_folder: Path, searches: Sequence[MethodSearch], stage: int = -1
) -> tuple[MatchedRecords, int] | None:
    """(Losses of each mode's best setting at a stage, with all its seeds; number of test records); None: unknown."""
    try:
        runs = []
        for search in searches:
            candidates = sorted({spec.candidate for spec in search.trials})
            best = min(candidates, key=partial(search.mean_loss, stage=stage))
            runs.append([read_folder(run_folder(study_folder, spec)) for spec in search.specs_at(best, stage)])
        full, pairs = runs[0], list(zip(*runs, strict=True))
        return match_records(pairs, read_records(pairs), "val"), int(full[0].get("data.test.units"))
    except (UserError, MatchError, LookupError, TypeError, ValueError):  # it costs a line of text, not the study
        return None


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
