"""Conditions on runs, for use in CI: `val_loss<=1.0048@epoch 2`, and the built-in `card`."""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.report.comparability import why_not_card
from trainer.report.run_data import Run, Series

PASSED, FAILED, NOT_COMPARABLE = "passed", "failed", "not comparable"
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}
#: metrics that have a value at a place: which records hold it, and in which column
PLACED = {
    "val_loss": ("evals", "loss"),
    "perplexity": ("evals", "perplexity"),
    "train_loss": ("epochs", "train_loss"),
    "lr": ("steps", "lr"),
    "grad_norm": ("steps", "grad_norm"),
    "tokens_per_second": ("steps", "tokens_per_second"),
}
#: metrics of a whole run
WHOLE: dict[str, Callable[[Run], Any]] = {
    "best_val_loss": lambda run: run.best and run.best["loss"],
    "improvement": lambda run: run.base_loss - run.best["loss"] if run.best and run.base_loss is not None else None,
    "wall_seconds": lambda run: run.end.get("wall_seconds"),
    "peak_memory_bytes": lambda run: run.end.get("peak_memory_bytes"),
    "trainable_parameters": lambda run: run.fact("model.trainable"),
}
_FORM = re.compile(
    r"\s*(?P<metric>[a-z_]+)\s*(?P<op><=|>=|==|<|>)\s*(?P<limit>[^@\s]+)\s*"
    r"(?:@\s*(?P<axis>epoch|step)\s+(?P<place>\S+)\s*)?"
)


@dataclass(frozen=True)
class Condition:
    """One condition; `axis` None means the last value of a run that came to its end."""

    text: str
    metric: str
    op: str
    limit: float
    axis: str | None
    place: float


@dataclass(frozen=True)
class Result:
    """What a check found for one run."""

    check: str
    run: str
    outcome: str
    why: str

    def __str__(self) -> str:
        return f"check {self.check}: {self.run}: {self.outcome} ({self.why})"


def parse(text: str) -> Condition | None:
    """The condition that `text` states; None for `card`. A UserError says what would be accepted."""
    if text.strip() == "card":
        return None
    match = _FORM.fullmatch(text)
    form = "expected METRIC OP NUMBER, for instance 'val_loss<=1.0048@epoch 2' (@epoch N or @step N), or card"
    if match is None:
        raise UserError(f"--check {text!r}: {form}")
    metric = match["metric"]
    if metric not in PLACED and metric not in WHOLE:
        raise UserError(f"--check {text!r}: no metric {metric}; there are {', '.join([*PLACED, *WHOLE])}")
    if match["axis"] and metric in WHOLE:
        raise UserError(f"--check {text!r}: {metric} is of a whole run and takes no @{match['axis']}")
    limit = _number(match["limit"], text)
    place = _number(match["place"], text) if match["axis"] else 0.0
    if place < 0:
        raise UserError(f"--check {text!r}: expected an {match['axis']} from 0")
    return Condition(text, metric, match["op"], limit, match["axis"], place)


def _number(text: str, check: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"--check {check!r}: {text} is no number") from None
    if number - number != 0:
        raise UserError(f"--check {check!r}: {text} is not finite")
    return number


def check_runs(texts: Sequence[str], runs: Sequence[Run], tolerance: float) -> list[Result]:
    """Each condition on each run; `tolerance` widens a limit, in the unit of its metric."""
    results = []
    for text in texts:
        condition = parse(text)
        for run in runs:
            outcome, why = _card(run, tolerance) if condition is None else _holds(condition, run, tolerance)
            results.append(Result(text.strip(), run.name, outcome, why))
    return results


def exit_code(results: Sequence[Result]) -> int:
    """0 where all passed, 1 where one failed, 3 where none failed and one was not comparable."""
    outcomes = {result.outcome for result in results}
    return 1 if FAILED in outcomes else 3 if NOT_COMPARABLE in outcomes else 0


def _holds(condition: Condition, run: Run, tolerance: float) -> tuple[str, str]:
    value, where = _value(condition, run)
    if value is None:
        return FAILED, where
    sign = {"<": 1, ">": -1}.get(condition.op[0])
    if sign is None:
        ok = abs(value - condition.limit) <= tolerance
    else:
        ok = OPERATORS[condition.op](value, condition.limit + sign * tolerance)
    text = f"{value:.6g} {where}" + (f", tolerance {tolerance:g}" if tolerance else "")
    return (PASSED if ok else FAILED), text


def _value(condition: Condition, run: Run) -> tuple[float | None, str]:
    """The value and where it was found, or None and why there is none."""
    if condition.axis is None and not run.finished:
        return None, f"the run is not finished ({run.state}), so it has no final value"
    if condition.metric in WHOLE:
        value = WHOLE[condition.metric](run)
        return (
            (None, f"the run does not tell its {condition.metric}") if value is None else (float(value), "over the run")
        )
    kind, column = PLACED[condition.metric]
    if condition.metric == "train_loss" and condition.axis == "step":
        kind, column = "steps", "loss"  # the mean of an epoch has no step of its own
    rows: Series = getattr(run, kind)
    at = _row(condition, run, rows)
    if at is None or rows[column][at] != rows[column][at]:
        place = f"at {condition.axis} {condition.place:g}" if condition.axis else "at the end"
        return None, f"no {condition.metric} {place}"
    return float(rows[column][at]), f"at epoch {rows['epoch'][at]:g}, step {rows['step'][at]:.0f}"


def _row(condition: Condition, run: Run, rows: Series) -> int | None:
    if condition.axis == "epoch":
        return run.at_epoch(rows, condition.place)
    if condition.axis == "step":
        found = (rows["step"] == condition.place).nonzero()[0]
        return int(found[0]) if len(found) else None
    return len(rows["step"]) - 1 if len(rows["step"]) else None


def _card(run: Run, tolerance: float) -> tuple[str, str]:
    """Whether each epoch's validation loss is at or under the card's."""
    reasons = why_not_card(run)
    if reasons:
        return NOT_COMPARABLE, "; ".join(reasons)
    over, told = [], []
    for row in reference.CURVE:
        at = run.at_epoch(run.evals, row.epoch)
        if at is None:
            return FAILED, f"no evaluation at epoch {row.epoch}"
        value = float(run.evals["loss"][at])
        told.append(f"epoch {row.epoch}: {value:.4f} against {row.val_loss:.4f}")
        if not value <= row.val_loss + tolerance:
            over.append(row.epoch)
    text = ", ".join(told) + f", tolerance {tolerance:g}; {reference.UNKNOWN}"
    return (FAILED, f"over at epoch {', '.join(map(str, over))}: {text}") if over else (PASSED, text)
