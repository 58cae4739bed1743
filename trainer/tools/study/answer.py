"""The answer of a study: from the test losses of the answer's runs, by the rule, to one of four verdicts.

Excess = other - full on the test split, in nats per token: positive is worse. "Good enough" is a claim of equivalence:
the one-sided upper bound of the margin's contrast lies below 0 (`trainer.report.paired_interval`).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.config.errors import UserError
from trainer.report.margin import Margin
from trainer.report.paired_interval import (
    PairedInterval,
    paired_interval,
    sum_by_unit,
    what_would_tell,
)
from trainer.tools.study.rule import MIN_ANSWER_SEEDS, PRIMARY, Rule
from trainer.tools.study.search import SearchOutcome, TrialSpec
from trainer.tools.study.worker import run_folder
from trainer.tracking.eval_records import EVAL_RECORDS_FILE, read_eval_records

ANSWER_FILE = "answer.json"
MIN_UNITS = 20  # below it the interval's approximation has not been checked
Verdict = Literal["better", "good enough", "worse", "cannot tell yet"]


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
    verdict: Verdict
    if excess.high < 0:
        verdict, sentence = "better", f"{subject} is better than full: {interval}"
    elif gap.upper < 0:
        worse = f", worse by {excess.estimate:.4f}" if excess.low > 0 else ""
        verdict, sentence = (
            "good enough",
            f"{subject} is good enough{worse}: {interval}, margin {rule.margin.describe()}",
        )
    elif gap.low > 0:
        verdict, sentence = "worse", f"{subject} is worse than full: {interval}, margin {rule.margin.describe()}"
    else:
        verdict = "cannot tell yet"
        sentence = f"cannot tell yet whether {subject} is good enough: {interval}, margin {rule.margin.describe()}; "
        sentence += _what_is_missing(gap, level)
    return Answer(
        method=method, verdict=verdict, sentence=sentence, excess=excess, margin_gap=gap,
        is_primary=method == PRIMARY[1],
    )  # fmt: skip


def _margin_gap(losses: UnitLosses, full: UnitLosses, margin: Margin) -> NDArray[np.float64]:
    """Excess minus margin, nats [seeds, units]."""
    if reason := margin.why_not(has_base=True, has_bytes=bool(full.num_bytes.all())):
        raise UserError(f"--margin {margin.describe()}: {reason}")
    return margin.contrast(losses.nll, full.nll, base=full.base_nll, targets=full.targets, num_bytes=full.num_bytes)


def _what_is_missing(gap: PairedInterval, level: float) -> str:
    """What would tell, before more is run."""
    missing = what_would_tell(gap, gap.estimate, level=level, is_one_sided=gap.estimate < 0)
    if missing.num_seeds is not None:
        return f"{missing.num_seeds} seeds would tell"
    floor = f"these test records allow no less than ±{missing.floor:.4f}, whatever the number of seeds"
    if missing.num_units is not None:
        return f"{floor}: {missing.num_units} of them would tell"
    return f"{floor}, and the difference is too close to the margin for 200 times as many"


def write_answer(
    study_folder: Path, rule: Rule, answers: Sequence[TrialSpec], outcomes: Mapping[str, SearchOutcome]
) -> list[Answer]:
    """Judge every method beside full, primary first, and write answer.json; others than the primary are exploratory."""
    folders: dict[str, list[Path]] = {}
    for spec in sorted(answers, key=lambda spec: spec.seed):
        folders.setdefault(spec.candidate.method, []).append(run_folder(study_folder, spec))
    losses = {method: read_test_losses(method_folders) for method, method_folders in folders.items()}
    methods = sorted((method for method in losses if method != "full"), key=lambda method: method != PRIMARY[1])
    judged = [judge(m, losses[m], losses["full"], rule, level=rule.level_per_look) for m in methods]
    content = {
        "rule_sha256": rule.sha256,
        "sentence": conditional_sentence(judged[0], rule, outcomes),
        "answers": [asdict(answer) | {"exploratory": not answer.is_primary} for answer in judged],
        "seeds": list(rule.answer_seeds),
        "units": len(losses["full"].targets),
        "left_out_equal_to_train": losses["full"].num_left_out,
        "searches": {method: _search_facts(outcome) for method, outcome in outcomes.items()},
        "runs": {method: [str(folder) for folder in method_folders] for method, method_folders in folders.items()},
        "left_out": list(rule.left_out),
    }
    temporary_path = study_folder / f".{ANSWER_FILE}.{os.getpid()}"
    temporary_path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(temporary_path, study_folder / ANSWER_FILE)
    return judged


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
    return (
        f"{answer.sentence} (chosen on validation: {'; '.join(parts)}; tested with {len(rule.answer_seeds)} fresh "
        f"seeds of {rule.total_steps} steps)"
    )
