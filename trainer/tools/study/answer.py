"""The answer of a study: from the test losses of the answer's runs, by the rule, to one of four verdicts.

Excess = other - full on the test split, in nats per token: positive is worse. "Good enough" is a claim of equivalence:
the one-sided upper bound of the margin's contrast lies below 0 (`trainer.report.paired_interval`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.run_metadata import read_run_metadata
from trainer.report.margin import Margin
from trainer.report.paired_interval import (
    PairedInterval,
    WhatWouldTell,
    paired_interval,
    sum_by_unit,
    what_would_tell,
)
from trainer.tools.study.rule import MIN_ANSWER_SEEDS, MIN_UNITS, PRIMARY, Rule
from trainer.tools.study.search import SearchOutcome, StudyState, TrialSpec
from trainer.tools.study.worker import run_folder
from trainer.tracking.eval_records import EVAL_RECORDS_FILE, read_eval_records

ANSWER_FILE = "answer.json"
REFUSED_EXIT_CODE = 3
Verdict = Literal["better", "good enough", "worse", "cannot tell yet"]


class AnswerRefusedError(UserError):
    """The study will not rank what it has; one line says why."""

    exit_code = REFUSED_EXIT_CODE


@dataclass(frozen=True, kw_only=True)
class UnitLosses:
    """Losses of one method on the units of the test split, pairs of a seed in one row.

    nll, base_nll: float64 [seeds, units], nats, after and before training; targets, num_bytes: float64 [units].
    """

    nll: NDArray[np.float64]
    base_nll: NDArray[np.float64]
    targets: NDArray[np.float64]
    num_bytes: NDArray[np.float64]
    num_left_out: int  #: records that equal a training record


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said of one method beside full."""

    method: str
    verdict: Verdict
    sentence: str
    excess: PairedInterval  #: nats per token
    margin_gap: PairedInterval  #: excess minus the margin, nats per token: below 0 is inside
    is_primary: bool
    num_left_out: int  #: test records that equal a training record
    is_margin_under_floor: bool  #: whether these test records tell nothing as small as the margin, with any seeds


def read_test_losses(folders: Sequence[Path]) -> UnitLosses:
    """The test losses of runs with one seed each; UserError where a run has none, or theirs are of other records."""
    rows = [_read_run(folder) for folder in folders]
    keys = rows[0].keys
    if any(row.keys != keys for row in rows):
        raise UserError(f"{folders[0].parent}: the runs of the answer were not tested on the same records")
    is_kept = ~np.asarray(rows[0].in_train)
    units = [unit for unit, keep in zip(rows[0].units, is_kept, strict=True) if keep]
    if len(set(units)) < MIN_UNITS:
        raise UserError(
            f"{len(set(units))} test records that can be told apart: expected {MIN_UNITS} or more; raise "
            "--test-fraction or give --test-data"
        )
    nll, base_nll = (np.asarray([getattr(row, name) for row in rows])[:, is_kept] for name in ("nll", "base_nll"))
    counts = np.asarray([rows[0].targets, rows[0].num_bytes], dtype=np.float64)[:, is_kept]
    targets, num_bytes = sum_by_unit(counts, units)
    return UnitLosses(
        nll=sum_by_unit(nll, units), base_nll=sum_by_unit(base_nll, units), targets=targets, num_bytes=num_bytes,
        num_left_out=int((~is_kept).sum()),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _RunRows:
    keys: list[tuple[str, int]]
    units: list[str]
    in_train: list[bool]
    nll: list[float]
    base_nll: list[float]
    targets: list[int]
    num_bytes: list[int]


def _read_run(folder: Path) -> _RunRows:
    table = read_eval_records(folder / EVAL_RECORDS_FILE)
    evaluations: dict[int, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in table.to_pylist():
        if row["split"] == "test":
            evaluations.setdefault(row["step"], {})[row["id"], row["occurrence"]] = row
    if len(evaluations) < 2 or 0 not in evaluations:
        raise UserError(f"{folder / EVAL_RECORDS_FILE}: no test losses before and after training; run it again")
    base, last = evaluations[0], evaluations[max(evaluations)]
    keys = sorted(last)
    rows = [last[key] for key in keys]
    return _RunRows(
        keys=keys, units=[row["group"] or f"{row['id']}#{row['occurrence']}" for row in rows],
        in_train=[row["in_train"] for row in rows], nll=[row["nll"] for row in rows],
        base_nll=[base[key]["nll"] for key in keys], targets=[row["targets"] for row in rows],
        num_bytes=[row["bytes"] for row in rows],
    )  # fmt: skip


def judge(method: str, losses: UnitLosses, full: UnitLosses, rule: Rule, *, level: float) -> Answer:
    """The verdict on a method beside full, at this level."""
    differences = losses.nll - full.nll
    excess = paired_interval(differences, full.targets, level)
    gap = paired_interval(_margin_gap(losses, full, rule.margin), full.targets, level)
    num_seeds = len(full.nll)
    subject = method if num_seeds >= MIN_ANSWER_SEEDS else f"this {method} model"
    interval = f"{excess.estimate:+.4f} nats per token [{excess.low:+.4f}, {excess.high:+.4f}]"
    margin = f"margin {rule.margin.describe()}"
    missing = what_would_tell(gap, gap.estimate, level=level, is_one_sided=gap.estimate < 0)
    verdict: Verdict
    is_margin_under_floor = False
    if excess.high < 0:
        verdict, sentence = "better", f"{subject} is better than full: {interval}"
    elif gap.upper < 0:
        worse = f", worse by {excess.estimate:.4f}" if excess.low > 0 else ""
        verdict, sentence = "good enough", f"{subject} is good enough{worse}: {interval}, {margin}"
    elif gap.low > 0:
        verdict, sentence = "worse", f"{subject} is worse than full: {interval}, {margin}"
    else:
        verdict = "cannot tell yet"
        is_margin_under_floor = missing.floor >= excess.estimate - gap.estimate
        sentence = f"cannot tell yet whether {subject} is good enough: {interval}, {margin}; {_describe(missing)}"
    return Answer(
        method=method, verdict=verdict, sentence=sentence, excess=excess, margin_gap=gap,
        is_primary=method == PRIMARY[1], num_left_out=full.num_left_out, is_margin_under_floor=is_margin_under_floor,
    )  # fmt: skip


def _margin_gap(losses: UnitLosses, full: UnitLosses, margin: Margin) -> NDArray[np.float64]:
    """Excess minus margin, nats [seeds, units]."""
    if reason := margin.why_not(has_base=True, has_bytes=bool(full.num_bytes.all())):
        raise UserError(f"--margin {margin.describe()}: {reason}")
    return margin.contrast(losses.nll, full.nll, base=full.base_nll, targets=full.targets, num_bytes=full.num_bytes)


def _describe(missing: WhatWouldTell) -> str:
    """What would tell, before more is run."""
    if missing.num_seeds is not None:
        return f"{missing.num_seeds} seeds would tell"
    floor = f"these test records allow no less than ±{missing.floor:.4f}, whatever the number of seeds"
    if missing.num_units is not None:
        return f"{floor}: {missing.num_units} of them would tell"
    return f"{floor}, and the difference is too close to the margin for 200 times as many"


def is_decided(study_folder: Path, rule: Rule, answers: Sequence[TrialSpec]) -> bool:
    """Whether the runs of a look give the primary comparison a verdict."""
    folders = _folders_by_method(study_folder, answers)
    full, lora = (read_test_losses(folders[method]) for method in PRIMARY)
    return judge(PRIMARY[1], lora, full, rule, level=rule.level_per_look).verdict != "cannot tell yet"


def _folders_by_method(study_folder: Path, answers: Sequence[TrialSpec]) -> dict[str, list[Path]]:
    folders: dict[str, list[Path]] = {}
    for spec in sorted(answers, key=lambda spec: spec.seed):
        folders.setdefault(spec.candidate.method, []).append(run_folder(study_folder, spec))
    return folders


def judge_study(study_folder: Path, rule: Rule, state: StudyState) -> list[Answer]:
    """Every method beside full, primary first. AnswerRefusedError where the runs did not compute alike."""
    folders = _folders_by_method(study_folder, state.answers)
    check_one_execution(folders)
    losses = {method: read_test_losses(method_folders) for method, method_folders in folders.items()}
    methods = sorted((method for method in losses if method != "full"), key=lambda method: method != PRIMARY[1])
    return [judge(m, losses[m], losses["full"], rule, level=rule.level_per_look) for m in methods]


def write_answer(
    study_folder: Path, rule: Rule, state: StudyState, judged: Sequence[Answer], extras: Mapping[str, Any]
) -> None:
    """Write answer.json; `extras` is what else it is to hold, ready for JSON."""
    folders = _folders_by_method(study_folder, state.answers)
    seeds = sorted({spec.seed for spec in state.answers})
    content = {
        "rule_sha256": rule.sha256,
        "sentence": conditional_sentence(judged[0], rule, state.outcomes),
        "answers": [asdict(answer) | {"exploratory": not answer.is_primary} for answer in judged],
        "seeds": seeds,
        "looks": {"taken": rule.look_of(len(seeds)), "planned": rule.looks, "level_of_each": rule.level_per_look},
        "units": judged[0].excess.num_units,
        "left_out_equal_to_train": judged[0].num_left_out,
        "searches": {method: _search_facts(outcome) for method, outcome in state.outcomes.items()},
        "runs": {method: [str(folder) for folder in method_folders] for method, method_folders in folders.items()},
        "left_out": list(rule.left_out),
        **extras,
    }
    write_atomically(study_folder / ANSWER_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def describe_quarter_batch(study_folder: Path, rule: Rule, state: StudyState, whole: Answer) -> str:
    """What a quarter of the batch changes in LoRA's excess, or why that is not known; no claim, it was not chosen."""
    folders = _folders_by_method(study_folder, state.quarter)
    where = f"at a quarter of the batch ({rule.quarter_batch}), 4 times the steps and half the rates"
    try:
        full, lora = (read_test_losses(folders[method]) for method in PRIMARY)
    except (UserError, OSError) as error:
        return f"{where}: not known ({error})"
    excess = judge(PRIMARY[1], lora, full, rule, level=rule.level).excess
    return (
        f"{where}, lora's excess is {excess.estimate:+.4f} nats per token [{excess.low:+.4f}, {excess.high:+.4f}], at "
        f"the whole {whole.excess.estimate:+.4f}"
    )


def check_one_execution(folders: Mapping[str, Sequence[Path]]) -> None:
    """UserError where runs that are compared did not compute alike: other device, precision, ranks or kind of steps."""
    ways: dict[str, Path] = {}
    for folder in (folder for method_folders in folders.values() for folder in method_folders):
        metadata = read_run_metadata(folder / "run.json")
        resolved, hardware, plan = metadata["resolved"], metadata["hardware"], metadata["execution"][-1]
        device = hardware["gpu"] or hardware["cpu"]
        way = f"{resolved['precision']} on {resolved['ranks']} x {device}, {plan.get('path')} steps"
        ways.setdefault(way + (" from CUDA graphs" if plan.get("cuda_graphs") else ""), folder)
    if len(ways) > 1:
        (way, folder), (other_way, other_folder) = list(ways.items())[:2]
        raise AnswerRefusedError(
            f"{folder.name} ran in {way}, {other_folder.name} in {other_way}: not to be compared; let one kind of "
            "machine run the answer's trials"
        )


def _search_facts(outcome: SearchOutcome) -> dict[str, Any]:
    """An outcome as JSON has it: no loss where every trial failed."""
    winner = outcome.winner
    facts = {"lr": winner.lr, "loss": outcome.loss} if winner is not None else {"lr": None, "loss": None}
    return asdict(outcome) | facts | {"problem": outcome.problem}


def conditional_sentence(answer: Answer, rule: Rule, outcomes: Mapping[str, SearchOutcome]) -> str:
    """The sentence with what it is conditional on: the rates, the search's budget, seeds and steps."""
    parts = []
    for method in ("full", answer.method):
        outcome = outcomes[method]
        assert outcome.winner is not None, "judged methods have one"
        rank = f", rank {outcome.winner.lora_rank}" if outcome.winner.lora_rank else ""
        parts.append(f"{method} at {outcome.winner.lr:g}{rank} of {outcome.num_trials} trials")
    looks = ""
    if rule.looks > 1:
        looks = (
            f", look {rule.look_of(answer.excess.num_seeds)} of {rule.looks}, each at {100 * rule.level_per_look:.3g} %"
        )
    return (
        f"{answer.sentence} (chosen on validation: {'; '.join(parts)}; tested with {answer.excess.num_seeds} fresh "
        f"seeds of {rule.total_steps} steps{looks})"
    )
