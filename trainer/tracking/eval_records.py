"""eval_records.parquet: the loss of every record at every evaluation, for paired comparisons of runs.

One row group an evaluation, about 20 bytes a row. At most MAX_ROWS rows stay: where an evaluation goes over them, the
oldest ones between the base model's, the best and the newest are left out (those three and the other splits always
stay). The file is replaced as a whole, so a killed process leaves the old one or the new one.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.errors import TrainingError, UserError
from trainer.tracking.files import write_atomically
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


class EvalRows(Protocol):
    """What is known of each row of an evaluation split before any model sees it (`trainer.data.row_info`)."""

    @property
    def ids(self) -> Sequence[str]:
        """A hash of each record, 16 hex digits."""

    @property
    def occurrences(self) -> Sequence[int]:
        """How many equal rows stand before each."""

    @property
    def groups(self) -> Sequence[str | None]:
        """What keeps rows together as one unit; None for a row that is one by itself."""

    @property
    def targets(self) -> Sequence[int]:
        """Counted tokens."""

    @property
    def num_bytes(self) -> Sequence[int]:
        """UTF-8 bytes of the targets, 0 where the text is not known."""

    @property
    def in_train(self) -> Sequence[bool]:
        """Whether a row equals a training record."""


def evaluation_table(rows: EvalRows, *, step: int, split: EvalSplit, nll: Sequence[float]) -> pa.Table:
    """The rows of one evaluation; `nll`: summed negative log-likelihood of each row in nats, in the rows' order."""
    num_rows = len(rows.ids)
    if len(nll) != num_rows:
        raise ValueError(f"{len(nll)} losses for {num_rows} rows")
    columns = {
        "step": [step] * num_rows, "split": [split] * num_rows, "id": rows.ids, "occurrence": rows.occurrences,
        "group": rows.groups, "nll": nll, "targets": rows.targets, "bytes": rows.num_bytes, "in_train": rows.in_train,
    }  # fmt: skip
    return pa.table(columns, schema=SCHEMA)


class EvalRecordsLogger:
    """Appends the rows of every evaluation of the validation split that a record carries (`EvalRecord.row_nll`)."""

    def __init__(self, folder: Path, rows: EvalRows) -> None:
        self._path, self._rows = folder / EVAL_RECORDS_FILE, rows

    def log(self, record: Record) -> None:
        """Write the rows of an evaluation; other records carry none."""
        if isinstance(record, EvalRecord) and record.row_nll is not None:
            table = evaluation_table(self._rows, step=record.step, split="val", nll=record.row_nll)
            append_evaluation(self._path, table)

    def close(self, exit_code: int) -> None:
        """Nothing is open between two evaluations."""


def append_evaluation(path: Path, table: pa.Table) -> None:
    """Add the rows of one evaluation (one step, one split), in place of an earlier one of the same step and split."""
    step, split = table["step"][0].as_py(), table["split"][0].as_py()
    evaluations = [
        old for old in _read_evaluations(path) if (old["step"][0].as_py(), old["split"][0].as_py()) != (step, split)
    ]
    _write(path, _thin_out([*evaluations, table]))


def rewind_evaluations(path: Path, step: int, *, eval_pending: bool = False) -> int:
    """Drop the evaluations after `step`, so that a resumed run continues them; how many went.

    With `eval_pending` also those at `step`. Those of other splits than validation, after the one before the first
    step, are made at a run's end and always come again.
    """
    evaluations = _read_evaluations(path)
    remaining = [table for table in evaluations if not _comes_again(table, step, eval_pending)]
    if len(remaining) < len(evaluations):
        _write(path, remaining)
    return len(evaluations) - len(remaining)


def _comes_again(table: pa.Table, step: int, eval_pending: bool) -> bool:
    table_step, split = table["step"][0].as_py(), table["split"][0].as_py()
    is_final = split != "val" and table_step > 0
    return is_final or table_step > step or (eval_pending and table_step == step)


def read_eval_records(path: Path) -> pa.Table:
    """All rows; UserError where the file is damaged, an empty table where there is none."""
    evaluations = _read_evaluations(path)
    return pa.concat_tables(evaluations) if evaluations else SCHEMA.empty_table()


def token_mean(table: pa.Table) -> float:
    """The loss that the rows of one evaluation give: exact sum over exact sum, to the last bit what was reported."""
    return math.fsum(table["nll"].to_pylist()) / sum(table["targets"].to_pylist())


def _read_evaluations(path: Path) -> list[pa.Table]:
    """One table an evaluation, in the order of writing."""
    try:
        file = pq.ParquetFile(path)
        if file.schema_arrow.names != SCHEMA.names:
            raise ValueError(f"columns {', '.join(file.schema_arrow.names)}")
        tables = [file.read_row_group(number).cast(SCHEMA) for number in range(file.num_row_groups)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path}: not whole records of evaluations ({reason}); remove the file or the run") from error
    return [table for table in tables if len(table)]


def _thin_out(evaluations: list[pa.Table]) -> list[pa.Table]:
    """At most MAX_ROWS rows: the oldest evaluations that are neither the base's, the best, nor the newest go."""
    num_rows = sum(map(len, evaluations))
    if num_rows <= MAX_ROWS:
        return evaluations
    val_numbers = [n for n, table in enumerate(evaluations) if table["split"][0].as_py() == "val"]
    best = min(val_numbers, key=lambda n: token_mean(evaluations[n]), default=-1)
    removable = [n for n in val_numbers[:-1] if evaluations[n]["step"][0].as_py() and n != best]
    dropped = set()
    for number in removable:
        if num_rows <= MAX_ROWS:
            break
        dropped.add(number)
        num_rows -= len(evaluations[number])
    return [table for number, table in enumerate(evaluations) if number not in dropped]


def _write(path: Path, evaluations: list[pa.Table]) -> None:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["split", "group"]}
    with pq.ParquetWriter(buffer, SCHEMA, **options) as writer:
        for table in evaluations:
            writer.write_table(table, row_group_size=max(len(table), 1))
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
