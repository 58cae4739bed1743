"""What a run prints: the plan, its progress (a bar on a terminal, else a plain line a minute), the table at the end."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from trainer.config import reference
from trainer.config.errors import escape_controls, mask_credentials
from trainer.config.text import format_clock
from trainer.tracking.records import EpochRecord, EvalRecord, Record, StepRecord
from trainer.tracking.safe_stream import SafeStream, escape_lines

if TYPE_CHECKING:
    from rich.console import Console

LINE_INTERVAL_SECONDS = 60.0
HEADINGS = ("epoch", "train loss", "validation loss", "perplexity", "card train", "card val")
EPOCH_TOLERANCE = 1e-6  # an epoch this close to a whole number is one: fractions of steps are floats
FINAL_EVENTS = ("early_stop", "interrupted", "not_finite", "finished")  # events after which no step follows


def make_console(stream: TextIO | None = None) -> "Console":
    """A rich console on `stream` (default: stdout); colours only on a terminal, and none under NO_COLOR."""
    from rich.console import Console

    stream = stream or sys.stdout
    return Console(file=stream, force_terminal=is_terminal(stream), highlight=False)


def is_terminal(stream: "TextIO | SafeStream") -> bool:
    """Whether a bar can be drawn there: a terminal, and not a dumb one."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


class ProgressBar:
    """A logger that shows where a run is; `print_line` puts a line above the bar.

    `total_steps` and `num_epochs` are the length of the whole run. Rows of evaluations, epochs and events are always
    shown, of steps the first, the last and one every `interval` seconds by `clock`.
    """

    def __init__(
        self,
        total_steps: int,
        num_epochs: float,
        *,
        stream: TextIO | None = None,
        interval: float = LINE_INTERVAL_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream: Any = SafeStream(stream or sys.stdout)
        self._total_steps, self._interval, self._clock = total_steps, interval, clock
        self._epochs_text = f"{round(num_epochs, 2):g}" if num_epochs >= 1 else f"{num_epochs:.2g}"
        self._start: tuple[int, float] | None = None  # step and time of the first row, for the time left
        self._last_print_time = -interval  # when the last plain line was printed
        self._pending_line: str | None = None  # a row that was too early to print; the last one is printed at the end
        self._bar: Any = None
        if is_terminal(self._stream):
            self._bar = _make_bar(self._stream, total_steps, self._epochs_text)
            self._bar.start()

    def log(self, record: Record) -> None:
        """Show one record."""
        if isinstance(record, StepRecord):
            self._show_step(record)
        elif isinstance(record, EvalRecord):
            losses = f"validation loss {record.loss:.4f}  perplexity {_format_short(record.perplexity)}"
            self.print_line(f"{self._position('eval', record)}  {losses}")
        elif isinstance(record, EpochRecord):
            self.print_line(f"{self._position('mean', record)}  train loss {record.train_loss:.4f} over the epoch")
        elif record.message:
            if record.event in FINAL_EVENTS:
                self._flush_pending_line()
            self.print_line(record.message)

    def print_line(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(escape_lines(line), markup=False, highlight=False, soft_wrap=True)
        else:
            print(escape_lines(line), file=self._stream, flush=True)

    def close(self, exit_code: int) -> None:
        """Print the row that was held back and let go of the bar; a second call does nothing."""
        self._flush_pending_line()
        if self._bar is not None:
            self._bar.stop()

    def _flush_pending_line(self) -> None:
        if self._pending_line is not None:
            self.print_line(self._pending_line)
            self._pending_line = None

    def _show_step(self, record: StepRecord) -> None:
        now = self._clock()
        time_left = self._time_left(record.step, now)
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=record.step,
                epoch=f"{record.epoch:.2f}",
                loss=f"{record.loss:.4f}",
                lr=f"{record.lr:.1e}",
                speed=_format_short(record.tokens_per_second),
                left=time_left,
                refresh=record.step >= self._total_steps,
            )
            return
        line = (
            f"{self._position('step', record)}  loss {record.loss:.4f}  lr {record.lr:.1e}"
            f"  {_format_short(record.tokens_per_second)} tok/s  {time_left} left"
        )
        if now - self._last_print_time >= self._interval or record.step >= self._total_steps:
            self._last_print_time, self._pending_line = now, None
            self.print_line(line)
        else:
            self._pending_line = line

    def _time_left(self, step: int, now: float) -> str:
        """Hours, minutes and seconds to the last step at the mean speed of this process, `?` at its first step."""
        if self._start is None:
            self._start = (step, now)
        first_step, start_time = self._start
        if step <= first_step:
            return "0:00" if step >= self._total_steps else "?"
        return format_clock((now - start_time) / (step - first_step) * max(0, self._total_steps - step))

    def _position(self, label: str, record: StepRecord | EvalRecord | EpochRecord) -> str:
        """Where the run is: 'step  12/926  epoch 0.04/3'."""
        step = f"{record.step:>{len(str(self._total_steps))}}/{self._total_steps}"
        return f"{label} {step}  epoch {record.epoch:.2f}/{self._epochs_text}"


class LogLines(logging.Handler):
    """Shows what the program's own modules log while a run goes on, above its progress bar; on rank 0 only."""

    def __init__(self, progress_bar: ProgressBar) -> None:
        super().__init__(logging.INFO)
        self._progress_bar = progress_bar
        self._logger = logging.getLogger("trainer")
        self._previous = (self._logger.level, self._logger.propagate)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False  # no second line where the root logger has a handler
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        self._progress_bar.print_line(mask_credentials(record.getMessage()))

    def close(self) -> None:
        """Leave the logging as it was."""
        self._logger.removeHandler(self)
        self._logger.level, self._logger.propagate = self._previous
        super().close()


def _make_bar(stream: Any, total: int, epochs: str) -> Any:
    """A bar with its only task: one line that fits in 80 columns."""
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(template: str) -> TextColumn:
        return TextColumn(template, table_column=Column(no_wrap=True))

    bar = Progress(
        text(f"epoch {{task.fields[epoch]}}/{epochs}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        text("{task.completed}/{task.total}"),
        text("loss [bold]{task.fields[loss]}[/bold]"),
        text("lr {task.fields[lr]}"),
        text("{task.fields[speed]} tok/s"),
        text("{task.fields[left]} left"),
        console=make_console(stream),
        expand=True,
        refresh_per_second=4,
    )
    bar.add_task("", total=total, epoch="0.00", loss="-", lr="-", speed="-", left="?")
    return bar


def _format_short(value: float) -> str:
    """At most five characters for a count or a perplexity: 3.41, 24.9, 950, 12.3k, 1.2M."""
    if value < 10:
        return f"{value:.2f}"
    if value < 100:
        return f"{value:.1f}"
    if value < 1e4:
        return f"{value:.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if value < size * 1e3:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0e}" if value < float("inf") else "inf"


def summarize_epochs(records: Iterable[Record]) -> dict[float, tuple[float | None, ...]]:
    """{epoch: training loss, validation loss, perplexity, and the two losses of the reference}; None: no such number.

    Whole epochs, the start (the base model) and the last evaluation. Other evaluations within an epoch are left out;
    where a resumed run has evaluated twice the later one counts.
    """
    train_losses: dict[float, float] = {}
    evals: dict[float, EvalRecord] = {}
    for record in records:
        if isinstance(record, EpochRecord):
            train_losses[_snap_to_whole(record.epoch)] = record.train_loss
        elif isinstance(record, EvalRecord):
            evals[_snap_to_whole(record.epoch)] = record
    references = {float(row.epoch): (row.train_loss, row.val_loss) for row in reference.CURVE}
    values = {epoch: (record.loss, record.perplexity) for epoch, record in evals.items()}
    last_epoch = max(evals, default=None)
    return {
        epoch: (train_losses.get(epoch), *values.get(epoch, (None, None)), *references.get(epoch, (None, None)))
        for epoch in sorted({*train_losses, *evals})
        if epoch in train_losses or epoch == round(epoch) or epoch == last_epoch
    }


def show_summary(
    records: Iterable[Record], reasons: Sequence[str], *, with_reference: bool, stream: TextIO | None = None
) -> None:
    """Print the table, then the best evaluation. `with_reference`: beside the card's curve and with the reasons why it
    is not comparable; else one short line stands for them."""
    from rich import box
    from rich.table import Table

    stream = stream or sys.stdout
    loss_records = [record for record in records if isinstance(record, EpochRecord | EvalRecord)]
    evals = [record for record in loss_records if isinstance(record, EvalRecord)]
    best_eval = min(evals, key=lambda record: (record.loss, record.step), default=None)
    best_epoch = _format_epoch(best_eval.epoch) if best_eval else None
    table = Table(box=box.SIMPLE_HEAD if is_terminal(stream) else box.MARKDOWN)
    headings = HEADINGS if with_reference else HEADINGS[:-2]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, style="dim" if heading.startswith("card") else "")
    for epoch, values in summarize_epochs(loss_records).items():
        cells = [_format_epoch(epoch), *("-" if value is None else f"{value:.4f}" for value in values)]
        if values[2] is not None:
            cells[3] = f"{values[2]:.{3 if values[2] < 1e5 else 0}f}"
        table.add_row(*cells[: len(headings)], style="bold" if cells[0] == best_epoch else "")
    make_console(stream).print(table)
    lines = []
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


def _snap_to_whole(epoch: float) -> float:
    """The epoch, made whole where only rounding keeps it from being whole."""
    return float(round(epoch)) if abs(epoch - round(epoch)) < EPOCH_TOLERANCE else epoch


def _format_epoch(epoch: float) -> str:
    return f"{_snap_to_whole(epoch):.2f}".rstrip("0").rstrip(".")
