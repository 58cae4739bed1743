"""What a run shows and leaves on disk: metrics.jsonl, progress, the plan and the table at the end."""

import contextlib
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import child_env
from run_folders import facts, rows

from trainer.config.errors import RunFailed, UserError
from trainer.config.reference import CURVE
from trainer.tracking.console import Progress, clock_time
from trainer.tracking.jsonl import JsonlSink, rewind
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, StepRecord, perplexity, read, to_line
from trainer.tracking.summary import end_rows, show_end, show_plan

ROWS = rows(facts("lora"))  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end
LAST = 90


def step_row(step: int, total: int = 100, **given: Any) -> StepRecord:
    values = {
        "step": step, "epoch": step * 3 / total, "samples": step * 8, "tokens": step * 2048, "loss": 2.5, "lr": 3e-5,
        "grad_norm": 1.0, "tokens_per_second": 12_345.0, "time": float(step),
    }  # fmt: skip
    return StepRecord(**{**values, **given})


def eval_row(step: int, epoch: float, loss: float) -> EvalRecord:
    seen = {"step": step, "epoch": epoch, "samples": step * 8, "tokens": step * 2048, "time": float(step)}
    return EvalRecord(**seen, loss=loss, perplexity=perplexity(loss), eval_tokens=100)


def mean_row(step: int, epoch: float, loss: float) -> EpochRecord:
    return EpochRecord(epoch=epoch, train_loss=loss, step=step, samples=step * 8, tokens=step * 2048, time=float(step))


# metrics.jsonl


def test_each_row_is_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    for number, record in enumerate(ROWS, start=1):
        sink.write(record)
        assert path.read_bytes().count(b"\n") == number
    sink.close(0)
    sink.close(0)
    assert list(read(path)) == ROWS


def test_a_file_with_rows_is_refused_unless_resumed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_line(ROWS[0]) + "\n" + to_line(ROWS[1])[:30])  # the last row was cut off by a kill
    with pytest.raises(UserError, match="already holds the rows of a run: pass --resume"):
        JsonlSink(path)
    sink = JsonlSink(path, resume=True)
    sink.write(ROWS[1])
    sink.close(0)
    assert list(read(path)) == ROWS[:2]


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_line(record) + "\n" for record in ROWS) + '{"kind"')
    kept = [record for record in ROWS if record.step <= 60]
    assert rewind(path, 60) == len(ROWS) - len(kept) + 1
    assert list(read(path)) == kept
    assert rewind(path, 60) == 0


def test_a_finished_run_that_goes_on_is_no_longer_finished(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_line(record) + "\n" for record in ROWS))
    assert rewind(path, LAST) == 1
    assert list(read(path)) == ROWS[:-1]


def test_a_damaged_file_is_not_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_line(ROWS[0]) + "\nhalf\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        rewind(path, 60)


def test_nan_is_refused_and_leaves_no_row(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        sink.write(step_row(1, loss=float("nan")))
    sink.close(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_folder_that_is_not_there_and_a_full_disk_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"cannot write .*metrics\.jsonl: No such file or directory"):
        JsonlSink(tmp_path / "nowhere" / "metrics.jsonl")
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    sink = JsonlSink(Path("/dev/full"))
    with pytest.raises(RunFailed, match="cannot write /dev/full: No space left on device"):
        sink.write(ROWS[0])


def test_a_row_that_fits_only_in_part_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(ROWS[0])
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, line: whole(file, line[:10]))
    with pytest.raises(RunFailed, match="No space left"):
        sink.write(ROWS[1])
    monkeypatch.undo()
    assert list(read(path)) == ROWS[:1]
    assert path.read_bytes().endswith(b"\n")


# progress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(records: list[Record], seconds: list[float], total: int = 100) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(total, 3.0, stream=stream, interval=5.0, clock=clock)
    for record, now in zip(records, seconds, strict=True):
        clock.now = now
        progress.write(record)
    progress.close(0)
    return stream.getvalue().splitlines()


def test_plain_lines_come_first_last_and_every_few_seconds() -> None:
    lines = shown([step_row(n) for n in range(1, 101)], [n * 1.0 for n in range(1, 101)])
    assert [int(line.split("/")[0].removeprefix("step")) for line in lines] == [*range(1, 101, 5), 100]


def test_a_plain_line_says_where_how_and_how_long() -> None:
    lines = shown([step_row(10), step_row(20)], [0.0, 60.0])
    assert lines[0] == "step  10/100  epoch 0.30/3  loss 2.5000  lr 3.0e-05  12.3k tok/s  ? left"
    assert lines[1] == "step  20/100  epoch 0.60/3  loss 2.5000  lr 3.0e-05  12.3k tok/s  8:00 left"  # 80 steps of 6 s
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("epochs", "told"), [(3.0, "3"), (2.5, "2.5"), (40 / 375, "0.11"), (1 + 1 / 3, "1.33"), (0.003, "0.003")]
)
def test_the_length_of_a_run_in_epochs_is_short(epochs: float, told: str) -> None:
    stream = io.StringIO()
    Progress(100, epochs, stream=stream).write(step_row(1))
    assert f"epoch 0.03/{told}  loss" in stream.getvalue()


def test_the_last_row_is_shown_when_a_run_ends_early() -> None:
    lines = shown([step_row(1), step_row(2), step_row(3)], [0.0, 1.0, 2.0])
    assert [line[:10] for line in lines] == ["step   1/1", "step   3/1"]


@pytest.mark.parametrize("event", ["early_stop", "interrupted", "not_finite"])
def test_the_last_row_stands_before_the_word_that_ends_the_run(event: str) -> None:
    end = EventRecord(event=event, step=2, message="the end", time=1.0)
    lines = shown([step_row(1), step_row(2), end], [0.0, 1.0, 2.0])
    assert [line[:8] for line in lines] == ["step   1", "step   2", "the end"]


def test_evaluations_means_and_events_are_always_shown() -> None:
    event = EventRecord(event="skipped", step=2, message="step 2 was skipped [overflow]", time=1.0)
    lines = shown([eval_row(0, 0.0, 3.0), mean_row(2, 1.0, 2.0), event], [0.0, 0.1, 0.2])
    assert lines == [
        "eval   0/100  epoch 0.00/3  validation loss 3.0000  perplexity 20.1",
        "mean   2/100  epoch 1.00/3  train loss 2.0000 over the epoch",
        "step 2 was skipped [overflow]",
    ]


def test_times_read_as_clocks() -> None:
    assert [clock_time(s) for s in (0, 7.4, 59.6, 750, 20_530)] == ["0:00", "0:07", "1:00", "12:30", "5:42:10"]


def test_a_closed_pipe_ends_the_showing_and_not_the_run(tmp_path: Path) -> None:
    code = (
        "import time; from run_folders import facts, rows; from trainer.tracking.console import Progress\n"
        "progress = Progress(90, 3.0, interval=0.0)\n"
        "for record in rows(facts()):\n    progress.write(record); time.sleep(0.002)\n"
        "progress.close(0); open('done', 'w').close()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=child_env()
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith(b"eval")
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == b""
    assert child.wait(timeout=30) == 0
    assert (tmp_path / "done").exists()


def on_a_terminal(code: str, **variables: str) -> str:
    """What `code` writes on a terminal of 80 columns; it must end within 30 seconds."""
    ours, theirs = pty.openpty()
    terminal = {"TERM": "xterm-256color", "COLUMNS": "80", **variables}
    command = [sys.executable, "-c", code]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=child_env(**terminal))
    os.close(theirs)
    written, until = b"", time.monotonic() + 30
    with contextlib.suppress(OSError):  # raised when the other end is closed
        while time.monotonic() < until:
            if select.select([ours], [], [], 0.5)[0]:
                written += os.read(ours, 65536)
    os.close(ours)
    try:
        assert child.wait(timeout=10) == 0, written.decode()
    finally:
        child.kill()
    return written.decode()


BAR = """
from run_folders import facts, rows
from trainer import log
progress = log.Progress(19863, 3.0)
progress.say("a line [in brackets]")
for record in rows(facts()):
    progress.write(record)
progress.close(0)
log.show_end(rows(facts()), ["other data"])
"""


def test_on_a_terminal_there_is_one_bar_that_fits_and_lines_above_it() -> None:
    text = on_a_terminal(BAR)
    assert "━" in text
    assert "90/19863" in text
    assert "loss" in text
    assert "tok/s" in text
    assert " left" in text
    assert "a line [in brackets]\r\n" in text
    assert text.count("validation loss ") >= 4
    assert text.count("step ") < 5
    frames = [strip_escapes(frame) for line in text.split("\n") for frame in line.split("\r")]
    assert max(map(len, frames)) <= 80
    assert "…" not in text  # nothing was cut off
    assert text.rstrip().endswith("not comparable with the card: other data")


def test_no_color_is_respected() -> None:
    assert "\x1b[38;5" in on_a_terminal(BAR)
    assert not any(code in on_a_terminal(BAR, NO_COLOR="1") for code in ("\x1b[38;", "\x1b[3", "\x1b[9"))


def test_a_dumb_terminal_gets_plain_lines() -> None:
    assert "\x1b" not in on_a_terminal(BAR, TERM="dumb")


def strip_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# the table at the end


def test_the_table_pairs_epochs_with_the_card() -> None:
    table = end_rows(ROWS)
    assert [row.epoch for row in table] == [0, 1, 2, 3]
    assert table[0].train_loss is None
    assert table[0].val_loss is not None
    assert table[0].card_val is None
    assert [row.card_val for row in table[1:]] == [row.val_loss for row in CURVE]
    assert [row.card_train for row in table[1:]] == [row.train_loss for row in CURVE]
    assert all(row.train_loss is not None and row.perplexity == perplexity(row.val_loss or 0) for row in table[1:])


def test_evaluations_within_an_epoch_are_left_out_but_the_last() -> None:
    evals = [eval_row(step, step / 10, 3.0 - step / 10) for step in (0, 4, 8, 12, 16)]
    means = [mean_row(10, 0.1 + 0.2 + 0.7, 2.0)]  # a whole epoch but for rounding
    table = end_rows([*evals, *means])
    assert [(row.epoch, row.train_loss, row.val_loss) for row in table] == [
        (0, None, 3.0),
        (1, 2.0, None),
        (1.6, None, 1.4),
    ]
    assert table[1].card_val == CURVE[0].val_loss
    assert table[2].card_val is None


def test_the_later_of_two_evaluations_of_an_epoch_counts() -> None:
    assert [row.val_loss for row in end_rows([eval_row(10, 1.0, 2.0), eval_row(10, 1.0, 1.5)])] == [1.5]


def test_no_record_is_no_row_and_no_error() -> None:
    stream = io.StringIO()
    show_end([], [], stream=stream)
    assert end_rows([]) == []
    assert "epoch" in stream.getvalue()


def test_the_end_is_shown_in_plain_characters_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    show_end(
        [eval_row(0, 0.0, 3.0), eval_row(10, 1.0, 2.0), mean_row(10, 1.0, 2.5)],
        ["other data", "unknown"],
        stream=stream,
    )
    assert stream.getvalue() == (
        "| epoch | train loss | validation loss | perplexity | card train | card val |\n"
        "|------:|-----------:|----------------:|-----------:|-----------:|---------:|\n"
        "|     0 |          - |          3.0000 |     20.086 |          - |        - |\n"
        "|     1 |     2.5000 |          2.0000 |      7.389 |     1.2978 |   1.2262 |\n"
        "best validation loss 2.0000 at epoch 1 (step 10)\n"
        "not comparable with the card: other data; unknown\n"
    )


def test_fifty_epochs_stay_readable_and_keep_what_matters() -> None:
    records: list[Record] = []
    for epoch in range(51):
        records.append(eval_row(epoch * 10, float(epoch), 3.0 - epoch / 20 if epoch < 38 else 2.0 + epoch / 20))
    stream = io.StringIO()
    show_end(records, [], stream=stream)
    epochs = [line.split("|")[1].strip() for line in stream.getvalue().splitlines()[2:] if line.startswith("|")]
    assert len(epochs) == 24
    assert {"0", "1", "2", "3", "37", "50"} <= set(epochs)
    assert "51 rows thinned out to 24; metrics.jsonl has all of them" in stream.getvalue()


def test_the_plan_is_aligned() -> None:
    stream = io.StringIO()
    show_plan([("model", "demo-base [tiny]"), ("batch", "8"), ("ZeRO file", "zero1: two ranks")], stream=stream)
    assert stream.getvalue() == "model      demo-base [tiny]\nbatch      8\nZeRO file  zero1: two ranks\n"


# quiet, and what the package costs to import


def test_the_package_imports_neither_torch_nor_wandb_nor_rich() -> None:
    code = "import sys, trainer.tracking.loggers; print([name for name in ('torch', 'wandb', 'rich') if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], env=child_env(), capture_output=True, text=True).stdout == "[]\n"
    )


def test_quiet_drops_the_known_noise_and_keeps_the_rest() -> None:
    code = """
import logging, os, warnings
os.environ["TRANSFORMERS_VERBOSITY"] = "info"
from trainer.log import quiet
quiet(); quiet()
logging.basicConfig(level=logging.INFO, format="%(message)s")
deepspeed = logging.getLogger("DeepSpeed")
deepspeed.setLevel(logging.INFO)  # as its import does
deepspeed.warning("noise"); deepspeed.error("trouble")
warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Use another", FutureWarning)
warnings.warn("your disk is nearly full", UserWarning)
assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
"""
    said = subprocess.run([sys.executable, "-c", code], env=child_env(), capture_output=True, text=True).stderr
    assert "trouble" in said
    assert "nearly full" in said
    assert "noise" not in said
    assert "all_gather" not in said
