"""What launch/compare.py does, in order: read, compare, write, show, publish."""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from tabulate import tabulate

from trainer.config import reference
from trainer.config.errors import UserError, escape_controls
from trainer.config.files import read_json_object
from trainer.report import wandb_report
from trainer.report.judge import parse_margin
from trainer.report.load import load_runs
from trainer.report.page import FILES, compare, write_report
from trainer.report.run_data import TRAINER_MODE
from trainer.report.sentence import Verdict
from trainer.report.tables import Table

REFUSED_EXIT_CODE = 3
MAX_CONSOLE_COLUMNS = 7


def run_comparison(args: argparse.Namespace) -> int:
    """Carry out a parsed command line; the exit code. UserError on a mistake, before any slow work."""
    if not args.runs:
        raise UserError("no RUN given: expected run folders, for instance runs/full-acled-demo")
    margin = parse_margin(args.margin, args.decide_by)
    paths = refuse_foreign_answer(args.output_dir)
    report_target = wandb_report.parse_target(args.wandb_report) if args.wandb_report else None
    runs, problems = load_runs(args.runs)
    if not runs:
        raise UserError("none of the runs could be read: " + "; ".join(map(str, problems)))
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    own_runs = [run for run in runs if run.mode != TRAINER_MODE]
    with_reference = args.card or any(reference.is_worth_a_word(run.metadata) for run in own_runs)
    comparison = compare(runs, problems, with_reference, margin)
    write_report(comparison, args.output_dir)
    print_epochs(comparison.by_epoch)
    print_verdict(comparison.verdict, [f"- {line}" for line in comparison.comparability_notes])
    if report_target:
        print(f"W&B Report: {wandb_report.save_report(comparison, *report_target)}")
    print(f"report: {escape_controls(str(paths[0]))} (and {', '.join(path.name for path in paths[1:])})")
    return REFUSED_EXIT_CODE if comparison.verdict.answer == "not ranked" else 0


def refuse_foreign_answer(output_dir: Path) -> list[Path]:
    """The files of a report in this folder; UserError where others stand there: a study's answer is another's."""
    paths, answer = [output_dir / name for name in FILES], dict[str, object]()
    existing = [path.name for path in paths if os.path.lexists(path)]
    with contextlib.suppress(UserError):  # which is none of ours then
        answer = read_json_object(output_dir / "answer.json")
    if existing and ("comparisons" not in answer or "study" in answer):
        raise UserError(f"--output-dir {output_dir}: {existing[0]} there was not written by this program; name another")
    return paths


def print_epochs(table: Table) -> None:
    """The table by epoch, without its training losses where they would not fit beside the others."""
    is_wide = len(table.headings) > MAX_CONSOLE_COLUMNS
    columns = [i for i, name in enumerate(table.headings) if not (is_wide and name.endswith(", train"))]
    rows = [[row[i] for i in columns] for row in table.rows]
    alignment = ["right" if table.is_numeric[i] else "left" for i in columns]
    headings = [table.headings[i] for i in columns]
    print(tabulate(rows, headings, tablefmt="github", disable_numparse=True, colalign=alignment) + "\n")


def print_verdict(verdict: Verdict, lines: Sequence[str]) -> None:
    """Print the sentence, what to do next, the numbers and `lines`: broken at words on a terminal, else a line each."""
    console = Console(highlight=False)
    advice = [f"Next: {verdict.next_step}"] if verdict.next_step else []
    for n, line in enumerate([verdict.sentence, *advice, *map(str, verdict.headlines), *lines]):
        style = "bold" if console.is_terminal and not n else None
        console.print(escape_controls(line), markup=False, soft_wrap=not console.is_terminal, style=style)
