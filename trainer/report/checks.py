"""Conditions on runs, for use in CI: `val_loss<=1.0048@epoch 2`, and the built-in `card`."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trainer.config import reference
from trainer.config.errors import UserError, escape_controls
from trainer.report.comparable import reference_blockers
from trainer.report.run_data import RunData

PASSED, FAILED, NOT_COMPARABLE = "passed", "failed", "not comparable"
#: whether a value is on the right side of a limit, widened by a tolerance
OPERATORS: dict[str, Callable[[float, float, float], bool]] = {
    "<=": lambda value, limit, tolerance: value <= limit + tolerance,
    "<": lambda value, limit, tolerance: value < limit + tolerance,
    ">=": lambda value, limit, tolerance: value >= limit - tolerance,
    ">": lambda value, limit, tolerance: value > limit - tolerance,
    "==": lambda value, limit, tolerance: abs(value - limit) <= tolerance,
}
#: metrics that have a value at a place: which records hold it, and in which column
SERIES_METRICS = {
    "val_loss": ("evals", "loss"),
    "perplexity": ("evals", "perplexity"),
    "train_loss": ("epochs", "train_loss"),
    "lr": ("steps", "lr"),
    "grad_norm": ("steps", "grad_norm"),
    "tokens_per_second": ("steps", "tokens_per_second"),
}
#: metrics of a whole run
RUN_METRICS: dict[str, Callable[[RunData], Any]] = {
    "best_val_loss": lambda run: run.best_eval and run.best_eval["loss"],
    "improvement": lambda run: run.improvement,
    "wall_seconds": lambda run: run.summary.get("wall_seconds"),
    "peak_memory_bytes": lambda run: run.summary.get("peak_memory_bytes"),
    "trainable_parameters": lambda run: run.get("model.trainable"),
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,2})?"
_CONDITION_PATTERN = re.compile(
    rf"\s*(?P<metric>[a-z_]+)\s*(?P<op><=|>=|==|<|>)\s*(?P<limit>[-+]?{_NUMBER})\s*"
    rf"(?:@\s*(?P<axis>epoch|step)\s+(?P<place>{_NUMBER})\s*)?"
)


class CheckResult(NamedTuple):
    """What a check found for one run."""

    check: str
    run: str
    outcome: str
    why: str

    def __str__(self) -> str:
        return escape_controls(f"check {self.check}: {self.run}: {self.outcome} ({self.why})")


def parse_condition(text: str) -> re.Match[str] | None:
    """The parts of the condition that `text` states; None for `card`. A UserError says what would be accepted."""
    if text.strip() == "card":
        return None
    match = _CONDITION_PATTERN.fullmatch(text)
    if match is None or match["metric"] not in (SERIES_METRICS if match["axis"] else {**SERIES_METRICS, **RUN_METRICS}):
        raise UserError(
            f"--check {text!r}: expected card, or METRIC OP NUMBER such as 'val_loss<=1.0048@epoch 2' (or @step N), "
            f"with one of {', '.join(SERIES_METRICS)}, or without @ one of {', '.join(RUN_METRICS)}"
        )
    return match


def check_runs(texts: Sequence[str], runs: Sequence[RunData], tolerance: float) -> list[CheckResult]:
    """Each condition on each run; `tolerance` widens a limit, in the unit of its metric."""
    results = []
    for text in texts:
        condition = parse_condition(text)
        for run in runs:
            if condition is None:
                outcome, reason = _check_against_reference(run, tolerance)
            else:
                value, reason = _find_value(condition["metric"], condition["axis"], float(condition["place"] or 0), run)
                outcome = FAILED
                if value is not None:
                    is_held = OPERATORS[condition["op"]](value, float(condition["limit"]), tolerance)
                    outcome = PASSED if is_held else FAILED
                    reason = f"{value:.6g} {reason}" + (f", tolerance {tolerance:g}" if tolerance else "")
            results.append(CheckResult(text.strip(), run.name, outcome, reason))
    return results


def exit_code(results: Sequence[CheckResult]) -> int:
    """0 where all passed, 1 where one failed, 3 where none failed and one was not comparable."""
    outcomes = {result.outcome for result in results}
    return 1 if FAILED in outcomes else 3 if NOT_COMPARABLE in outcomes else 0


def _find_value(metric: str, axis: str | None, place: float, run: RunData) -> tuple[float | None, str]:
    """The value and where it was found, or None and why there is none; without an axis, that of the run's end."""
    if axis is None and not run.is_finished:
        return None, f"the run is not finished ({run.state}), so it has no final value"
    if metric in RUN_METRICS:
        value = RUN_METRICS[metric](run)
        return (None, f"the run does not tell its {metric}") if value is None else (float(value), "over the run")
    series_name, column = SERIES_METRICS[metric]
    if metric == "train_loss" and axis == "step":
        series_name, column = "steps", "loss"  # the mean of an epoch has no step of its own
    series = getattr(run, series_name)
    if axis == "epoch":
        index = run.index_at_epoch(series, place)
    else:
        indices = (series["step"] == place).nonzero()[0] if axis else range(len(series["step"]))[-1:]
        index = next(iter(indices), None)
    if index is None or math.isnan(series[column][index]):
        return None, f"no {metric} " + (f"at {axis} {place:g}" if axis else "at the end")
    return float(series[column][index]), f"at epoch {series['epoch'][index]:g}, step {series['step'][index]:.0f}"


def _check_against_reference(run: RunData, tolerance: float) -> tuple[str, str]:
    """Whether each epoch's validation loss is at or under the card's."""
    if reasons := reference_blockers(run):
        return NOT_COMPARABLE, "; ".join(reasons)
    failed_epochs, comparisons = [], []
    for row in reference.CURVE:
        index = run.index_at_epoch(run.evals, row.epoch)
        if index is None:
            return FAILED, f"no evaluation at epoch {row.epoch}"
        value = float(run.evals["loss"][index])
        comparisons.append(f"epoch {row.epoch}: {value:.4f} against {row.val_loss:.4f}")
        if not value <= row.val_loss + tolerance:
            failed_epochs.append(str(row.epoch))
    text = ", ".join(comparisons) + f", tolerance {tolerance:g}; {reference.UNKNOWN_REASON}"
    return (FAILED, f"over at epoch {', '.join(failed_epochs)}: {text}") if failed_epochs else (PASSED, text)
