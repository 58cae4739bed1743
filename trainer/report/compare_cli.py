"""What launch/compare.py does, in order: log the card, read, compare, check, write, show, publish.

A check is a condition on runs, for use in CI: `val_loss<=1.0048@epoch 2`, and the built-in `card`.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from tabulate import tabulate

from trainer.config import reference
from trainer.config.errors import UserError, escape_controls
from trainer.config.files import refuse_foreign_files, write_atomically
from trainer.report import wandb_report
from trainer.report.comparable import reference_blockers
from trainer.report.judge import parse_margin
from trainer.report.load import load_runs
from trainer.report.page import FILES, compare, write_report
from trainer.report.run_data import TRAINER_MODE, RunData
from trainer.report.sentence import Verdict
from trainer.report.tables import Table

REFUSED_EXIT_CODE = 3
MAX_CONSOLE_ROWS, MAX_CONSOLE_COLUMNS = 40, 7
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
    "train_loss": ("epochs", "train_loss"),
    "tokens_per_second": ("steps", "tokens_per_second"),
}
#: metrics of a whole run
RUN_METRICS: dict[str, Callable[[RunData], Any]] = {
    "best_val_loss": lambda run: run.best_eval and run.best_eval["loss"],
    "wall_seconds": lambda run: run.summary.get("wall_seconds"),
    "peak_memory_bytes": lambda run: run.summary.get("peak_memory_bytes"),
}
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,2})?"
_CONDITION_PATTERN = re.compile(
    rf"\s*(?P<metric>[a-z_]+)\s*(?P<op><=|>=|==|<|>)\s*(?P<limit>[-+]?{_NUMBER})\s*"
    rf"(?:@\s*(?P<axis>epoch|step)\s+(?P<place>{_NUMBER})\s*)?"
)


def run_comparison(args: argparse.Namespace) -> int:
    """Carry out a parsed command line; the exit code. UserError on a mistake, before any slow work."""
    if not args.runs and (not args.log_card or args.check or args.wandb_report or args.wandb_report_json):
        raise UserError(
            "no RUN given: expected run folders, offline W&B folders or entity/project/run_id, "
            "for instance runs/full-acled-demo"
        )
    conditions = [parse_condition(text) for text in args.check]
    if args.log_card is not None and not 1 <= len([part for part in args.log_card.split("/") if part]) <= 2:
        raise UserError(f"--log-card {args.log_card}: expected PROJECT or ENTITY/PROJECT")
    margin = parse_margin(args.margin, args.decide_by)
    paths, spec = refuse_foreign_answer(args.output_dir), args.wandb_report_json
    if spec:
        refuse_foreign_files([spec], spec, f"--wandb-report-json {spec}", lambda content: "blocks" in content)
    report_target = wandb_report.parse_target(args.wandb_report) if args.wandb_report else None
    if args.log_card:
        print(wandb_report.log_reference(args.log_card))
        if not args.runs:
            return 0
    runs, problems = load_runs(args.runs)
    if not runs:
        raise UserError("none of the runs could be read: " + "; ".join(map(str, problems)))
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    with_reference = (
        args.card
        or None in conditions
        or any(reference.is_worth_a_word(run.metadata) for run in runs if run.mode != TRAINER_MODE)
    )
    comparison = compare(runs, problems, with_reference, margin)
    results = check_runs(args.check, comparison.runs, args.tolerance)
    results += [
        CheckResult(check.strip(), group.label, NOT_COMPARABLE, "a run of Hugging Face's Trainer is plotted only")
        for check in args.check
        for group in comparison.plotted_only
    ]
    results += [  # a run that could not be read fails each check: silence would let it pass
        CheckResult(check.strip(), problem.source, FAILED, problem.text)
        for check in args.check
        for problem in problems
        if problem.is_excluded
    ]
    write_report(comparison, args.output_dir)
    print_epochs(comparison.by_epoch)
    print_verdict(comparison.verdict, [*(f"- {line}" for line in comparison.comparability_notes), *map(str, results)])
    if spec:
        try:
            spec.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(spec, wandb_report.to_spec_json(comparison))
        except OSError as error:
            raise UserError(f"--wandb-report-json {spec}: cannot write there ({error.strerror or error})") from error
        print(f"W&B Report, not sent: {spec}")
    if report_target:
        print(f"W&B Report: {wandb_report.save_report(comparison, *report_target)}")
    print(f"report: {escape_controls(str(paths[0]))} (and {', '.join(path.name for path in paths[1:])})")
    return exit_code(results) or (REFUSED_EXIT_CODE if comparison.verdict.answer == "not ranked" else 0)


def refuse_foreign_answer(output_dir: Path) -> list[Path]:
    """The files of a report in this folder; UserError where others stand there: a study's answer is another's."""
    paths, flag = [output_dir / name for name in FILES], f"--output-dir {output_dir}"
    answer = output_dir / "answer.json"
    refuse_foreign_files(paths, answer, flag, lambda content: "comparisons" in content and "study" not in content)
    return paths


def print_epochs(table: Table) -> None:
    """The table by epoch, without its training losses where they would not fit beside the others."""
    if len(table.rows) > MAX_CONSOLE_ROWS:
        print(f"{len(table.rows)} rows by epoch: see the report")
        return
    is_wide = len(table.headings) > MAX_CONSOLE_COLUMNS
    columns = [i for i, name in enumerate(table.headings) if not (is_wide and name.endswith(", train"))]
    rows = [[row[i] for i in columns] for row in table.rows]
    alignment = ["right" if table.is_numeric[i] else "left" for i in columns]
    headings = [table.headings[i] for i in columns]
    print(tabulate(rows, headings, tablefmt="github", disable_numparse=True, colalign=alignment) + "\n")


def print_verdict(verdict: Verdict, lines: Sequence[str]) -> None:
    """Print the sentence, what to do next, the numbers and what follows: broken at words on a terminal, else a line
    each."""
    console = Console(highlight=False)
    advice = [f"Next: {verdict.next_step}"] if verdict.next_step else []
    for n, line in enumerate([verdict.sentence, *advice, *map(str, verdict.headlines), *lines]):
        style = "bold" if console.is_terminal and not n else None
        console.print(escape_controls(line), markup=False, soft_wrap=not console.is_terminal, style=style)


# --- checks ---


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
