"""eval_records/: the loss of every record at every evaluation, for paired comparisons of runs.

One Parquet file per evaluation, `step-000120-val.parquet`, about 20 bytes a record. Each file carries a SHA-256 of its
rows, which is checked whenever they are read; a checkpoint keeps a SHA-256 of the bytes of all files so far. The files
of step 0 also have an `excerpt` of each record. With --score the file of the test records at a run's end also has the
generated `text` of each, and its `score_<name>` from 0 to 1 for each scorer (`score_name`), null where a record has no
reference.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.errors import UserError, first_line
from trainer.config.files import open_plain_file, remove_leftovers, write_atomically
from trainer.tracking.records import writing

EvalSplit = Literal["val", "test", "retain"]
EVAL_RECORDS_FOLDER = "eval_records"
COLUMNS = {
    **{"step": pa.int32(), "split": pa.string(), "id": pa.string(), "occurrence": pa.int32(), "group": pa.string()},
    **{"nll": pa.float64(), "targets": pa.int32(), "bytes": pa.int32(), "is_seen": pa.bool_()},
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=name == "group") for name, kind in COLUMNS.items()])
SCORE_PREFIX = "score_"
_TEXTS = ("excerpt", "text")
_FILE_NAME = re.compile(r"step-(\d{6,9})-(val|test|retain)\.parquet")
_CHECKSUM = b"sha256_of_rows"


def score_name(scorer: str) -> str:
    """The name of a scorer in columns and keys: its spelling with `_` for all but letters and digits."""
    return re.sub(r"[^A-Za-z0-9]", "_", scorer)


def write_evaluation(
    folder: Path,
    rows: pd.DataFrame,
    *,
    step: int,
    split: EvalSplit,
    nll: Sequence[float],
    texts: Sequence[str | None] | None = None,
    scores: Mapping[str, Sequence[float | None]] | None = None,
) -> Path:
    """Write the rows of one evaluation, in place of an earlier one of the same step and split; the file. TrainingError
    where it cannot be written.

    `rows`: what is known of each record before any model sees it (`PreparedDataset.row_info`); `nll`: the summed
    negative log-likelihood of each in nats, in their order; `texts`: what was generated for each; `scores`:
    {`score_name` of a scorer: the score of each}.
    """
    table = pa.Table.from_pandas(rows.assign(step=step, split=split, nll=nll), schema=SCHEMA, preserve_index=False)
    if step == 0 and "excerpt" in rows:
        table = table.append_column("excerpt", pa.array(rows["excerpt"], pa.string()))
    if texts is not None:
        table = table.append_column("text", pa.array(texts, pa.string()))
    for name, values in (scores or {}).items():
        table = table.append_column(SCORE_PREFIX + name, pa.array(values, pa.float64()))
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_CHECKSUM: _hash_rows(table)}), buffer, compression="zstd")
    path = folder / f"step-{step:06d}-{split}.parquet"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return path


def read_evaluations(folder: Path, *, val_steps: Container[int] | None = None) -> pd.DataFrame:
    """The rows of all evaluations, by step; empty where there are none. UserError where a file is damaged. `text` and
    `score_<name>` are columns where a file has them, without a value in the rows of the others. `val_steps`: of the
    validation split, read the evaluations at these steps only."""
    tables = [SCHEMA.empty_table()]
    for path, step, split in _list_evaluations(folder):
        if val_steps is None or split != "val" or step in val_steps:
            try:
                tables.append(_read_file(path))
            except ValueError as error:
                raise UserError(f"{path}: {error}; move it away") from error
    return pa.concat_tables(tables, promote_options="default").to_pandas()


def find_damaged_evaluations(folder: Path) -> dict[Path, str]:
    """{file: what is wrong with it} of the evaluations that cannot be read."""
    damaged = {}
    for path, _, _ in _list_evaluations(folder):
        try:
            _read_file(path)
        except ValueError as error:
            damaged[path] = str(error)
    return damaged


def rewind_evaluations(folder: Path, step: int, *, eval_pending: bool = False) -> None:
    """Delete the evaluations that a resumed run makes again: after `step`, with `eval_pending` also at it, and those of
    the test and retained splits after the first step, which belong to a run's end."""
    with writing(folder):
        remove_leftovers(folder)
        for path, eval_step, split in _list_evaluations(folder):
            if _comes_again(eval_step, split, step, eval_pending):
                path.unlink()


def find_changed_evaluations(
    folder: Path, expected: Mapping[str, Any], step: int, *, eval_pending: bool = False
) -> str | None:
    """How the evaluations differ from `expected`, of the checkpoint of `step`, in half a sentence; None: not at all."""
    paths = [path for path, n, split in _list_evaluations(folder) if not _comes_again(n, split, step, eval_pending)]
    if len(paths) != expected["num_evaluations"]:
        return f"it has {len(paths)} evaluations where {expected['num_evaluations']} were written"
    try:
        return None if digest_evaluations(folder, paths) == expected else "an evaluation was changed"
    except OSError as error:
        return f"an evaluation cannot be read: {error.strerror}"


def digest_evaluations(folder: Path, paths: Sequence[Path] | None = None) -> dict[str, Any]:
    """How many evaluations there are, and the SHA-256 of their files' names and hashes; a checkpoint keeps it."""
    paths = [path for path, _, _ in _list_evaluations(folder)] if paths is None else paths
    digest = hashlib.sha256()
    for path in paths:
        with open_plain_file(path) as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return {"num_evaluations": len(paths), "sha256": digest.hexdigest()}


def _list_evaluations(folder: Path) -> list[tuple[Path, int, str]]:
    names = os.listdir(folder) if folder.is_dir() else []
    found = [(folder / match[0], int(match[1]), match[2]) for match in map(_FILE_NAME.fullmatch, names) if match]
    return sorted(found, key=lambda item: item[1:])


def _comes_again(eval_step: int, split: str, step: int, eval_pending: bool) -> bool:
    return (split != "val" and eval_step > 0) or eval_step > step or (eval_pending and eval_step == step)


def _read_file(path: Path) -> pa.Table:
    try:
        with open_plain_file(path) as file:
            table = pq.ParquetFile(file).read()
        names = [name for name in table.schema.names if name in _TEXTS or name.startswith(SCORE_PREFIX)]
        more = [pa.field(name, pa.string() if name in _TEXTS else pa.float64()) for name in names]
        if not table.schema.equals(pa.schema([*SCHEMA, *more])):
            raise ValueError(f"columns {', '.join(table.schema.names)}")
        if (table.schema.metadata or {}).get(_CHECKSUM) != _hash_rows(table):
            raise ValueError("changed since they were written (checksum)")
        steps, splits = (table[name].unique().to_pylist() for name in ("step", "split"))
        if any(f"step-{step:06d}-{split}.parquet" != path.name for step in steps for split in splits):
            raise ValueError(f"rows of {splits[0]} at step {steps[0]}, which its name does not say")
        return table.replace_schema_metadata()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"not whole records of an evaluation ({first_line(error)})") from error


def _hash_rows(table: pa.Table) -> bytes:
    return hashlib.sha256(json.dumps(table.to_pydict()).encode()).hexdigest().encode()
