"""The answer of a study: its fresh runs compared on the test split by its rule, as launch/compare.py compares any.

What a study adds: which comparison is the primary one, that only test records may judge, that all runs must have been
computed alike, and what the claim is conditional on. Beside it stand the searches, as loss against rate: those
settings were chosen by what the curves show, so nothing there is a claim with the answer's level.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from trainer.config.errors import UserError
from trainer.config.text import capitalize
from trainer.report.comparable import SeedGroup
from trainer.report.compare_cli import REFUSED_EXIT_CODE
from trainer.report.interval import LEVEL, MIN_UNITS
from trainer.report.judge import FullVsLora, RateCurve, StudyContext, compare_groups
from trainer.report.page import Comparison, compare
from trainer.report.run_data import RunData, read_folder
from trainer.tools.study.power import choice_noise, excess_by_length
from trainer.tools.study.rule import RULE_FILE, Rule
from trainer.tools.study.search import Candidate, Results, StudyState, TrialSpec
from trainer.tools.study.timing import Timing
from trainer.tools.study.trials import run_folder


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
            kind = "" if get("settings.lora.adapter") in ("lora", None) else f"{get('settings.lora.adapter')}, "
            label = f"LoRA ({kind}rank {candidate.lora_rank})"
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
    primary = list(outcomes.values())[:2]
    num_full, num_lora = (len(outcome.trials) for outcome in primary)
    noise, by_length = choice_noise(primary, results), excess_by_length(study_folder, primary)
    moved = "" if noise is None else f"; choosing again would move the loss by about {noise:.2g}"
    study = StudyContext(
        choice=f"rates chosen by validation loss ({num_full} trials of full, {num_lora} of LoRA{moved}), fresh seeds",
        lines=(*(f"{capitalize(note)}." for note in notes), rule_line),
        rate_curves=rate_curves(state, results),
        step_time=timing.cost,
        memory=timing.memory,
        rule=json.loads((study_folder / RULE_FILE).read_bytes()),
        facts={"rule_sha256": rule.sha256, "searches": searches, "timing": timing.model_dump(), "notes": notes}
        | {"choice_noise": noise, "by_length": [{"steps": n, "excess": asdict(interval)} for n, interval in by_length]},
        by_length=by_length,
    )
    runs = [run for group in groups.values() for run in group.runs]
    return compare(runs, with_reference=False, margin=rule.margin, study=study, groups=list(groups.values()))


def rate_curves(state: StudyState, results: Results) -> tuple[RateCurve, ...]:
    """Validation losses by rate of full and of the LoRA that is judged first, a curve a rung: means over seeds."""
    curves = []
    for search in list(state.outcomes.values())[:2]:
        trials = pd.DataFrame([(s.num_steps, s.candidate.lr, results[s.name]) for s in search.trials])
        for num_steps in search.rule.rungs:
            means = trials[trials[0] == num_steps].groupby(1)[2].mean()
            losses = means[np.isfinite(means)].to_dict()
            mode = "full" if search.method == "full" else "lora"
            curves.append(RateCurve(mode=mode, losses=losses, num_steps=num_steps))
    return tuple(curves)
