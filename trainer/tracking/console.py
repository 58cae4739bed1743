"""What a run prints: the plan, its progress (a bar on a terminal, else a plain line a minute), the table at the end."""

import io
import logging
import math
import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Container, Iterable, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from trainer.config import reference
from trainer.config.errors import escape_controls, mask_credentials
from trainer.config.text import format_clock
from trainer.tracking.records import EpochRecord, EvalRecord, OtherEvalRecord, Record, StepRecord

LINE_INTERVAL_SECONDS = 60.0
KEY_WIDTH = 13  # of a plan: the longest key
WARNING_STYLE = "yellow"
#: lines that were printed, without the bar, until a logger takes them
printed_lines: deque[str] = deque(maxlen=1000)
HEADINGS = ("train loss", "validation loss", "perplexity", "card train", "card val")


def is_terminal() -> bool:
    """Whether a bar can be drawn on stdout: a terminal, and not a dumb one."""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def make_console() -> Console:
    """A rich console on stdout; colours only on a terminal, and none under NO_COLOR."""
    width = None if is_terminal() else 1000  # in a file no number is cut to fit
    return Console(file=sys.stdout, force_terminal=is_terminal(), highlight=False, emoji=False, width=width)


class ProgressBar:
    """A logger that shows where a run of `total_steps` and `num_epochs` is: all evaluations, epochs and events; of the
    steps a terminal has a bar with the newest, and anything else a line for the first, the last and one a minute."""

    def __init__(self, total_steps: int, num_epochs: float) -> None:
        self._total_steps = total_steps
        self._epochs_text = f"{round(num_epochs, 2):g}" if num_epochs >= 1 else f"{num_epochs:.2g}"
        self._start: tuple[int, float] | None = None  # step and time of the first row, for the time left
        self._last_print_time = -math.inf  # when the last plain line of a step was due
        self.speeds = array("f")  #: tokens per second of each step of this process
        self._bar: Progress | None = None
        if is_terminal():
            texts = ("epoch {task.fields[epoch]}/" + self._epochs_text, "{task.completed}/{task.total}")
            epoch, step, rest = (
                TextColumn(text, table_column=Column(no_wrap=True)) for text in (*texts, "{task.description}")
            )
            bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4))
            self._bar = Progress(epoch, bar, step, rest, console=make_console(), expand=True, refresh_per_second=4)
            self._bar.add_task("", total=total_steps, epoch="0.00")
            self._bar.start()

    def log(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self._show_step(record)
        elif isinstance(record, EvalRecord | OtherEvalRecord):
            name = f"{record.val_set}: " if isinstance(record, OtherEvalRecord) else ""
            losses = f"{name}validation loss {record.loss:.4f}  perplexity {record.perplexity:.4g}"
            self.print_line(f"{self._position('eval', record)}  {losses}")
        elif isinstance(record, EpochRecord):
            self.print_line(f"{self._position('train', record)}  mean loss {record.train_loss:.4f}")
        elif record.message and record.event != "finished":  # which the lines at the end tell
            self.print_line(record.message, is_warning=record.event == "diagnosis")

    def print_line(self, line: str, *, is_warning: bool = False) -> None:
        """Print one line, above the bar where there is one."""
        line = "warning: " * is_warning + "\n".join(map(escape_controls, line.split("\n")))
        printed_lines.append(line)
        console = make_console() if self._bar is None else self._bar.console
        console.print(line, markup=False, soft_wrap=True, style=WARNING_STYLE if is_warning else None)
        console.file.flush()

    def close(self, exit_code: int) -> None:
        """Let go of the bar; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()

    def _show_step(self, record: StepRecord) -> None:
        now = time.monotonic()
        first_step, start_time = self._start = self._start or (record.step, now)
        steps_left, time_left = max(0, self._total_steps - record.step), "--:--"
        if record.step > first_step or not steps_left:  # else no speed is known yet
            time_left = format_clock((now - start_time) / max(1, record.step - first_step) * steps_left)
        self.speeds.append(record.tokens_per_second)
        text = f"loss {record.loss:.4f}  lr {record.lr:.1e}  {record.tokens_per_second:,.0f} tok/s  ETA {time_left}"
        is_line_due = now - self._last_print_time >= LINE_INTERVAL_SECONDS or not steps_left
        line = f"{self._position('step', record)}  {text}"
        if is_line_due:
            self._last_print_time = now
        if self._bar is not None:
            task, epoch, text = self._bar.task_ids[0], f"{record.epoch:.2f}", text.replace("  ", " ")
            self._bar.update(task, completed=record.step, description=text, epoch=epoch, refresh=not steps_left)
            printed_lines.extend([line] * is_line_due)  # for W&B's Logs, which are not to depend on the terminal
        elif is_line_due:
            self.print_line(line)

    def _position(self, label: str, record: StepRecord | EvalRecord | OtherEvalRecord | EpochRecord) -> str:
        step = f"{record.step:>{len(str(self._total_steps))}}/{self._total_steps}"
        return f"{label:<5} {step}  epoch {record.epoch:.2f}/{self._epochs_text}"


class LogLines(logging.Handler):
    """Shows what the program's own modules log while a run goes on, above its progress bar; on rank 0 only."""

    def __init__(self, progress_bar: ProgressBar) -> None:
        super().__init__(logging.INFO)
        self._progress_bar, self._logger = progress_bar, logging.getLogger("trainer")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False  # no second line where the root logger has a handler
        self._logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        self._progress_bar.print_line(mask_credentials(record.getMessage()), is_warning=is_warning)

    def close(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True
        super().close()


def show_summary(records: Iterable[Record], reasons: Sequence[str], *, with_reference: bool) -> None:
    """Print a table of every evaluation and of every epoch's train loss, and which evaluation is the best.
    `with_reference`: beside the curve of the reference run, and `reasons` why they are not comparable."""
    headings = HEADINGS if with_reference else HEADINGS[:-2]
    columns: dict[str, dict[int, str]] = {heading: {} for heading in headings}  # {heading: {step: cell}}
    references = {float(row.epoch): row for row in reference.CURVE} if with_reference else {}
    epochs: dict[int, float] = {}
    evals: dict[int, EvalRecord] = {}  # where a resumed run has evaluated twice the later one counts
    for record in records:
        if isinstance(record, EvalRecord):
            evals[record.step] = record
            digits = 3 if record.perplexity < 1e5 else 0
            cells = {"validation loss": f"{record.loss:.4f}", "perplexity": f"{record.perplexity:.{digits}f}"}
        elif isinstance(record, EpochRecord):
            cells = {"train loss": f"{record.train_loss:.4f}"}
        elif isinstance(record, OtherEvalRecord):
            cells = {f"{record.val_set} loss": f"{record.loss:.4f}"}
        else:
            continue
        if row := references.get(float(record.epoch)):
            cells |= {"card train": f"{row.train_loss:.4f}", "card val": f"{row.val_loss:.4f}"}
        epochs[record.step] = record.epoch
        for heading, cell in cells.items():
            columns.setdefault(heading, {})[record.step] = cell
    best = min(evals.values(), key=lambda record: (record.loss, record.step), default=None)

    table = Table(box=box.SIMPLE_HEAD if is_terminal() else box.MARKDOWN)
    for heading in ("step", "epoch", *columns):
        table.add_column(heading, justify="right", no_wrap=not is_terminal())
    for step, epoch in sorted(epochs.items()):
        row_cells = [f"{step:,}", f"{round(epoch, 2):g}", *(column.get(step, "-") for column in columns.values())]
        table.add_row(*row_cells, style="bold" if best and step == best.step else "")
    make_console().print(table)
    table.box, text = box.MARKDOWN, io.StringIO()
    Console(file=text, width=1000).print(table)
    printed_lines.extend(line.rstrip() for line in text.getvalue().splitlines())
    if best is not None:
        print(f"best validation loss {best.loss:.4f} at epoch {round(best.epoch, 2):g} (step {best.step})")
    if reasons and with_reference:
        print("not comparable with the card: " + escape_controls("; ".join(reasons)))
    sys.stdout.flush()


def show_plan(sections: Iterable[tuple[str, Sequence[tuple[str, str]]]], set_by_user: Container[str] = ()) -> None:
    """Print the sections of a plan, (heading, lines); a `*` stands before the lines that the user decided."""
    for heading, lines in sections:
        if heading and lines:
            make_console().print(heading, style="bold", markup=False)
            printed_lines.append(heading)
        rows = [(f"{'* ' if key in set_by_user else '  '}{key}", escape_controls(value)) for key, value in lines]
        show_lines(rows, min_width=2 + KEY_WIDTH)


def show_lines(lines: Sequence[tuple[str, str]], min_width: int = 0, *, folds: bool = True) -> None:
    """Print `key  value` lines, the values aligned; the lines of a text go on under its first, as does on a terminal
    what is long, unless `folds` is False: a command is copied whole. Warnings are yellow there, and what the user
    decided is bright."""
    width = max([min_width, *(len(key) for key, _ in lines)])
    grid = Table.grid(Column(width=width, no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for key, value in lines:
        parts = list(map(escape_controls, value.expandtabs(4).split("\n")))
        plain = [f"{key if number == 0 else '':<{width}}  {part}" for number, part in enumerate(parts)]
        printed_lines.extend(plain)
        style = WARNING_STYLE if key.strip() == "warning" else "bold cyan" if key.startswith("* ") else ""
        grid.add_row(Text(key, style="" if style else "bold"), Text("\n".join(parts)), style=style)
        if not is_terminal() or not folds:
            print("\n".join(plain))
    if is_terminal() and folds:
        make_console().print(grid)
    sys.stdout.flush()
