"""eval_records.parquet: the loss of every record at every evaluation, for paired comparisons of runs.

About 20 bytes a row, evaluations in the order of writing. The file carries a list of them and a SHA-256 of its rows,
so that a change is seen whenever it is read; a checkpoint keeps the hash of that list. At most MAX_ROWS rows stay:
where an evaluation goes over them, the oldest ones between the base model's, the best and the newest are left out
(those three and the other splits stay). The file is replaced as a whole: a killed process leaves the old or the new.
"""

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.config.errors import TrainingError, UserError, first_line
from trainer.config.files import write_atomically
from trainer.config.json_file import parse_json
from trainer.tracking.records import EvalRecord, Record

EvalSplit = Literal["val", "test", "retain"]
EVAL_RECORDS_FILE = "eval_records.parquet"
MAX_ROWS = 2_000_000  # about 40 MB
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("occurrence", pa.int32(), nullable=False),
        pa.field("group", pa.string()),
        pa.field("nll", pa.float64(), nullable=False),
        pa.field("targets", pa.int32(), nullable=False),
        pa.field("bytes", pa.int32(), nullable=False),
        pa.field("in_train", pa.bool_(), nullable=False),
    ]
)
_REMEDY = "move the file away, or remove the run"
_MANIFEST_KEY = b"evaluations"  # of the file's own metadata


@dataclass(frozen=True, kw_only=True)
class EvaluationEntry:
    """One evaluation as the file lists it: what it was, the hash of its rows, and whether they are still there."""

    step: int
    split: str
    num_rows: int
    sha256: str
    is_stored: bool = True  #: False once it was left out for MAX_ROWS


@dataclass(frozen=True, kw_only=True)
class EvaluationsDigest:
    """The evaluations of a run so far: how many, and the SHA-256 of what they hold."""

    num_evaluations: int
    sha256: str


@dataclass(frozen=True)
class _Evaluations:
    """The file's content: its list, and the rows of those of the list that are stored, in the same order."""

    entries: list[EvaluationEntry]
    rows: pa.Table

    def filter(self, is_kept: Sequence[bool]) -> "_Evaluations":
        """Without the entries, and their rows, that are not kept."""
        num_rows = [entry.num_rows if entry.is_stored else 0 for entry in self.entries]
        rows = self.rows.filter(pa.array(np.repeat(np.array(is_kept, bool), num_rows)))
        return _Evaluations([entry for kept, entry in zip(is_kept, self.entries, strict=True) if kept], rows)


def evaluation_table(rows: Any, *, step: int, split: EvalSplit, nll: Sequence[float]) -> pa.Table:
    """The rows of one evaluation. `rows`: what is known of each before any model sees it (`data.row_info.RowInfo`);
    `nll`: summed negative log-likelihood of each in nats, in their order."""
    num_rows = len(rows.ids)
    columns = {
        "step": [step] * num_rows,
        "split": [split] * num_rows,
        "id": rows.ids,
        "occurrence": rows.occurrences,
        "group": rows.groups,
        "nll": nll,
        "targets": rows.targets,
        "bytes": rows.num_bytes,
        "in_train": rows.in_train,
    }
    return pa.table(columns, schema=SCHEMA)


class EvalRecordsLogger:
    """Appends the rows of every evaluation of the validation split that a record carries (`EvalRecord.row_nll`)."""

    def __init__(self, folder: Path, rows: Any) -> None:
        self._path, self._rows = folder / EVAL_RECORDS_FILE, rows

    def log(self, record: Record) -> None:
        """Write the rows of an evaluation; other records carry none."""
        if isinstance(record, EvalRecord) and record.row_nll is not None:
            table = evaluation_table(self._rows, step=record.step, split="val", nll=record.row_nll)
            append_evaluation(self._path, table)

    def close(self, exit_code: int) -> None:
        """Nothing is open between two evaluations."""


def append_evaluation(path: Path, table: pa.Table) -> None:
    """Add the rows of one evaluation (one step, one split), in place of an earlier one of the same step and split.

    UserError where the file is damaged, TrainingError where it cannot be written.
    """
    step, split = table["step"][0].as_py(), table["split"][0].as_py()
    evaluations = _read_evaluations(path)
    evaluations = evaluations.filter([(entry.step, entry.split) != (step, split) for entry in evaluations.entries])
    entry = EvaluationEntry(step=step, split=split, num_rows=len(table), sha256=_hash_rows(table))
    _write(path, _thin_out(_Evaluations([*evaluations.entries, entry], pa.concat_tables([evaluations.rows, table]))))


def rewind_evaluations(path: Path, step: int, *, eval_pending: bool = False) -> int:
    """Drop the evaluations after `step`, so that a resumed run continues them; how many went.

    With `eval_pending` also those at `step`. Those of other splits than validation, after the one before the first
    step, are made at a run's end and always come again.
    """
    evaluations = _read_evaluations(path)
    is_kept = [not _comes_again(entry, step, eval_pending) for entry in evaluations.entries]
    if not all(is_kept):
        _write(path, evaluations.filter(is_kept))
    return is_kept.count(False)


def _comes_again(entry: EvaluationEntry, step: int, eval_pending: bool) -> bool:
    is_final = entry.split != "val" and entry.step > 0
    return is_final or entry.step > step or (eval_pending and entry.step == step)


def digest_evaluations(path: Path) -> EvaluationsDigest:
    """Of all evaluations so far; a checkpoint keeps it. Reads the file's list alone. UserError where it is damaged."""
    return _digest(_read_list(path)[0])


def find_changed_evaluations(
    path: Path, expected: EvaluationsDigest, step: int, *, eval_pending: bool = False
) -> str | None:
    """How the file differs from when the checkpoint of `step` was saved, in half a sentence; None where it does not."""
    try:
        entries = _read_evaluations(path).entries
    except UserError as error:
        return str(error).removeprefix(f"{path}: ").removesuffix(f"; {_REMEDY}")
    actual = _digest([entry for entry in entries if not _comes_again(entry, step, eval_pending)])
    if actual == expected:
        return None
    if not path.exists():
        return f"it is gone, with the {expected.num_evaluations} evaluations that were written"
    if actual.num_evaluations != expected.num_evaluations:
        return f"it has {actual.num_evaluations} evaluations where {expected.num_evaluations} were written"
    return "an evaluation was changed"


def read_eval_records(path: Path) -> pa.Table:
    """All rows; UserError where the file is damaged, an empty table where there is none."""
    return _read_evaluations(path).rows


def token_mean(table: pa.Table) -> float:
    """The loss that the rows of one evaluation give: exact sum over exact sum, to the last bit what was reported."""
    return math.fsum(table["nll"].to_pylist()) / sum(table["targets"].to_pylist())


def _read_evaluations(path: Path) -> _Evaluations:
    """The list and the rows, whose hash is that in the file."""
    try:
        entries, sha256 = _read_list(path)
        if not path.exists():
            return _Evaluations([], SCHEMA.empty_table())
        with pq.ParquetFile(path) as file:
            rows = file.read().cast(SCHEMA).combine_chunks()
        if _hash_file(entries, rows) != sha256:
            raise ValueError("changed since they were written (checksum)")
        return _Evaluations(entries, rows)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damage(path, error) from error


def _read_list(path: Path) -> tuple[list[EvaluationEntry], str]:
    """(entries, hash of them and of all rows) by the file's own metadata."""
    try:
        if not path.exists():
            return [], ""
        if not path.is_file():  # a named pipe would be waited for
            raise ValueError("not a regular file")
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
        if schema.names != SCHEMA.names:
            raise ValueError(f"columns {', '.join(schema.names)}")
        manifest = parse_json((schema.metadata or {}).get(_MANIFEST_KEY, b"{}"))
        return [EvaluationEntry(**entry) for entry in manifest["entries"]], str(manifest["sha256"])
    except (KeyError, TypeError):
        raise _damage(path, ValueError("without their own list and hash")) from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damage(path, error) from error


def _damage(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not whole records of evaluations ({first_line(error)}); {_REMEDY}")


def _digest(entries: Sequence[EvaluationEntry]) -> EvaluationsDigest:
    text = json.dumps([[entry.step, entry.split, entry.num_rows, entry.sha256] for entry in entries])
    return EvaluationsDigest(num_evaluations=len(entries), sha256=hashlib.sha256(text.encode()).hexdigest())


def _hash_rows(table: pa.Table, seed: bytes = b"") -> str:
    """SHA-256 of the columns, one after another; of texts their lengths and then themselves."""
    digest = hashlib.sha256(seed)
    for field in SCHEMA:
        column = table[field.name].combine_chunks()
        if pa.types.is_string(field.type):
            lengths = pc.fill_null(pc.binary_length(column), -1)
            digest.update(lengths.to_numpy().tobytes())
            texts = pa.ListArray.from_arrays(pa.array([0, len(column)], pa.int32()), pc.fill_null(column, ""))
            digest.update(pc.binary_join(texts, "")[0].as_buffer())
        else:
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def _hash_file(entries: Sequence[EvaluationEntry], rows: pa.Table) -> str:
    return _hash_rows(rows, json.dumps([vars(entry) for entry in entries]).encode())


def _thin_out(evaluations: _Evaluations) -> _Evaluations:
    """At most MAX_ROWS rows: the oldest evaluations that are neither the base's, the best, nor the newest go."""
    entries, num_rows = evaluations.entries, len(evaluations.rows)
    if num_rows <= MAX_ROWS:
        return evaluations
    losses, start = {}, 0  # of the stored validations, by their place in the list
    for number, entry in enumerate(entries):
        if entry.is_stored:
            if entry.split == "val":
                losses[number] = token_mean(evaluations.rows.slice(start, entry.num_rows))
            start += entry.num_rows
    best, newest = min(losses, key=losses.__getitem__, default=None), max(losses, default=None)
    is_kept = [True] * len(entries)
    for number in losses:
        if num_rows > MAX_ROWS and entries[number].step and number not in (best, newest):
            is_kept[number] = False
            num_rows -= entries[number].num_rows
    listed = [replace(e, is_stored=e.is_stored and kept) for e, kept in zip(entries, is_kept, strict=True)]
    return _Evaluations(listed, evaluations.filter(is_kept).rows)


def _write(path: Path, evaluations: _Evaluations) -> None:
    entries, rows = evaluations.entries, evaluations.rows.combine_chunks()
    manifest = {"entries": [vars(entry) for entry in entries], "sha256": _hash_file(entries, rows)}
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["split", "group", "id"]}
    pq.write_table(rows.replace_schema_metadata({_MANIFEST_KEY: json.dumps(manifest)}), buffer, **options)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
