"""Reading a run back from its folder: run.json, metrics.jsonl, and where the losses of each record lie."""

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

from trainer.config.errors import UserError
from trainer.config.run_metadata import read_run_metadata
from trainer.report.run_data import RunData, RunReadError, build_run
from trainer.report.run_records import COLUMN_NAMES, SERIES_CLASSES, RunRecords, Series, split_rows, to_series
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER
from trainer.tracking.records import STEP_PREFIX, EventRecord, Record, StepRecord, from_line, iter_lines


def read_folder(folder: Path) -> RunData:
    """The run of a run folder; RunReadError where settings or rows are missing."""
    try:
        metadata = read_run_metadata(folder / "run.json")
    except UserError as error:
        raise RunReadError(str(error)) from error
    metrics_path, eval_records_path = folder / "metrics.jsonl", folder / EVAL_RECORDS_FOLDER
    try:
        age_seconds = time.time() - metrics_path.stat().st_mtime
        records = _read_metrics(metrics_path)
    except OSError as error:
        raise RunReadError(f"no metrics: cannot read metrics.jsonl ({error.strerror})") from error
    except ValueError as error:
        raise RunReadError(f"no metrics: {error}") from error
    records.age_seconds = age_seconds
    records.eval_records_path = eval_records_path if eval_records_path.exists() else None
    return build_run(str(folder), metadata, records)


def _read_metrics(path: Path) -> RunRecords:
    """The rows by kind, and notes on what could not be read; of a long run the means of several steps each."""
    records, num_bad = RunRecords(), 0
    for lines in split_rows(iter_lines(path), len):
        if not lines[-1].endswith(b"\n"):  # rows are written newline last
            lines.pop()
            records.notes.append("its last row was cut off and is left out")
        steps, others, num_bad_here = _parse_lines(lines)
        num_bad += num_bad_here
        for kind, record_class in SERIES_CLASSES.items():
            rows = to_series((vars(record) for record in others if isinstance(record, record_class)), kind)
            records.add(kind, steps if steps is not None and kind == "step" else rows)
        records.events += [record for record in others if isinstance(record, EventRecord)]
    if num_bad:
        are = "rows could not be read and are" if num_bad > 1 else "row could not be read and is"
        records.notes.append(f"{num_bad} {are} left out")
    return records


def _parse_lines(lines: list[bytes]) -> tuple[Series | None, list[Record], int]:
    """Step columns where they could be read at once, the records read one by one, and the number of other lines."""
    steps = _parse_steps_with_arrow([line for line in lines if line.startswith(STEP_PREFIX)])
    records, num_bad = _parse_json(line for line in lines if steps is None or not line.startswith(STEP_PREFIX))
    if steps is not None and any(isinstance(record, StepRecord) for record in records):
        return None, *_parse_json(lines)  # written with other spaces: all one by one, so that their order stands
    return steps, records, num_bad


def _parse_steps_with_arrow(lines: list[bytes]) -> Series | None:
    """Columns of the step rows, about five times as fast as `json`; None where one of them is no JSON."""
    names = COLUMN_NAMES["step"]
    schema = pa.schema([(name, pa.float64()) for name in names])
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = pa_json.read_json(pa.BufferReader(b"".join(lines)), parse_options=options)
    except pa.ArrowInvalid:
        return None
    if len(table) != len(lines):
        return None
    return {name: table[name].to_numpy().astype(np.float64, copy=False) for name in names}


def _parse_json(lines: Iterable[bytes]) -> tuple[list[Record], int]:
    """The records that can be read, one by one, and the number of lines that cannot."""
    records, num_bad = [], 0
    for line in filter(bytes.strip, lines):
        try:
            records.append(from_line(line))
        except ValueError:
            num_bad += 1
    return records, num_bad
