"""The answer of a study: its fresh runs compared on the test split by its rule, as launch/compare.py compares any.

What a study adds: which comparison is the primary one, that nothing but test records may judge, that all runs must have
computed alike, and what the claim is conditional on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.json_file import parse_json
from trainer.report.compare_cli import REFUSED_EXIT_CODE
from trainer.report.comparison import Comparison, compare_run_groups
from trainer.report.formats import format_interval
from trainer.report.full_vs_lora import FullVsLora, compare_groups
from trainer.report.options import ComparisonOptions, StudyContext
from trainer.report.run_data import RunData, RunReadError
from trainer.report.run_folder import read_folder
from trainer.report.seed_groups import SeedGroup
from trainer.tools.study.curves import rate_curves, study_views
from trainer.tools.study.finalist_timing import Timing
from trainer.tools.study.rule import MIN_UNITS, PRIMARY, RULE_FILE, Rule
from trainer.tools.study.search import Results, SearchOutcome, StudyState, TrialSpec
from trainer.tools.study.worker import run_folder


class AnswerRefusedError(UserError):
    """The study will not rank what it has; one line says why."""

    exit_code = REFUSED_EXIT_CODE


def read_groups(study_folder: Path, specs: Sequence[TrialSpec]) -> dict[str, SeedGroup]:
    """Each method's runs over the seeds, full's first, then lora's."""
    runs: dict[str, list[RunData]] = {method: [] for method in PRIMARY}
    labels: dict[str, str] = {}
    for spec in sorted(specs, key=lambda spec: spec.seed):
        method, folder = spec.candidate.method, run_folder(study_folder, spec)
        kind = "" if method == "lora" else f"{method}, "
        labels[method] = "full" if method == "full" else f"LoRA ({kind}rank {spec.candidate.lora_rank})"
        try:
            runs.setdefault(method, []).append(read_folder(folder))
        except RunReadError as error:
            raise UserError(f"{folder}: {error}") from error
    return {method: SeedGroup(labels[method], members[0].mode, tuple(members)) for method, members in runs.items()}


def judge(groups: Mapping[str, SeedGroup], rule: Rule) -> FullVsLora:
    """The primary comparison by the rule; AnswerRefusedError where it may not be drawn, UserError for few records."""
    full, lora = (groups[method] for method in PRIMARY)
    pair = compare_groups(full, lora, ComparisonOptions(margin=rule.margin, level=rule.level_per_look))
    if pair.blockers:
        raise AnswerRefusedError(f"refused to rank: {'; '.join(pair.blockers)}")
    if pair.losses is None or pair.losses.split != "test":
        raise AnswerRefusedError(f"refused to rank: {pair.no_losses or 'not every run has losses of test records'}")
    if len(pair.losses.targets) < MIN_UNITS:
        raise UserError(
            f"{len(pair.losses.targets)} test records that can be told apart: expected {MIN_UNITS} or more; raise "
            "--test-fraction or give --test-data"
        )
    if pair.contrast is None:
        reason = rule.margin.why_not(pair.losses)
        raise UserError(f"--margin {rule.margin.describe()}: {reason}")
    return pair


def compare_study(study_folder: Path, rule: Rule, state: StudyState, results: Results, timing: Timing) -> Comparison:
    """The answer with all that stands beside it. AnswerRefusedError, UserError as of `judge`.

    Parameters: the study, where it stands, and the two things that were measured or said after it.
    """
    groups = read_groups(study_folder, state.answers)
    check_one_execution(list(groups.values()))
    pair = judge(groups, rule)
    lines = [*(f"search of {outcome.describe()}" for outcome in state.outcomes.values()), timing.describe()]
    lines += [f"left out: {line}" for line in rule.left_out]
    lines += [
        f"{m}: left out, a fresh run failed" for m, o in state.outcomes.items() if not o.problem and m not in groups
    ]
    if state.quarter:
        lines.append(describe_quarter_batch(study_folder, rule, state, pair))
    seeds = sorted({spec.seed for spec in state.answers})
    study = StudyContext(
        choice=describe_choice(rule, state, len(seeds)),
        lines=(*(f"{line[:1].upper()}{line[1:]}." for line in lines), describe_rule(rule)),
        rate_curves=rate_curves(study_folder, rule, results),
        views=study_views(study_folder, rule, results, timing),
        rule=parse_json((study_folder / RULE_FILE).read_bytes()),
        facts={
            "rule_sha256": rule.sha256,
            "looks": {"taken": rule.look_of(len(seeds)), "planned": rule.looks, "level_of_each": rule.level_per_look},
            "searches": {method: _search_facts(outcome) for method, outcome in state.outcomes.items()},
            "left_out": list(rule.left_out),
            "timing": asdict(timing),
            "beside": lines,
        },
    )
    options = ComparisonOptions(
        margin=rule.margin,
        level=rule.level_per_look,
        step_time=timing.cost,
        study=study,
    )
    return compare_run_groups(list(groups.values()), with_reference=False, options=options)


def describe_choice(rule: Rule, state: StudyState, num_seeds: int) -> str:
    """What the claim is conditional on: the search's budget, fresh seeds, looks."""
    budgets = {method: state.outcomes[method].num_trials for method in PRIMARY}
    text = f"rates chosen on validation ({budgets['full']} trials of full, {budgets['lora']} of LoRA), fresh seeds"
    if rule.looks > 1:
        text += f", look {rule.look_of(num_seeds)} of {rule.looks}, each at {100 * rule.level_per_look:.3g} %"
    return text


def describe_rule(rule: Rule) -> str:
    """The rule in one line, with its hash."""
    return (
        f"Written before the first trial (rule.json, {rule.sha256[:12]}): LoRA against full is the primary comparison, "
        f"margin {rule.margin.describe()}, level {100 * rule.level:g} % over {rule.looks} look"
        f"{'s' if rule.looks > 1 else ''}, runs of {rule.total_steps:,} steps, rungs of "
        f"{', '.join(map(str, rule.rungs))}; the claim holds for these rates and this budget."
    )


def describe_quarter_batch(study_folder: Path, rule: Rule, state: StudyState, whole: FullVsLora) -> str:
    """What a quarter of the batch changes in LoRA's excess, or why that is not known; no claim, it was not chosen."""
    where = f"at a quarter of the batch ({rule.quarter_batch}), 4 times the steps and half the rates"
    try:
        excess = judge(read_groups(study_folder, state.quarter), rule).excess
    except UserError as error:
        return f"{where}: not known ({error})"
    assert excess is not None, "judged"
    assert whole.excess is not None, "judged"
    return (
        f"{where}, LoRA's excess is {format_interval(excess)} nats per token, at the whole {whole.excess.estimate:+.4f}"
    )


def check_one_execution(groups: Sequence[SeedGroup]) -> None:
    """AnswerRefusedError where runs did not compute alike: other device, precision, ranks, kind of steps or torch."""
    ways: dict[str, RunData] = {}
    for run in (run for group in groups for run in group.runs):
        plans = run.get("execution") or [{}]
        kinds = [f"{plan.get('path')} steps" + " from CUDA graphs" * bool(plan.get("cuda_graphs")) for plan in plans]
        device = run.get("hardware.gpu") or run.get("hardware.cpu")
        way = f"{run.get('resolved.precision')} on {run.get('resolved.ranks')} x {device}"
        way += f", {', then '.join(dict.fromkeys(kinds))}"
        ways.setdefault(f"{way} of torch {run.get('versions.torch')}", run)
    if len(ways) > 1:
        (way, run), (other_way, other_run) = list(ways.items())[:2]
        raise AnswerRefusedError(
            f"{run.name} ran in {way}, {other_run.name} in {other_way}: not to be compared; let one kind of machine "
            "run the answer's trials"
        )


def _search_facts(outcome: SearchOutcome) -> dict[str, Any]:
    """An outcome as JSON has it: no loss where every trial failed."""
    winner = outcome.winner
    facts = {"lr": winner.lr, "loss": outcome.loss} if winner is not None else {"lr": None, "loss": None}
    return asdict(outcome) | facts | {"problem": outcome.problem}
