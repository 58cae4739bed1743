"""The rows of metrics.jsonl: on disk before the next step, read back as written, and damage is never read as data."""

import json
import math
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from helpers.fake_runs import make_metadata, make_records, make_run_folder
from hypothesis import strategies as st

from trainer.config.errors import TrainingError, UserError
from trainer.report.run_data import read_folder
from trainer.tracking import records
from trainer.tracking.records import (
    EpochRecord,
    EvalRecord,
    EventRecord,
    JsonlLogger,
    StepRecord,
    find_changed_rows,
    from_line,
    read_records,
    rewind,
    to_line,
)

RECORDS = make_records(make_metadata("lora"))  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end
AXES = {"step": 7, "epoch": 1 / 3, "samples": 56, "tokens": 14_336, "time": 1.0}
STEP = StepRecord(**AXES, loss=0.1 + 0.2, lr=1e-3, grad_norm=1e-300, tokens_per_second=100.0)
EVAL = EvalRecord(**AXES, loss=2.0, perplexity=math.exp(2), eval_tokens=99)
EPOCH = EpochRecord(**AXES, train_loss=2.5)
EVENT = EventRecord(event="e", step=7, message='schräg, "quoted"\nand broken', time=4.0, facts={"scale": [1, None]})


# a record and its line


@pytest.mark.parametrize("record", [STEP, EVAL, EPOCH, EVENT])
def test_a_record_is_one_line_and_comes_back_equal_to_the_last_bit(record):
    line = to_line(record)
    assert "\n" not in line
    fields = "kind step epoch samples tokens loss lr grad_norm tokens_per_second time"  # a contract with readers
    assert record is not STEP or list(json.loads(line)) == fields.split()
    assert from_line(line.encode()) == from_line(line.replace(": ", ":").encode() + b"\n") == record
    assert from_line(line[:-1].encode() + b', "invented": 1}') == record, "of a later version"


@pytest.mark.parametrize(
    "line",
    [
        *("", "[]", "null", '{"kind": "later"}', '{"kind": "epoch"}'),
        *(to_line(replace(STEP, loss=2.0)).replace("2.0", x) for x in ("NaN", "1e999", "9" * 5000)),
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_record_is_refused(line):
    with pytest.raises(ValueError, match=r"."):
        from_line(line.encode())


# writing


def test_each_record_is_on_disk_before_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for number, record in enumerate(RECORDS, start=1):
        logger.log(record)
        assert path.read_bytes().count(b"\n") == number
    logger.close(0)
    logger.close(0)
    assert list(read_records(path)) == RECORDS


def test_a_missing_metrics_folder_and_a_full_disk_are_one_line_and_leave_no_part_of_a_row(tmp_path, monkeypatch):
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: No such file or directory"):
        JsonlLogger(tmp_path / "nowhere" / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log(RECORDS[0])
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, line: whole(file, line[:10]))
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        logger.log(RECORDS[1])
    assert path.read_bytes().endswith(b"\n")
    assert list(read_records(path)) == RECORDS[:1]


# a resume

NUM_STEPS = 30


def write_steps(path: Path, num_steps: int, digest_at: int) -> dict[str, Any]:
    """Write a metrics.jsonl of so many steps; what the checkpoint after one of them knows of it."""
    logger = JsonlLogger(path)
    for step in range(1, num_steps + 1):
        logger.log(replace(STEP, step=step, loss=2.0 + step % 7))
        if step == digest_at:
            digest = logger.digest()
    logger.close(0)
    return digest


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "metrics.jsonl"
    return path, write_steps(path, NUM_STEPS, digest_at=20)


@pytest.mark.parametrize("step", [60, 90])
def test_a_resumed_run_drops_the_records_after_its_checkpoint_and_its_end(step, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_line(record) + "\n" for record in RECORDS) + '{"kind"')
    earlier_records = [record for record in RECORDS[:-1] if record.step <= step]
    assert rewind(path, step) == len(RECORDS) - len(earlier_records) + 1
    assert list(read_records(path)) == earlier_records
    assert rewind(path, step) == 0


ROW_20 = to_line(replace(EVAL, step=20)).encode() + b"\n"
OTHER_20 = ROW_20.replace(b"}", b', "val_set": "b"}')  # of a further set of --val-data
CHANGED = "one of its first 20 rows was changed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.append(b'{"kind": "st'), None),
        (lambda lines: lines.extend(lines), "line 31: a row of step 1 after one of step 30"),
        (lambda lines: lines.append(lines[-1]), "line 31: a row of step 30 after one of step 30"),
        (
            lambda lines: lines.insert(20, ROW_20 + OTHER_20),
            "line 21: a row of step 20 behind the 20 rows that were written",
        ),
        (lambda lines: lines.pop(14), CHANGED),
        (lambda lines: lines.clear(), "it has 0 of the 20 rows that were written"),
        (lambda lines: lines.insert(14, b"x" * 5000 + b"\n"), "line 15: longer than 1,000 bytes"),
        (None, "it cannot be read: No such file or directory"),
    ],
)
def test_rows_that_are_not_those_of_the_checkpoint_are_known_whatever_came_later(written, change, message, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1000)
    path, digest = written
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    if change:
        change(lines)
        path.write_bytes(b"".join(lines))
    assert find_changed_rows(path, digest, 20) == message
    if change and "step 20" in (message or ""):
        assert find_changed_rows(path, digest, 20, eval_pending=True) is None, "what was due after the checkpoint"
        assert rewind(path, 20, eval_pending=True) == 12


def test_rows_are_continued_by_a_resume_only_and_their_hash_goes_on(written):
    path, _ = written
    path.write_bytes(path.read_bytes() + b'{"kind": "st')  # cut off by a kill
    with pytest.raises(UserError, match="already holds the rows of a run: pass --resume"):
        JsonlLogger(path)
    assert rewind(path, NUM_STEPS) == 1
    logger = JsonlLogger(path, resume=True)
    logger.log(replace(STEP, step=NUM_STEPS + 1))
    logger.close(0)
    assert [record.step for record in read_records(path)] == list(range(1, NUM_STEPS + 2))
    assert find_changed_rows(path, logger.digest(), NUM_STEPS + 1) is None


# reading whatever a file holds


@pytest.fixture(scope="module")
def long_file(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A megabyte of rows."""
    path = tmp_path_factory.mktemp("long") / "metrics.jsonl"
    return path, write_steps(path, 5_000, digest_at=5_000)


READERS = {
    "checked against its checkpoint": lambda path, digest: find_changed_rows(path, digest, 5_000),
    "cut": lambda path, digest: rewind(path, 4_900),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_long_file_takes_a_bounded_memory_when_it_is(reader, long_file, tmp_path):
    source, digest = long_file
    (tmp_path / "metrics.jsonl").write_bytes(source.read_bytes())
    (tmp_path / "run.json").write_text(json.dumps(make_metadata("full")))
    read_folder(make_run_folder(tmp_path / "short"))  # what it imports is no matter here
    tracemalloc.start()
    try:
        READERS[reader](tmp_path / "metrics.jsonl", digest)
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()


ROWS = [json.loads(to_line(record)) for record in (STEP, EVENT, EVAL)]
LINES = st.builds(
    lambda row, edits: json.dumps({**row, **{key: edits[key] for key in edits if key in row}}).encode(),
    st.sampled_from(ROWS),
    st.dictionaries(st.sampled_from(sorted({*ROWS[0], *ROWS[1], *ROWS[2]})), JSON_VALUES),
)


@many_inputs(100)
def test_no_content_of_a_metrics_file_ends_in_a_traceback(num_inputs, tmp_path):
    path = tmp_path / "metrics.jsonl"

    def check(lines):
        path.write_bytes(b"\n".join(lines))
        try:
            list(read_records(path))
        except ValueError:
            with pytest.raises(UserError, match="line"):
                rewind(path, 0)
        else:
            rewind(path, 0)

    check_inputs(num_inputs, check, st.lists(LINES | st.binary(max_size=30), max_size=4))
