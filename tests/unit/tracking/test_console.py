"""What a run shows: progress, the plan and the table at the end."""

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from helpers.fake_runs import make_metadata, make_records
from helpers.fake_wandb import child_env

from trainer.config.reference import CURVE, UNKNOWN_REASON, is_asked_for
from trainer.config.text import format_clock
from trainer.tracking.console import ProgressBar, show_plan, show_summary, summarize_epochs
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, StepRecord, perplexity

RECORDS = make_records(make_metadata("lora"))  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end


def make_step_record(step: int) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=step * 3 / 100,
        samples=step * 8,
        tokens=step * 2048,
        loss=2.5,
        lr=3e-5,
        grad_norm=1.0,
        tokens_per_second=12_345.0,
        time=float(step),
    )


def make_eval_record(step: int, epoch: float, loss: float) -> EvalRecord:
    axes = {"step": step, "epoch": epoch, "samples": step * 8, "tokens": step * 2048, "time": float(step)}
    return EvalRecord(**axes, loss=loss, perplexity=perplexity(loss), eval_tokens=100)


def make_epoch_record(step: int, epoch: float, loss: float) -> EpochRecord:
    return EpochRecord(epoch=epoch, train_loss=loss, step=step, samples=step * 8, tokens=step * 2048, time=float(step))


# progress


def render_lines(records: list[Record], seconds: list[float]) -> list[str]:
    """What is shown of these records at these times, of 100 steps."""
    stream, now = io.StringIO(), 0.0
    progress_bar = ProgressBar(100, 3.0, stream=stream, clock=lambda: now)
    for record, now in zip(records, seconds, strict=True):  # noqa: B007 - read by the clock
        progress_bar.log(record)
    progress_bar.close(0)
    return stream.getvalue().splitlines()


def test_plain_progress_lines_come_first_last_and_once_a_minute() -> None:
    lines = render_lines([make_step_record(n) for n in range(1, 101)], [n * 12.0 for n in range(1, 101)])
    assert [int(line.split("/")[0].removeprefix("step")) for line in lines] == [*range(1, 101, 5), 100]


def test_a_plain_progress_line_has_step_loss_speed_and_time_left() -> None:
    lines = render_lines([make_step_record(10), make_step_record(20)], [0.0, 60.0])
    assert lines[0] == "step  10/100  epoch 0.30/3  loss 2.5000  lr 3.0e-05  12.3k tok/s  ? left"
    assert lines[1] == "step  20/100  epoch 0.60/3  loss 2.5000  lr 3.0e-05  12.3k tok/s  8:00 left"  # 80 steps of 6 s
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("epochs", "text"), [(3.0, "3"), (2.5, "2.5"), (40 / 375, "0.11"), (1 + 1 / 3, "1.33"), (0.003, "0.003")]
)
def test_the_number_of_epochs_is_printed_short(epochs: float, text: str) -> None:
    stream = io.StringIO()
    ProgressBar(100, epochs, stream=stream).log(make_step_record(1))
    assert f"epoch 0.03/{text}  loss" in stream.getvalue()


def test_the_last_record_is_shown_when_a_run_ends_early() -> None:
    lines = render_lines([make_step_record(step) for step in (1, 2, 3)], [0.0, 1.0, 2.0])
    assert [line[:10] for line in lines] == ["step   1/1", "step   3/1"]


@pytest.mark.parametrize("event", ["early_stop", "interrupted", "not_finite"])
def test_the_last_record_is_shown_before_the_line_that_ends_the_run(event: str) -> None:
    end = EventRecord(event=event, step=2, message="the end", time=1.0)
    lines = render_lines([make_step_record(1), make_step_record(2), end], [0.0, 1.0, 2.0])
    assert [line[:8] for line in lines] == ["step   1", "step   2", "the end"]


def test_evaluations_means_and_events_are_always_shown() -> None:
    event = EventRecord(event="skipped", step=2, message="step 2 was skipped [overflow]", time=1.0)
    lines = render_lines([make_eval_record(0, 0.0, 3.0), make_epoch_record(2, 1.0, 2.0), event], [0.0, 0.1, 0.2])
    assert lines == [
        "eval   0/100  epoch 0.00/3  validation loss 3.0000  perplexity 20.1",
        "mean   2/100  epoch 1.00/3  train loss 2.0000 over the epoch",
        "step 2 was skipped [overflow]",
    ]


def test_durations_are_printed_as_clock_times() -> None:
    assert [format_clock(s) for s in (0, 7.4, 59.6, 750, 20_530)] == ["0:00", "0:07", "1:00", "12:30", "5:42:10"]


def run_on_terminal(code: str, **variables: str) -> str:
    """What `code` writes on a terminal of 80 columns; it must end within 30 seconds."""
    master_fd, slave_fd = pty.openpty()
    terminal = {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdin=slave_fd, stdout=slave_fd, stderr=slave_fd, env=child_env(**terminal))
    os.close(slave_fd)
    output, deadline = b"", time.monotonic() + 30
    with contextlib.suppress(OSError):  # raised when the other end is closed
        while time.monotonic() < deadline:
            if select.select([master_fd], [], [], 0.5)[0]:
                output += os.read(master_fd, 65536)
    os.close(master_fd)
    try:
        assert child.wait(timeout=10) == 0, output.decode()
    finally:
        child.kill()
    return output.decode()


PROGRESS_BAR_CODE = """
from helpers.fake_runs import make_metadata, make_records
from trainer.tracking import console
progress = console.ProgressBar(19863, 3.0)
progress.print_line("a line [in brackets]")
for record in make_records(make_metadata()):
    progress.log(record)
progress.close(0)
console.show_summary(make_records(make_metadata()), ["other data"], with_reference=True)
"""


def test_a_terminal_shows_one_progress_bar_that_fits_with_lines_above() -> None:
    text = run_on_terminal(PROGRESS_BAR_CODE)
    for part in ("━", "90/19863", "loss", "tok/s", " left", "a line [in brackets]\r\n"):
        assert part in text
    assert text.count("validation loss ") >= 4
    assert text.count("step ") < 5
    frames = re.split("[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert max(map(len, frames)) <= 80
    assert "…" not in text  # nothing was cut off
    assert text.rstrip().endswith("not comparable with the card: other data")


def test_the_no_color_variable_is_respected() -> None:
    assert "\x1b[38;5" in run_on_terminal(PROGRESS_BAR_CODE)
    assert not re.search(r"\x1b\[[39]", run_on_terminal(PROGRESS_BAR_CODE, NO_COLOR="1"))


def test_a_dumb_terminal_gets_plain_progress_lines() -> None:
    assert "\x1b" not in run_on_terminal(PROGRESS_BAR_CODE, TERM="dumb")


# the table at the end


def test_the_summary_table_pairs_epochs_with_the_reference() -> None:
    table = summarize_epochs(RECORDS)
    (epoch_0, start), *rest = table.items()
    assert epoch_0 == 0
    assert start[1] is not None
    assert (start[0], *start[3:]) == (None, None, None)
    assert [(epoch, *row[3:]) for epoch, row in rest] == [(row.epoch, row.train_loss, row.val_loss) for row in CURVE]
    assert all(row[0] is not None and row[2] == perplexity(row[1] or 0) for _, row in rest)


def test_the_summary_table_has_the_last_evaluation_of_each_epoch_only() -> None:
    evals = [make_eval_record(step, step / 10, 3.0 - step / 10) for step in (0, 4, 8, 12, 16)]
    means = [make_epoch_record(10, 0.1 + 0.2 + 0.7, 2.0)]  # a whole epoch but for rounding
    table = summarize_epochs([*evals, *means])
    losses = [(epoch, *row[:2]) for epoch, row in table.items()]
    assert losses == [(0, None, 3.0), (1, 2.0, None), (1.6, None, 1.4)]
    assert table[1.0][4] == CURVE[0].val_loss
    assert table[1.6][4] is None


def test_the_later_of_two_evaluations_of_an_epoch_is_in_the_summary_table() -> None:
    table = summarize_epochs([make_eval_record(10, 1.0, 2.0), make_eval_record(10, 1.0, 1.5)])
    assert [row[1] for row in table.values()] == [1.5]


def test_no_records_give_an_empty_summary_table_and_no_error() -> None:
    stream = io.StringIO()
    show_summary([], [], with_reference=True, stream=stream)
    assert summarize_epochs([]) == {}
    assert "epoch" in stream.getvalue()


def test_the_summary_is_a_plain_table_without_a_terminal_and_names_the_card_where_it_is_asked_for() -> None:
    stream = io.StringIO()
    records = [make_eval_record(0, 0.0, 3.0), make_eval_record(10, 1.0, 2.0), make_epoch_record(10, 1.0, 2.5)]
    show_summary(records, ["other data", "unknown"], with_reference=True, stream=stream)
    assert stream.getvalue().split("\n")[1:-1] == [
        "| epoch | train loss | validation loss | perplexity | card train | card val |",
        "|-------|------------|-----------------|------------|------------|----------|",
        "|     0 |          - |          3.0000 |     20.086 |          - |        - |",
        "|     1 |     2.5000 |          2.0000 |      7.389 |     1.2978 |   1.2262 |",
        " " * 77,
        "best validation loss 2.0000 at epoch 1 (step 10)",
        "not comparable with the card: other data; unknown",
    ]
    stream = io.StringIO()
    show_summary(records, ["other data", "unknown"], with_reference=False, stream=stream)
    assert stream.getvalue().split("\n")[1] == "| epoch | train loss | validation loss | perplexity |"
    assert stream.getvalue().endswith("not comparable with the card gpt2-acled-t2s; launch/compare.py says why\n")


@pytest.mark.parametrize(
    ("preset", "reasons", "is_asked"),
    [
        ("card", ["other data"], True),
        ("demo", ["other data", UNKNOWN_REASON], False),
        ("finetune", [UNKNOWN_REASON], True),
    ],
)
def test_the_card_is_asked_for_by_its_preset_or_by_data_like_its_own(preset, reasons, is_asked) -> None:
    assert is_asked_for(preset, reasons) is is_asked


def test_the_printed_plan_is_aligned() -> None:
    stream = io.StringIO()
    show_plan([("model", "demo-base [tiny]"), ("batch", "8"), ("ZeRO file", "zero1: two ranks")], stream=stream)
    assert stream.getvalue() == "model      demo-base [tiny]\nbatch      8\nZeRO file  zero1: two ranks\n"


# quiet, and what the package costs to import


def test_the_tracking_package_imports_neither_torch_nor_wandb_nor_rich() -> None:
    modules = "console, eval_records, tensorboard_logger, jsonl, profiler, wandb_logger"
    code = f"import sys; from trainer.tracking import {modules}; print({{'torch', 'wandb', 'rich'}} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], env=child_env(), capture_output=True, text=True)
    assert process.stdout == "set()\n"


def test_silencing_drops_the_known_noise_and_keeps_the_rest() -> None:
    code = """
import logging, os, warnings
os.environ["TRANSFORMERS_VERBOSITY"] = "info"
from trainer.tracking.silence import silence_libraries
silence_libraries(); silence_libraries()
logging.basicConfig(level=logging.INFO, format="%(message)s")
deepspeed = logging.getLogger("DeepSpeed")
deepspeed.setLevel(logging.INFO)  # as its import does
deepspeed.warning("noise"); deepspeed.error("trouble")
warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Use another", FutureWarning)
warnings.warn("your disk is nearly full", UserWarning)
assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
"""
    output = subprocess.run([sys.executable, "-c", code], env=child_env(), capture_output=True, text=True).stderr
    assert [word in output for word in ("trouble", "nearly full", "noise", "all_gather")] == [True, True, False, False]
