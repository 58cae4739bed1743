"""The plan before a run and the table after it."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from trainer.config import reference
from trainer.config.errors import escape_controls
from trainer.tracking.console import is_terminal, make_console
from trainer.tracking.records import EpochRecord, EvalRecord, Record

HEADINGS = ("epoch", "train loss", "validation loss", "perplexity", "card train", "card val")
EPOCH_TOLERANCE = 1e-6  # an epoch this close to a whole number is one: fractions of steps are floats


@dataclass(frozen=True, kw_only=True)
class EpochSummary:
    """One line of the table at the end; losses in nats per token, None where there is no such number."""

    epoch: float
    train_loss: float | None
    val_loss: float | None
    perplexity: float | None
    reference_train_loss: float | None
    reference_val_loss: float | None


def summarize_epochs(records: Iterable[Record]) -> list[EpochSummary]:
    """The rows at whole epochs, at the start (the base model: validation only) and at the last evaluation.

    Evaluations within an epoch are left out; where a resumed run has evaluated twice the later one counts.
    """
    train_losses: dict[float, float] = {}
    evals: dict[float, EvalRecord] = {}
    for record in records:
        if isinstance(record, EpochRecord):
            train_losses[_snap_to_whole(record.epoch)] = record.train_loss
        elif isinstance(record, EvalRecord):
            evals[_snap_to_whole(record.epoch)] = record
    references = {float(row.epoch): row for row in reference.CURVE}
    last_epoch = max(evals, default=None)
    return [
        EpochSummary(
            epoch=epoch,
            train_loss=train_losses.get(epoch),
            val_loss=evals[epoch].loss if epoch in evals else None,
            perplexity=evals[epoch].perplexity if epoch in evals else None,
            reference_train_loss=references[epoch].train_loss if epoch in references else None,
            reference_val_loss=references[epoch].val_loss if epoch in references else None,
        )
        for epoch in sorted({*train_losses, *evals})
        if epoch in train_losses or epoch == round(epoch) or epoch == last_epoch
    ]


def show_summary(
    records: Iterable[Record], reasons: Sequence[str], *, with_reference: bool, stream: TextIO | None = None
) -> None:
    """Print the table, then the best evaluation. `with_reference`: beside the card's curve and with the reasons why it
    is not comparable; else one short line stands for them."""
    loss_records = [r for r in records if isinstance(r, EpochRecord | EvalRecord)]
    evals = [r for r in loss_records if isinstance(r, EvalRecord)]
    best_eval = min(evals, key=lambda r: (r.loss, r.step), default=None)
    best_epoch = _snap_to_whole(best_eval.epoch) if best_eval else None
    headings = HEADINGS if with_reference else HEADINGS[:-2]
    cells = {row.epoch: _cells(row)[: len(headings)] for row in summarize_epochs(loss_records)}
    stream, lines = stream or sys.stdout, []
    if is_terminal(stream):
        _print_table(headings, cells, best_epoch, stream)
    else:
        lines = _plain_table([headings, *cells.values()])
    if best_eval is not None:
        best = f"{best_eval.loss:.4f} at epoch {_format_epoch(best_eval.epoch)} (step {best_eval.step})"
        lines.append(f"best validation loss {best}")
    if reasons and with_reference:
        lines.append("not comparable with the card: " + escape_controls("; ".join(reasons)))
    elif reasons:
        lines.append(f"not comparable with the card {reference.NAME}; launch/compare.py says why")
    print("\n".join(lines), file=stream, flush=True)


def show_plan(lines: Sequence[tuple[str, str]], *, stream: TextIO | None = None) -> None:
    """Print `key  value` lines, the values aligned; on a terminal long values go on under themselves."""
    stream = stream or sys.stdout
    lines = [(key, escape_controls(value)) for key, value in lines]
    if not is_terminal(stream):
        width = max((len(key) for key, _ in lines), default=0)
        print("\n".join(f"{key:<{width}}  {value}" for key, value in lines), file=stream, flush=True)
        return
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in lines:
        grid.add_row(Text(key), Text(value))
    make_console(stream).print(grid)


def _cells(row: EpochSummary) -> list[str]:
    """The cells of a row under HEADINGS."""
    perplexity = "-" if row.perplexity is None else f"{row.perplexity:.{3 if row.perplexity < 1e5 else 0}f}"
    losses = (row.train_loss, row.val_loss, row.reference_train_loss, row.reference_val_loss)
    train, val, *reference_cells = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
    return [_format_epoch(row.epoch), train, val, perplexity, *reference_cells]


def _print_table(
    headings: Sequence[str], cells: dict[float, list[str]], best_epoch: float | None, stream: TextIO
) -> None:
    """The table on a terminal, the best row in bold, the card's columns dim."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, style="dim" if heading.startswith("card") else "")
    for epoch, row in cells.items():
        table.add_row(*row, style="bold" if epoch == best_epoch else "")
    make_console(stream).print(table)


def _plain_table(lines: Sequence[Sequence[str]]) -> list[str]:
    """The table in pipes and dashes, which every log shows and Markdown renders; the first line holds the headings."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    heading, *rows = (" | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    rule = "|".join("-" * (width + 1) + ":" for width in widths)
    return [f"| {heading} |", f"|{rule}|", *(f"| {row} |" for row in rows)]


def _snap_to_whole(epoch: float) -> float:
    """The epoch, made whole where only rounding keeps it from being whole."""
    return float(round(epoch)) if abs(epoch - round(epoch)) < EPOCH_TOLERANCE else epoch


def _format_epoch(epoch: float) -> str:
    return f"{_snap_to_whole(epoch):.2f}".rstrip("0").rstrip(".")
