"""metrics.jsonl: every row comes back as it was written, and damage is never read as data."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.config.errors import UserError
from trainer.tracking.jsonl import rewind
from trainer.tracking.records import (
    RECORD_CLASSES,
    EpochRecord,
    EvalRecord,
    EventRecord,
    Record,
    StepRecord,
    from_line,
    perplexity,
    read_records,
    to_line,
    to_record,
)

STEP = StepRecord(
    step=7,
    epoch=0.1,
    samples=56,
    tokens=14_336,
    loss=0.1 + 0.2,
    lr=3e-5,
    grad_norm=1e-300,
    tokens_per_second=1e6,
    time=1.5,
)
EVAL = EvalRecord(
    step=7, epoch=1 / 3, samples=56, tokens=14_336, loss=2.0, perplexity=math.exp(2), eval_tokens=99, time=2.0
)
EPOCH = EpochRecord(epoch=1.0, train_loss=2.5, step=70, samples=560, tokens=143_360, time=3.0)
EVENT = EventRecord(
    event="skipped", step=7, message='schräg, "quoted"\nand broken', time=4.0, facts={"scale": [1, None]}
)


@pytest.mark.parametrize("record", [STEP, EVAL, EPOCH, EVENT])
def test_a_record_is_one_line_and_comes_back_equal_to_the_last_bit(record: Record) -> None:
    line = to_line(record)
    assert "\n" not in line
    assert from_line(line.encode()) == record == to_record(json.loads(line))


def test_numbers_of_every_size_come_back_equal_to_the_last_bit() -> None:
    rng = random.Random(0)
    numbers = [
        0.0,
        -1.5,
        5e-324,
        1e-300,
        1.7e308,
        2.0**60,
        *(rng.uniform(1, 10) * 10.0 ** rng.randint(-300, 300) for _ in range(5000)),
    ]
    for number in numbers:
        assert from_line(to_line(replace(STEP, loss=number)).encode()).loss == number  # type: ignore[union-attr]


def test_a_row_of_a_step_in_another_form_is_read_too() -> None:
    line = to_line(STEP).encode()
    assert from_line(line) == from_line(line.replace(b": ", b":")) == from_line(line + b"\n") == STEP


def test_the_fields_of_the_records_are_the_contract() -> None:
    """The names that metrics.jsonl promises to its readers, `kind` first."""
    assert list(json.loads(to_line(STEP))) == [
        "kind",
        "step",
        "epoch",
        "samples",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "time",
    ]
    axes = {"step", "epoch", "samples", "tokens"}
    assert axes | {"loss", "perplexity", "eval_tokens"} <= set(json.loads(to_line(EVAL)))
    assert axes | {"train_loss"} <= set(json.loads(to_line(EPOCH)))
    assert [json.loads(to_line(record))["kind"] for record in (STEP, EVAL, EPOCH, EVENT)] == list(RECORD_CLASSES)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_with_a_non_finite_loss_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line(EpochRecord(epoch=1.0, train_loss=bad, step=1, samples=1, tokens=1, time=0.0))


def test_a_record_field_of_a_later_version_is_ignored() -> None:
    assert from_line(to_line(EPOCH)[:-1].encode() + b', "invented": 1}') == EPOCH


@pytest.mark.parametrize(
    "line", ["", "{", "[]", "3", "null", '{"kind": "later"}', '{"step": 1}', '{"kind": "epoch", "epoch": 1.0}']
)
def test_a_line_that_is_no_record_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not a record|not a whole record|Expecting"):
        from_line(line.encode())


def test_a_last_metrics_line_cut_off_by_a_kill_is_ignored(tmp_path: Path) -> None:
    path, whole = tmp_path / "metrics.jsonl", (to_line(STEP) + "\n").encode()
    for cut in range(1, len(whole)):
        path.write_bytes(whole + whole[:cut])
        assert list(read_records(path)) == [STEP]


def test_a_broken_line_within_a_metrics_file_is_refused_with_file_and_line_and_not_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((to_line(STEP) + "\n" + "half\n" + to_line(STEP) + "\n").encode())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        list(read_records(path))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        rewind(path, 60)


def test_perplexity_is_the_exponential_and_never_overflows() -> None:
    assert perplexity(0.9414) == pytest.approx(2.564, abs=5e-4)  # the card's last row
    assert perplexity(1e4) == math.inf
