"""What a run shows: progress, the plan and the table at the end."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.fake_wandb import child_env

from trainer.config.text import format_clock
from trainer.tracking.console import ProgressBar, show_lines, show_plan, show_summary
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, StepRecord, perplexity


def axes(step: int, epoch: float) -> dict[str, float]:
    return {"step": step, "epoch": epoch, "samples": step * 8, "tokens": step * 2048, "time": float(step)}


def step_record(step: int) -> StepRecord:
    return StepRecord(**axes(step, step * 0.03), loss=2.5, lr=3e-5, grad_norm=1.0, tokens_per_second=12_345.0)


def eval_record(step: int, epoch: float, loss: float) -> EvalRecord:
    return EvalRecord(**axes(step, epoch), loss=loss, perplexity=perplexity(loss), eval_tokens=100)


@pytest.fixture
def show(monkeypatch, capsys):
    """The lines that are shown of records that come at these times."""

    def show(records, seconds, num_epochs=3.0):
        times = iter(seconds)
        monkeypatch.setattr("trainer.tracking.console.time", SimpleNamespace(monotonic=lambda: next(times)))
        progress_bar = ProgressBar(100, num_epochs)
        for record in records:
            progress_bar.log(record)
        progress_bar.close(0)
        return capsys.readouterr().out.splitlines()

    return show


def test_plain_progress_lines_come_first_last_and_once_a_minute_with_speed_and_time_left(show):
    lines = show([step_record(n) for n in range(1, 101)], [n * 12.0 for n in range(1, 101)])
    assert [int(line.split("/")[0].removeprefix("step")) for line in lines] == [*range(1, 101, 5), 100]
    assert show([step_record(10), step_record(20)], [0.0, 60.0]) == [
        "step   10/100  epoch 0.30/3  loss 2.5000  lr 3.0e-05  12,345 tok/s  ETA --:--",
        "step   20/100  epoch 0.60/3  loss 2.5000  lr 3.0e-05  12,345 tok/s  ETA 8:00",  # 80 steps of 6 s
    ]
    assert [format_clock(s) for s in (0, 7.4, 59.6, 750, 20_530)] == ["0:00", "0:07", "1:00", "12:30", "5:42:10"]


PROGRESS_BAR_CODE = """
from helpers.fake_runs import make_metadata, make_records
from trainer.tracking import console
progress = console.ProgressBar(19863, 3.0)
progress.print_line("a line [in brackets]")
for record in make_records(make_metadata()):
    progress.log(record)
progress.close(0)
console.show_summary(make_records(make_metadata()), ["other data"], with_reference=True)
log = "\\n".join(console.printed_lines)
assert "a line [in brackets]" in log and "validation loss" in log and "\\x1b" not in log and "\\r" not in log, log
"""


def run_on_terminal(**variables: str) -> str:
    """What PROGRESS_BAR_CODE writes on a terminal of 80 columns; it must end within 30 seconds."""
    master_fd, slave_fd = pty.openpty()
    environ = child_env(**{"TERM": "xterm-256color", "COLUMNS": "80", **variables})
    command = [sys.executable, "-c", PROGRESS_BAR_CODE]
    child = subprocess.Popen(command, stdin=slave_fd, stdout=slave_fd, stderr=slave_fd, env=environ)
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


def test_a_terminal_shows_one_progress_bar_that_fits_with_lines_above():
    text = run_on_terminal()
    for part in ("━", "90/19863", "loss", "tok/s", "ETA ", "a line [in brackets]\r\n", "\x1b[38;5"):
        assert part in text
    assert text.count("validation loss ") >= 4
    assert text.count("step ") < 5
    frames = re.split("[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert max(map(len, frames)) <= 80
    assert "…" not in text  # nothing was cut off
    assert text.rstrip().endswith("not comparable with the card: other data")


def test_no_bar_and_no_colour_are_shown_on_a_dumb_terminal():
    assert "\x1b" not in run_on_terminal(TERM="dumb")


def test_the_summary_has_every_evaluation_beside_the_epochs_and_of_the_card_only_where_it_is_asked(capsys, monkeypatch):
    evals = [eval_record(step, step / 10, abs(1.6 - step / 10) + 1.4) for step in (0, 4, 10, 16, 19)]
    repeated = eval_record(10, 1.0, 1.9)  # by a resumed run
    mean = EpochRecord(**axes(10, 1.0), train_loss=2.5)
    monkeypatch.setenv("COLUMNS", "40")  # of the shell: a file has no width
    show_summary([*evals, repeated, mean], ["other data", "unknown"], with_reference=True)
    assert capsys.readouterr().out.split("\n")[1:-1] == [
        "| step | epoch | train loss | validation loss | perplexity | card train | card val |",
        "|------|-------|------------|-----------------|------------|------------|----------|",
        "|    0 |     0 |          - |          3.0000 |     20.086 |          - |        - |",
        "|    4 |   0.4 |          - |          2.6000 |     13.464 |          - |        - |",
        "|   10 |     1 |     2.5000 |          1.9000 |      6.686 |     1.2978 |   1.2262 |",
        "|   16 |   1.6 |          - |          1.4000 |      4.055 |          - |        - |",
        "|   19 |   1.9 |          - |          1.7000 |      5.474 |          - |        - |",
        " " * 84,
        "best validation loss 1.4000 at epoch 1.6 (step 16)",
        "not comparable with the card: other data; unknown",
    ]
    show_summary([eval_record(step, step / 100, 2.0) for step in range(300)], ["other data"], with_reference=False)
    output = capsys.readouterr().out
    assert output.count("\n|") == 302, "every one, however many"
    assert "card" not in output


def test_the_printed_plan_has_groups_and_marks_what_the_user_set(capsys):
    how = [("batch", "8"), ("learning rate", "0.1 [linear]")]
    show_plan([("", [("run", "lora")]), ("How", how), ("Notes", []), ("", [("warning", "w")])], {"learning rate"})
    assert capsys.readouterr().out == (
        "  run            lora\nHow\n  batch          8\n* learning rate  0.1 [linear]\n  warning        w\n"
    )


def test_a_text_keeps_its_lines_under_one_another(capsys):
    show_lines([("prompt", "a\nc\n\tb\x1b[2J"), ("base (gpt2)", "c")])
    assert capsys.readouterr().out == "prompt       a\n             c\n                 b\\x1b[2J\nbase (gpt2)  c\n"


def test_a_warning_is_yellow_on_a_terminal_only_in_the_plan_and_above_the_bar(capsys, monkeypatch):
    diagnosis = EventRecord(event="diagnosis", step=1, message="not learning", time=1.0)
    for is_terminal in (False, True):
        monkeypatch.setattr("trainer.tracking.console.is_terminal", lambda: is_terminal)  # noqa: B023
        show_plan([("", [("note", "a")]), ("", [("warning", "b")])])
        progress_bar = ProgressBar(100, 3.0)
        progress_bar.log(diagnosis)
        progress_bar.close(0)
        output = capsys.readouterr().out
        assert ("\x1b[33m  warning" in output) is ("\x1b[33mwarning: not learning" in output) is is_terminal
        assert "warning: not learning" in output


def test_silencing_drops_the_known_noise_and_keeps_the_rest_and_tracking_imports_neither_torch_nor_wandb():
    code = """
import logging, os, sys, warnings
from trainer.tracking import console, eval_records, records, wandb_logger
assert not {"torch", "wandb"} & set(sys.modules)
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
    process = subprocess.run([sys.executable, "-c", code], env=child_env(), capture_output=True, text=True)
    words = ("trouble", "nearly full", "noise", "all_gather")
    assert [word in process.stderr for word in words] == [True, True, False, False]
    assert process.returncode == 0, process.stderr
