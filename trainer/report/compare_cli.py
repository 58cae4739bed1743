"""What launch/compare.py does, in order: log the card, read, compare, check, write, show, publish."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence

from trainer.config.errors import UserError
from trainer.report.assertions import Result, check_runs, exit_code, parse
from trainer.report.comparison import Comparison, compare, write
from trainer.report.load import Problem, gather
from trainer.report.tables import Table

#: the columns of the short table, and their short headings
SHORT = {
    "epoch": "epoch",
    "run": "run",
    "step": "step",
    "train_loss": "train loss",
    "val_loss": "val loss",
    "perplexity": "perplexity",
    "to_card": "to card",
}


def run(given: argparse.Namespace) -> int:
    """Carry out a parsed command line; the exit code. UserError on a mistake, before any slow work."""
    _check_request(given)
    if given.log_card:
        from trainer.report.wandb_reference import log_card

        print(log_card(given.log_card))
        if not given.runs:
            return 0
    runs, problems = gather(given.runs)
    for problem in problems:
        print(f"note: {problem}", file=sys.stderr)
    if not runs:
        raise UserError("none of the runs could be read: " + "; ".join(map(str, problems)))
    comparison = compare(runs, problems, with_card=not given.no_card)
    results = check_runs(given.check, runs, given.tolerance) + _unread(given.check, problems)
    paths = write(comparison, given.out, [dataclasses.asdict(result) for result in results])
    show(comparison, results)
    if given.wandb_report_json or given.wandb_report:
        _wandb_report(given, comparison)
    print(f"report: {paths[0]} (and {', '.join(path.name for path in paths[1:])})")
    return exit_code(results)


def _check_request(given: argparse.Namespace) -> None:
    if not given.runs and not given.log_card:
        raise UserError(
            "no RUN given: expected run folders, offline W&B folders or entity/project/run_id, "
            "for instance runs/full-acled-demo"
        )
    if not 0 <= given.tolerance < float("inf"):
        raise UserError(f"--tolerance {given.tolerance}: expected 0 or a number above it")
    for text in given.check:
        if parse(text) is None and given.no_card:
            raise UserError("--check card with --no-card: leave one of them out")
    if given.check and not given.runs:
        raise UserError("--check without a RUN: there is nothing to check")
    if given.wandb_report is not None and len([part for part in given.wandb_report.split("/") if part]) != 2:
        raise UserError(f"--wandb-report {given.wandb_report}: expected ENTITY/PROJECT")
    if (given.wandb_report or given.wandb_report_json) and not given.runs:
        raise UserError("--wandb-report without a RUN: there is nothing to report")
    if given.wandb_report:
        from trainer.report.wandb_report import check_can_save

        check_can_save()
    if given.log_card is not None and not 1 <= len([part for part in given.log_card.split("/") if part]) <= 2:
        raise UserError(f"--log-card {given.log_card}: expected PROJECT or ENTITY/PROJECT")


def _unread(checks: Sequence[str], problems: Sequence[Problem]) -> list[Result]:
    """A run that could not be read fails each check: silence would let it pass."""
    return [
        Result(check.strip(), problem.source, "failed", problem.text)
        for check in checks
        for problem in problems
        if problem.left_out
    ]


def _wandb_report(given: argparse.Namespace, comparison: Comparison) -> None:
    from trainer.report import wandb_report

    if given.wandb_report_json:
        given.wandb_report_json.parent.mkdir(parents=True, exist_ok=True)
        given.wandb_report_json.write_text(wandb_report.spec(comparison), encoding="utf-8")
        print(f"W&B Report, not sent: {given.wandb_report_json}")
    if given.wandb_report:
        entity, project = (part for part in given.wandb_report.split("/") if part)
        print(f"W&B Report: {wandb_report.save(comparison, entity, project, given.out)}")


def show(comparison: Comparison, results: Sequence[Result]) -> None:
    """Print the short table, the verdict and the checks."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    plain = not console.is_terminal
    if plain:
        console.width = 160  # nobody to fit: whole columns are better
    short = _short(comparison.by_epoch, SHORT)
    table = RichTable(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    for i, heading in enumerate(short.columns.values()):
        table.add_column(heading, justify="left" if i == 1 else "right", no_wrap=True)
    for row in short.rows:
        table.add_row(*(cell.text for cell in row), style="dim" if row[1].text == "card" else None)
    if len(short.rows) > 40:
        console.print(f"{len(short.rows)} rows by epoch: see the report")
    elif plain:
        with console.capture() as drawn:
            console.print(table, markup=False)
        print(drawn.get().strip(" \n") + "\n")
    else:
        console.print(table, markup=False)
    console.print(comparison.verdict.sentence, markup=False, soft_wrap=True, style=None if plain else "bold")
    for line in comparison.comparable:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    for result in results:
        console.print(str(result), markup=False, soft_wrap=True)


def _short(table: Table, headings: Mapping[str, str]) -> Table:
    """Only these columns, under these headings."""
    kept = [i for i, key in enumerate(table.columns) if key in headings]
    columns = {key: headings[key] for key in table.columns if key in headings}
    return dataclasses.replace(table, columns=columns, rows=tuple(tuple(row[i] for i in kept) for row in table.rows))
