"""eval_records/: the loss of every record, whole or not at all, and the reported loss to the last bit."""

import contextlib
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.any_inputs import check_inputs, many_inputs
from hypothesis import strategies as st

from trainer.config.errors import UserError
from trainer.config.files import folder_size
from trainer.tracking.eval_records import (
    EVAL_RECORDS_FOLDER,
    digest_evaluations,
    find_changed_evaluations,
    find_damaged_evaluations,
    read_evaluations,
    rewind_evaluations,
    score_name,
    write_evaluation,
)


def make_rows(num_rows: int = 5) -> pd.DataFrame:
    numbers = [0xAA, *range(num_rows - 2), 0xAA]
    ids = pd.Series([f"{n * 0x9E3779B97F4A7C15 % 2**64:016x}" for n in numbers])  # no more compressible than hashes
    return pd.DataFrame(
        {
            "id": ids,
            "occurrence": ids.groupby(ids).cumcount(),
            "group": ["g", *[None] * (num_rows - 1)],
            "targets": range(1, num_rows + 1),
            "bytes": 7,
            "is_seen": [False] * (num_rows - 1) + [True],
        }
    )


def make_nll(num_rows: int = 5, *, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.lognormvariate(0, 5) for _ in range(num_rows)]


def write(folder: Path, step: int, split: str = "val", *, seed: int = 0) -> None:
    write_evaluation(folder, make_rows(), step=step, split=split, nll=make_nll(seed=seed))


def steps_and_splits(folder: Path) -> list[tuple[int, str]]:
    frame = read_evaluations(folder)
    return list(dict.fromkeys(zip(frame["step"], frame["split"], strict=True)))


def test_the_stored_sums_give_the_reported_loss_to_the_last_bit(tmp_path):
    nll, rows = make_nll(1000), make_rows(1000)
    reported = math.fsum(nll) / rows["targets"].sum()
    write_evaluation(tmp_path, rows, step=3, split="val", nll=nll)
    frame = read_evaluations(tmp_path)
    assert math.fsum(frame["nll"]) / frame["targets"].sum() == reported
    assert list(frame) == ["step", "split", "id", "occurrence", "group", "nll", "targets", "bytes", "is_seen"]
    assert list(frame["nll"]) == nll
    assert not frame.duplicated(["id", "occurrence"]).any(), "equal records are told apart"
    assert frame["occurrence"].iloc[[0, 171, -1]].tolist() == [0, 1, 2]
    assert folder_size(tmp_path) < 25 * len(frame)


ALL = [(0, "retain"), (0, "test"), (0, "val"), (2, "val"), (4, "val")]


@pytest.mark.parametrize(
    ("step", "eval_pending", "num_left"), [(4, False, 5), (4, True, 4), (3, False, 4), (-1, False, 0), (9, False, 5)]
)
def test_a_resumed_run_goes_on_from_the_evaluations_up_to_its_checkpoint(tmp_path, step, eval_pending, num_left):
    for eval_step, split in [*ALL, *((1_000_000, split) for split in ("val", "test", "retain"))]:
        write(tmp_path, eval_step, split)
    (tmp_path / ".step-000002-val.parquet.0123456789ab.tmp").touch()
    rewind_evaluations(tmp_path, step, eval_pending=eval_pending)
    assert steps_and_splits(tmp_path) == ALL[:num_left]
    assert len(list(tmp_path.iterdir())) == num_left, "what a killed process left is removed too"
    rewind_evaluations(tmp_path / "none", 0)


def name(step: int, split: str) -> str:
    return f"step-{step:06d}-{split}.parquet"


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """What another program does to the file that keeps its columns and metadata."""
    pq.write_table(change(pq.ParquetFile(path).read()), path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: rewrite(path, lambda table: table.drop_columns(["bytes"])), "columns step, split, id"),
        (lambda path: rewrite(path, lambda table: table.slice(1)), "changed since they were written"),
        (lambda path: (write(path.parent, 2), (path.parent / name(2, "val")).replace(path)), "rows of val at step 2"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, damage, reason):
    write(tmp_path, 1)
    path = tmp_path / "step-000001-val.parquet"
    damage(path)
    with pytest.raises(UserError, match=r"val.parquet: not whole records of an evaluation \(.*\); move it away") as e:
        read_evaluations(tmp_path)
    assert "\n" not in str(e.value)
    assert reason in str(e.value)
    assert list(find_damaged_evaluations(tmp_path)) == [path]


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations")
    for step in (0, 2):
        write(folder, step, seed=step)
    return folder


@many_inputs(100)
def test_any_damage_to_the_file_is_noticed_when_it_is_read(whole_folder, tmp_path, num_inputs):
    """What is read is what was written, or it is refused; some bytes of the file are neither rows nor their hash."""
    written = read_evaluations(whole_folder)
    shutil.copytree(whole_folder, tmp_path / "x")
    path = tmp_path / "x" / "step-000002-val.parquet"
    whole = path.read_bytes()

    def check(position, damage):
        content = bytearray(whole)
        position %= len(content)
        content[position : position + len(damage)] = damage
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            assert read_evaluations(path.parent).equals(written)

    check_inputs(num_inputs, check, st.integers(0, 10**6), st.binary(min_size=1, max_size=8))


@pytest.mark.parametrize(
    ("damage", "answer"),
    [
        (lambda folder: shutil.rmtree(folder), "it has 0 evaluations where 2 were written"),
        (lambda folder: write(folder, 1), "it has 3 evaluations where 2 were written"),
        (lambda folder: write(folder, 0, seed=9), "an evaluation was changed"),
    ],
)
def test_evaluations_that_are_not_those_of_the_checkpoint_are_known(whole_folder, tmp_path, damage, answer):
    folder = tmp_path / EVAL_RECORDS_FOLDER
    shutil.copytree(whole_folder, folder)
    saved = digest_evaluations(folder)
    write(folder, 4)
    write(folder, 4, "test")
    assert find_changed_evaluations(folder, saved, 2) is None, "what came later is dropped by a resume"
    damage(folder)
    assert answer in (find_changed_evaluations(folder, saved, 2) or "")


def test_texts_and_scores_stand_beside_the_losses_of_the_evaluation_that_has_them(tmp_path):
    write(tmp_path, 0)
    values = {"exact": [1.0, None, 0.0, 1.0, 0.0], score_name("regex:a|b"): [0.25] * 5}
    texts = ["a", "", "x", "\ud7ff \n", "é"]
    write_evaluation(tmp_path, make_rows(), step=4, split="test", nll=make_nll(), texts=texts, scores=values)
    before, scored = (rows for _, rows in read_evaluations(tmp_path).groupby("split", sort=False))
    assert before[["text", "score_exact", "score_regex_a_b"]].isna().all(axis=None)
    assert scored["text"].tolist() == texts
    assert scored["score_exact"].fillna(-1).tolist() == [1.0, -1.0, 0.0, 1.0, 0.0], "no reference is no score of 0"
    assert scored["score_regex_a_b"].tolist() == [0.25] * 5
    assert scored["nll"].tolist() == make_nll()
    path = tmp_path / name(4, "test")
    rewrite(path, lambda table: table.append_column("other", pa.array([1.0] * 5)))
    with pytest.raises(UserError, match=r"columns step, .*other"):
        read_evaluations(tmp_path)
