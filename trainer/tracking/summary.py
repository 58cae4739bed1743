"""The plan before a run and the table after it."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from trainer.config import reference
from trainer.config.errors import escape_controls
from trainer.tracking.console import is_terminal, make_console
from trainer.tracking.records import EpochRecord, EvalRecord, Record

if TYPE_CHECKING:
    from rich.table import Table

MAX_ROWS = 24  # a table longer than a screen is thinned out
HEADINGS = ("epoch", "train loss", "validation loss", "perplexity", "card train", "card val")
EPOCH_TOLERANCE = 1e-6  # an epoch this close to a whole number is one: fractions of steps are floats


@dataclass(frozen=True, kw_only=True)
class EpochSummary:
    """One line of the table at the end; losses in nats per token, None where there is no such number."""

    epoch: float
    step: int
    train_loss: float | None = None
    val_loss: float | None = None
    perplexity: float | None = None
    reference_train_loss: float | None = None
    reference_val_loss: float | None = None


def summarize_epochs(records: Iterable[Record]) -> list[EpochSummary]:
    """The rows at whole epochs, at the start (the base model: validation only) and at the last evaluation.

    Evaluations within an epoch are left out; where a resumed run has evaluated twice the later one counts.
    """
    means: dict[float, EpochRecord] = {}
    evals: dict[float, EvalRecord] = {}
    for record in records:
        if isinstance(record, EpochRecord):
            means[_snap_to_whole(record.epoch)] = record
        elif isinstance(record, EvalRecord):
            evals[_snap_to_whole(record.epoch)] = record
    last_epoch = max(evals, default=None)
    epochs = sorted({*means, *(epoch for epoch in evals if epoch == round(epoch) or epoch == last_epoch)})
    return [_epoch_summary(epoch, means.get(epoch), evals.get(epoch)) for epoch in epochs]


def best_evaluation(records: Iterable[Record]) -> EvalRecord | None:
    """The evaluation with the lowest loss, the earliest of equals."""
    return min((r for r in records if isinstance(r, EvalRecord)), key=lambda r: (r.loss, r.step), default=None)


def show_summary(
    records: Iterable[Record], reasons: Sequence[str], *, with_reference: bool, stream: TextIO | None = None
) -> None:
    """Print the table, then the best evaluation. `with_reference`: beside the card's curve and with the reasons why it
    is not comparable; else one short line stands for them."""
    loss_records = [r for r in records if isinstance(r, EpochRecord | EvalRecord)]
    rows, best_eval = summarize_epochs(loss_records), best_evaluation(loss_records)
    stream = stream or sys.stdout
    if is_terminal(stream):
        make_console(stream).print(_table(thin_out(rows, best_eval), best_eval, with_reference))
        lines = []
    else:
        lines = _plain_table(thin_out(rows, best_eval), with_reference)
    if len(rows) > MAX_ROWS:
        lines.append(f"{len(rows)} rows thinned out to {MAX_ROWS}; metrics.jsonl has all of them")
    if best_eval is not None:
        lines.append(
            f"best validation loss {best_eval.loss:.4f} at epoch {_format_epoch(best_eval.epoch)} (step "
            f"{best_eval.step})"
        )
    if reasons and with_reference:
        lines.append("not comparable with the card: " + escape_controls("; ".join(reasons)))
    elif reasons:
        lines.append(f"not comparable with the card {reference.NAME}; launch/compare.py says why")
    print("\n".join(lines), file=stream, flush=True)


def thin_out(rows: list[EpochSummary], best_eval: EvalRecord | None) -> list[EpochSummary]:
    """At most MAX_ROWS of them: the start, the card's epochs, the best, the last, and others evenly in between."""
    if len(rows) <= MAX_ROWS:
        return rows
    fixed_indices = {i for i, row in enumerate(rows) if i in (0, len(rows) - 1) or row.reference_val_loss is not None}
    fixed_indices |= {
        i for i, row in enumerate(rows) if best_eval is not None and row.epoch == _snap_to_whole(best_eval.epoch)
    }
    other_indices = [i for i in range(len(rows)) if i not in fixed_indices]
    num_free = MAX_ROWS - len(fixed_indices)
    return [
        rows[i]
        for i in sorted(fixed_indices | {other_indices[k * len(other_indices) // num_free] for k in range(num_free)})
    ]


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


def _epoch_summary(epoch: float, mean: EpochRecord | None, val: EvalRecord | None) -> EpochSummary:
    """The row of one epoch, for which there is a mean, an evaluation or both."""
    reference_row = next((row for row in reference.CURVE if row.epoch == epoch), None)
    return EpochSummary(
        epoch=epoch,
        step=next(record.step for record in (val, mean) if record),
        train_loss=mean.train_loss if mean else None,
        val_loss=val.loss if val else None,
        perplexity=val.perplexity if val else None,
        reference_train_loss=reference_row.train_loss if reference_row else None,
        reference_val_loss=reference_row.val_loss if reference_row else None,
    )


def _headings(with_reference: bool) -> tuple[str, ...]:
    return HEADINGS if with_reference else HEADINGS[:-2]


def _cells(row: EpochSummary) -> list[str]:
    """The cells of a row under HEADINGS; a table without the reference leaves out the last two."""
    perplexity = "-" if row.perplexity is None else f"{row.perplexity:.{3 if row.perplexity < 1e5 else 0}f}"
    losses = [
        _format_loss(loss) for loss in (row.train_loss, row.val_loss, row.reference_train_loss, row.reference_val_loss)
    ]
    return [_format_epoch(row.epoch), *losses[:2], perplexity, *losses[2:]]


def _table(rows: Sequence[EpochSummary], best_eval: EvalRecord | None, with_reference: bool) -> "Table":
    """The table for a terminal, the best row in bold, the card's columns dim."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    headings = _headings(with_reference)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, style="dim" if heading.startswith("card") else "")
    for row in rows:
        is_best = best_eval is not None and row.val_loss is not None and row.epoch == _snap_to_whole(best_eval.epoch)
        table.add_row(*_cells(row)[: len(headings)], style="bold" if is_best else "")
    return table


def _plain_table(rows: Sequence[EpochSummary], with_reference: bool) -> list[str]:
    """The lines of the table in pipes and dashes, which every log shows and Markdown renders."""
    headings = _headings(with_reference)
    cells = [headings, *(_cells(row)[: len(headings)] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(headings))]
    lines = ["| " + " | ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]]


def _snap_to_whole(epoch: float) -> float:
    """The epoch, made whole where only rounding keeps it from being whole."""
    return float(round(epoch)) if abs(epoch - round(epoch)) < EPOCH_TOLERANCE else epoch


def _format_epoch(epoch: float) -> str:
    return f"{_snap_to_whole(epoch):.2f}".rstrip("0").rstrip(".")


def _format_loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
