"""What launch/compare.py does, in order: log the card, read, compare, check, write, show, publish."""

import argparse
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from trainer.config.errors import UserError
from trainer.report import wandb_report
from trainer.report.checks import FAILED, CheckResult, check_runs, exit_code, parse_condition
from trainer.report.judge import ComparisonOptions, parse_margin
from trainer.report.load import load_runs
from trainer.report.page import write_report
from trainer.report.sentence import Verdict
from trainer.report.tables import REFERENCE_LABEL, Comparison, compare

REFUSED_EXIT_CODE = 3
MAX_CONSOLE_ROWS = 40
#: the columns of the short table, and their short headings
CONSOLE_COLUMNS = {
    "epoch": "epoch",
    "run": "run",
    "step": "step",
    "train_loss": "train loss",
    "val_loss": "val loss",
    "perplexity": "perplexity",
    "to_card": "to card",
}


def run_comparison(args: argparse.Namespace) -> int:
    """Carry out a parsed command line; the exit code. UserError on a mistake, before any slow work."""
    if not args.runs and (not args.log_card or args.check or args.wandb_report or args.wandb_report_json):
        raise UserError(
            "no RUN given: expected run folders, offline W&B folders or entity/project/run_id, "
            "for instance runs/full-acled-demo"
        )
    if not 0 <= args.tolerance < float("inf"):
        raise UserError(f"--tolerance {args.tolerance}: expected 0 or a number above it")
    conditions = [parse_condition(text) for text in args.check]
    if args.no_card and None in conditions:
        raise UserError("--check card with --no-card: leave one of them out")
    if args.log_card is not None and not 1 <= len([part for part in args.log_card.split("/") if part]) <= 2:
        raise UserError(f"--log-card {args.log_card}: expected PROJECT or ENTITY/PROJECT")
    options = ComparisonOptions(margin=parse_margin(args.margin))
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
    comparison = compare(runs, problems, with_reference=not args.no_card, options=options)
    results = check_runs(args.check, runs, args.tolerance)
    results += [  # a run that could not be read fails each check: silence would let it pass
        CheckResult(check.strip(), problem.source, FAILED, problem.text)
        for check in args.check
        for problem in problems
        if problem.is_excluded
    ]
    paths = write_report(comparison, args.output_dir, [result._asdict() for result in results])
    print_comparison(comparison, results)
    if args.wandb_report_json:
        args.wandb_report_json.parent.mkdir(parents=True, exist_ok=True)
        args.wandb_report_json.write_text(wandb_report.to_spec_json(comparison), encoding="utf-8")
        print(f"W&B Report, not sent: {args.wandb_report_json}")
    if report_target:
        print(f"W&B Report: {wandb_report.save_report(comparison, *report_target, args.output_dir)}")
    print(f"report: {paths[0]} (and {', '.join(path.name for path in paths[1:])})")
    primary = comparison.verdict.primary
    is_refused = primary is not None and bool(primary.blockers)
    return exit_code(results) or (REFUSED_EXIT_CODE if is_refused else 0)


def print_comparison(comparison: Comparison, results: Sequence[CheckResult]) -> None:
    console = Console(highlight=False)
    is_plain = not console.is_terminal
    if is_plain:
        console.width = 160  # nobody to fit: whole columns are better
    by_epoch = comparison.by_epoch.to_text()
    columns = {i: CONSOLE_COLUMNS[key] for i, key in enumerate(comparison.by_epoch.headings) if key in CONSOLE_COLUMNS}
    table = RichTable(box=box.MARKDOWN if is_plain else box.SIMPLE_HEAD)
    for heading in columns.values():
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for row in by_epoch.itertuples(index=False):
        cells = [Text(row[i]) for i in columns]  # names are text, not rich's markup
        table.add_row(*cells, style="dim" if row[1] == REFERENCE_LABEL else None)
    if len(by_epoch) > MAX_CONSOLE_ROWS:
        console.print(f"{len(by_epoch)} rows by epoch: see the report")
    elif is_plain:
        with console.capture() as capture:
            console.print(table, markup=False)
        print(capture.get().strip(" \n") + "\n")
    else:
        console.print(table, markup=False)
    notes = [f"- {line}" for line in comparison.comparability_notes]
    print_verdict(comparison.verdict, [*notes, *map(str, results)])


def print_verdict(verdict: Verdict, lines: Sequence[str]) -> None:
    """Print the sentence, the three numbers and what follows them: broken at words on a terminal, else a line each."""
    console = Console(highlight=False)
    numbers = [f"{headline.label}: {headline.value} ({headline.note})" for headline in verdict.headlines]
    for n, line in enumerate([verdict.sentence, *numbers, *lines]):
        style = "bold" if console.is_terminal and not n else None
        console.print(line, markup=False, soft_wrap=not console.is_terminal, style=style)
