"""Progress of a run in one voice: a bar on a terminal, a plain line a minute where there is none."""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from trainer.config.credentials import mask_credentials
from trainer.tracking.records import EpochRecord, EvalRecord, Record, StepRecord
from trainer.tracking.safe_stream import SafeStream, escape_lines

if TYPE_CHECKING:
    from rich.console import Console

LINE_INTERVAL_SECONDS = 60.0
FINAL_EVENTS = ("early_stop", "interrupted", "not_finite", "finished")  # events after which no step follows


def make_console(stream: TextIO | None = None) -> "Console":
    """A rich console on `stream` (left out: stdout); colours only on a terminal, and none under NO_COLOR."""
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
        return format_duration((now - start_time) / (step - first_step) * max(0, self._total_steps - step))

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


def format_duration(seconds: float) -> str:
    """0:07, 12:30 or 5:42:10."""
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


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
