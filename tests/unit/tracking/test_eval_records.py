"""eval_records.parquet: the loss of every record, whole or not at all, and the reported loss to the last bit."""

import contextlib
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.any_inputs import check_inputs, many_inputs
from hypothesis import strategies as st

from trainer.config.errors import TrainingError, UserError
from trainer.data.row_info import RowInfo
from trainer.tracking import eval_records
from trainer.tracking.eval_records import (
    EVAL_RECORDS_FILE,
    EvalRecordsLogger,
    EvaluationEntry,
    append_evaluation,
    digest_evaluations,
    evaluation_table,
    find_changed_evaluations,
    read_eval_records,
    rewind_evaluations,
    token_mean,
)
from trainer.tracking.records import EvalRecord, EventRecord


def make_rows(num_rows: int = 5) -> RowInfo:
    return RowInfo(
        ids=["00000000000000aa", *[f"{n:016x}" for n in range(num_rows - 2)], "00000000000000aa"],
        groups=["g", *[None] * (num_rows - 1)],
        targets=list(range(1, num_rows + 1)),
        num_bytes=[7] * num_rows,
        in_train=[False] * (num_rows - 1) + [True],
    )


def make_table(step: int, split: str = "val", *, seed: int = 0, num_rows: int = 5):
    rng = random.Random(seed)
    nll = [rng.uniform(1, 9) for _ in range(num_rows)]
    return evaluation_table(make_rows(num_rows), step=step, split=split, nll=nll)


def steps_and_splits(path: Path) -> list[tuple[int, str]]:
    table = read_eval_records(path)
    return list(dict.fromkeys(zip(table["step"].to_pylist(), table["split"].to_pylist(), strict=True)))


def test_the_stored_sums_give_the_reported_loss_to_the_last_bit(tmp_path):
    rng = random.Random(1)
    nll = [rng.lognormvariate(0, 5) for _ in range(1000)]
    rows = make_rows(1000)
    reported = math.fsum(nll) / sum(rows.targets)
    record = EvalRecord(
        step=3, epoch=0.5, samples=1, tokens=2, loss=reported, perplexity=1.0, eval_tokens=5, time=0.0, row_nll=nll
    )
    logger = EvalRecordsLogger(tmp_path, rows)
    logger.log(record)
    logger.log(EventRecord(event="x", step=3, message="", time=0.0))
    table = read_eval_records(tmp_path / EVAL_RECORDS_FILE)
    assert token_mean(table) == reported
    assert table.column_names == ["step", "split", "id", "occurrence", "group", "nll", "targets", "bytes", "in_train"]
    assert table["nll"].to_pylist() == nll


def test_equal_records_are_told_apart_by_their_occurrence(tmp_path):
    append_evaluation(tmp_path / "x", make_table(0))
    table = read_eval_records(tmp_path / "x")
    assert table["occurrence"].to_pylist() == [0, 0, 0, 0, 1]
    keys = list(zip(table["id"].to_pylist(), table["occurrence"].to_pylist(), strict=True))
    assert len(set(keys)) == len(keys)


def test_an_evaluation_that_is_repeated_replaces_the_earlier_one(tmp_path):
    for seed, step in enumerate((0, 2, 2)):
        append_evaluation(tmp_path / "x", make_table(step, seed=seed))
    assert steps_and_splits(tmp_path / "x") == [(0, "val"), (2, "val")]
    table = read_eval_records(tmp_path / "x")
    assert table["nll"].to_pylist()[5:] == make_table(2, seed=2)["nll"].to_pylist()


@pytest.mark.parametrize(
    ("step", "eval_pending", "remaining"),
    [
        (4, False, [(0, "retain"), (0, "test"), (0, "val"), (2, "val"), (4, "val")]),
        (4, True, [(0, "retain"), (0, "test"), (0, "val"), (2, "val")]),
        (3, False, [(0, "retain"), (0, "test"), (0, "val"), (2, "val")]),
        (-1, False, []),
        (9, False, [(0, "retain"), (0, "test"), (0, "val"), (2, "val"), (4, "val"), (6, "val")]),
    ],
)
def test_a_resumed_run_goes_on_from_the_evaluations_up_to_its_checkpoint(tmp_path, step, eval_pending, remaining):
    path = tmp_path / "x"
    append_evaluation(path, make_table(0, "retain"))
    append_evaluation(path, make_table(0, "test"))
    for eval_step in (0, 2, 4, 6):
        append_evaluation(path, make_table(eval_step))
    append_evaluation(path, make_table(6, "test"))
    append_evaluation(path, make_table(6, "retain"))
    num_dropped = rewind_evaluations(path, step, eval_pending=eval_pending)
    assert steps_and_splits(path) == remaining
    assert num_dropped == 8 - len(remaining)
    assert rewind_evaluations(tmp_path / "none", 0) == 0


def test_the_size_is_bounded_and_the_base_the_best_and_the_newest_evaluations_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_records, "MAX_ROWS", 20)
    path = tmp_path / "x"
    for step, loss in enumerate((9, 8, 1, 7, 6, 5)):
        append_evaluation(path, evaluation_table(make_rows(), step=step, split="val", nll=[float(loss)] * 5))
    assert steps_and_splits(path) == [(0, "val"), (2, "val"), (4, "val"), (5, "val")]


def test_a_row_takes_about_twenty_bytes(tmp_path):
    num_rows = 20_000
    rng = random.Random(3)
    rows = RowInfo(
        ids=[f"{rng.getrandbits(64):016x}" for _ in range(num_rows)],
        groups=[None] * num_rows,
        targets=[rng.randint(10, 60) for _ in range(num_rows)],
        in_train=[False] * num_rows,
        num_bytes=[rng.randint(50, 200) for _ in range(num_rows)],
    )
    nll = [rng.uniform(10, 99) for _ in range(num_rows)]
    append_evaluation(tmp_path / "x", evaluation_table(rows, step=1, split="val", nll=nll))
    assert (tmp_path / "x").stat().st_size / num_rows < 25


@pytest.mark.parametrize("content", [b"", b"PAR1 damaged", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_file_is_one_line(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=r"x: not whole records of evaluations \(.*\); move the file away") as e:
        read_eval_records(tmp_path / "x")
    assert "\n" not in str(e.value)


@many_inputs(200)
def test_any_damage_to_the_file_is_noticed_when_it_is_read(whole_file, num_inputs):
    """What is read is what was written, or it is refused; some bytes of the file are neither rows nor their list."""
    written, path = read_eval_records(whole_file), whole_file.with_name("damaged")

    def check(position, damage):
        content = bytearray(whole_file.read_bytes())
        position %= len(content)
        content[position : position + len(damage)] = damage
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            assert read_eval_records(path).equals(written)

    check_inputs(num_inputs, check, st.integers(0, 10**6), st.binary(min_size=1, max_size=8))


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluations") / "x"
    for step in (0, 2, 4):
        append_evaluation(path, make_table(step, seed=step))
    return path


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """What another program does to the file that keeps its columns and metadata."""
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda path: path.unlink(), "it is gone, with the 2 evaluations"),
        (lambda path: path.write_bytes(b""), "not whole records of evaluations"),
        (lambda path: rewrite(path, lambda table: pa.concat_tables([table, table])), "changed since they were written"),
        (lambda path: rewrite(path, lambda table: table.slice(5)), "changed since they were written"),
        (lambda path: rewrite(path, lambda table: table.replace_schema_metadata()), "without their own list and hash"),
        (lambda path: rewind_evaluations(path, 1), "it has 1 evaluations where 2 were written"),
        (lambda path: append_evaluation(path, make_table(0, seed=9)), "an evaluation was changed"),
    ],
)
def test_evaluations_that_are_not_those_of_the_checkpoint_are_known(whole_file, tmp_path, damage, answer):
    path = tmp_path / "x"
    shutil.copy(whole_file, path)
    rewind_evaluations(path, 2)
    saved = digest_evaluations(path)
    append_evaluation(path, make_table(4))
    append_evaluation(path, make_table(4, "test"))
    assert find_changed_evaluations(path, saved, 2) is None, "what came later is dropped by a resume"
    damage(path)
    assert answer in (find_changed_evaluations(path, saved, 2) or "")


def test_a_list_of_evaluations_outlives_their_rows(tmp_path, monkeypatch):
    """A checkpoint knows evaluations that were left out since."""
    path = tmp_path / "x"
    for step in range(4):
        append_evaluation(path, make_table(step, seed=step))
    saved = digest_evaluations(path)
    monkeypatch.setattr(eval_records, "MAX_ROWS", 15)
    append_evaluation(path, make_table(4, seed=4))
    assert len(steps_and_splits(path)) == 3
    assert find_changed_evaluations(path, saved, 3) is None


def test_the_time_of_an_evaluation_does_not_run_away_with_their_number(tmp_path):
    """Each rewrites the file: the 150th may take a few times the first, not a hundred times."""
    seconds = []
    for step in range(150):
        start = time.process_time()
        append_evaluation(tmp_path / "x", make_table(step))
        seconds.append(time.process_time() - start)
    assert statistics.median(seconds[-20:]) < 6 * statistics.median(seconds[10:30])
    assert (tmp_path / "x").stat().st_size < 150 * 500


@pytest.mark.sweep
def test_what_a_thousand_evaluations_take(tmp_path, capsys):
    tables = [make_table(step, seed=step, num_rows=1000) for step in range(1000)]
    entries = [
        EvaluationEntry(step=step, split="val", num_rows=1000, sha256=eval_records._hash_rows(table))
        for step, table in enumerate(tables)
    ]
    eval_records._write(tmp_path / "x", eval_records._Evaluations(entries, pa.concat_tables(tables)))
    start = time.process_time()
    read_eval_records(tmp_path / "x")
    read_end = time.process_time()
    append_evaluation(tmp_path / "x", make_table(1000, num_rows=1000))
    seconds, size = time.process_time() - read_end, (tmp_path / "x").stat().st_size
    with capsys.disabled():
        costs = f"read and checked in {read_end - start:.2f} s of CPU, the next added in {seconds:.2f} s"
        print(f"\n1,000 evaluations of 1,000 records: {size / 1e6:.1f} MB, {costs}")


def test_a_file_of_other_columns_is_refused(tmp_path):
    pq.write_table(make_table(0).drop_columns(["bytes"]), tmp_path / "x")
    with pytest.raises(UserError, match="not whole records of evaluations"):
        append_evaluation(tmp_path / "x", make_table(1))


def test_a_file_that_cannot_be_written_is_a_training_error_and_leaves_the_old_one(tmp_path, monkeypatch):
    append_evaluation(tmp_path / "x", make_table(0))

    def fail(file_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(TrainingError, match="x: No space left on device"):
        append_evaluation(tmp_path / "x", make_table(1))
    assert steps_and_splits(tmp_path / "x") == [(0, "val")]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_process_killed_while_writing_leaves_whole_evaluations_only(tmp_path):
    code = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
from pathlib import Path
from test_eval_records import append_evaluation, make_table
for step in range(10**6):
    append_evaluation(Path({str(tmp_path / "x")!r}), make_table(step % 40))
    print(step, flush=True)
"""
    for stop_after in (1, 7, 20):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(stop_after):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        table = read_eval_records(tmp_path / "x")
        assert len(table) % 5 == 0
        assert len(table) >= 5
