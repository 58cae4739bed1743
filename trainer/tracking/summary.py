"""The plan before a run and the table after it."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from trainer.config import reference
from trainer.tracking.console import console, is_terminal
from trainer.tracking.records import EpochRecord, EvalRecord, Record

if TYPE_CHECKING:
    from rich.table import Table

MOST_ROWS = 24  # a table longer than a screen is thinned out
HEADINGS = ("epoch", "train loss", "validation loss", "perplexity", "card train", "card val")
WHOLE = 1e-6  # an epoch this close to a whole number is one: fractions of steps are floats


@dataclass(frozen=True, kw_only=True)
class EndRow:
    """One line of the table at the end; losses in nats per token, None where there is no such number."""

    epoch: float
    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    perplexity: float | None = None
    card_train: float | None = None
    card_val: float | None = None


def end_rows(records: Iterable[Record]) -> list[EndRow]:
    """The rows at whole epochs, at the start (the base model: validation only) and at the last evaluation.

    Evaluations within an epoch are left out; where a resumed run has evaluated twice the later one counts.
    """
    means: dict[float, EpochRecord] = {}
    evals: dict[float, EvalRecord] = {}
    for record in records:
        if isinstance(record, EpochRecord):
            means[_at(record.epoch)] = record
        elif isinstance(record, EvalRecord):
            evals[_at(record.epoch)] = record
    last = max(evals, default=None)
    shown = sorted({*means, *(at for at in evals if at == round(at) or at == last)})
    return [_row(at, means.get(at), evals.get(at)) for at in shown]


def best(records: Iterable[Record]) -> EvalRecord | None:
    """The evaluation with the lowest loss, the earliest of equals."""
    return min((r for r in records if isinstance(r, EvalRecord)), key=lambda r: (r.loss, r.step), default=None)


def show_end(records: Iterable[Record], reasons: Sequence[str], *, stream: TextIO | None = None) -> None:
    """Print the table beside the card's curve, then the best evaluation and why the card is not comparable."""
    kept = [r for r in records if isinstance(r, EpochRecord | EvalRecord)]
    rows, lowest = end_rows(kept), best(kept)
    stream = stream or sys.stdout
    if is_terminal(stream):
        console(stream).print(_table(thinned(rows, lowest), lowest))
        lines = []
    else:
        lines = _plain_table(thinned(rows, lowest))
    if len(rows) > MOST_ROWS:
        lines.append(f"{len(rows)} rows thinned out to {MOST_ROWS}; metrics.jsonl has all of them")
    if lowest is not None:
        lines.append(f"best validation loss {lowest.loss:.4f} at epoch {_number(lowest.epoch)} (step {lowest.step})")
    if reasons:
        lines.append("not comparable with the card: " + "; ".join(reasons))
    print("\n".join(lines), file=stream, flush=True)


def thinned(rows: list[EndRow], lowest: EvalRecord | None) -> list[EndRow]:
    """At most MOST_ROWS of them: the start, the card's epochs, the best, the last, and others evenly in between."""
    if len(rows) <= MOST_ROWS:
        return rows
    always = {i for i, row in enumerate(rows) if i in (0, len(rows) - 1) or row.card_val is not None}
    always |= {i for i, row in enumerate(rows) if lowest is not None and row.epoch == _at(lowest.epoch)}
    others = [i for i in range(len(rows)) if i not in always]
    room = MOST_ROWS - len(always)
    return [rows[i] for i in sorted(always | {others[k * len(others) // room] for k in range(room)})]


def show_plan(lines: Sequence[tuple[str, str]], *, stream: TextIO | None = None) -> None:
    """Print `key  value` lines, the values aligned; on a terminal long values go on under themselves."""
    stream = stream or sys.stdout
    if not is_terminal(stream):
        width = max((len(key) for key, _ in lines), default=0)
        print("\n".join(f"{key:<{width}}  {value}" for key, value in lines), file=stream, flush=True)
        return
    from rich.table import Table
    from rich.text import Text

    plan = Table.grid(padding=(0, 2))
    plan.add_column(style="bold", no_wrap=True)
    plan.add_column(overflow="fold")
    for key, value in lines:
        plan.add_row(Text(key), Text(value))
    console(stream).print(plan)


def _row(at: float, mean: EpochRecord | None, val: EvalRecord | None) -> EndRow:
    """The line at epoch `at`, for which there is a mean, an evaluation or both."""
    card = next((row for row in reference.CURVE if row.epoch == at), None)
    return EndRow(
        epoch=at,
        step=next(record.step for record in (val, mean) if record),
        train_loss=mean.train_loss if mean else None,
        val_loss=val.loss if val else None,
        perplexity=val.perplexity if val else None,
        card_train=card.train_loss if card else None,
        card_val=card.val_loss if card else None,
    )


def _cells(row: EndRow) -> list[str]:
    """The cells of a row under HEADINGS."""
    perplexity = "-" if row.perplexity is None else f"{row.perplexity:.{3 if row.perplexity < 1e5 else 0}f}"
    losses = [_loss(loss) for loss in (row.train_loss, row.val_loss, row.card_train, row.card_val)]
    return [_number(row.epoch), *losses[:2], perplexity, *losses[2:]]


def _table(rows: Sequence[EndRow], lowest: EvalRecord | None) -> "Table":
    """The table for a terminal, the best row in bold, the card's columns dim."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True, style="dim" if heading.startswith("card") else "")
    for row in rows:
        is_best = lowest is not None and row.val_loss is not None and row.epoch == _at(lowest.epoch)
        table.add_row(*_cells(row), style="bold" if is_best else "")
    return table


def _plain_table(rows: Sequence[EndRow]) -> list[str]:
    """The lines of the table in pipes and dashes, which every log shows and Markdown renders."""
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
    lines = ["| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]


def _at(epoch: float) -> float:
    """The epoch, made whole where only rounding keeps it from being whole."""
    return float(round(epoch)) if abs(epoch - round(epoch)) < WHOLE else epoch


def _number(epoch: float) -> str:
    return f"{_at(epoch):.2f}".rstrip("0").rstrip(".")


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
