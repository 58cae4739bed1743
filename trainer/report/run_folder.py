"""Reading a run back from its folder: run.json, metrics.jsonl, and where the losses of each record lie."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.errors import UserError
from trainer.config.json_file import parse_json
from trainer.config.run_metadata import read_run_metadata
from trainer.report.run_data import (
    EPOCH_FIELDS,
    EVAL_FIELDS,
    STEP_FIELDS,
    RunData,
    RunReadError,
    RunRecords,
    Series,
    build_run,
    to_series,
)
from trainer.report.series_collector import SeriesCollector
from trainer.tracking.eval_records import EVAL_RECORDS_FILE
from trainer.tracking.records import STEP_PREFIX, iter_lines, to_record

_CHUNK_BYTES = 8_000_000  # of metrics.jsonl at a time


def read_folder(folder: Path) -> RunData:
    """The run of a run folder; RunReadError where settings or rows are missing."""
    try:
        metadata = read_run_metadata(folder / "run.json")
    except UserError as error:
        raise RunReadError(str(error)) from error
    metrics_path, records_path = folder / "metrics.jsonl", folder / EVAL_RECORDS_FILE
    try:
        age_seconds = time.time() - metrics_path.stat().st_mtime
        records = _read_metrics(metrics_path)
    except OSError as error:
        raise RunReadError(f"no metrics: cannot read metrics.jsonl ({error.strerror})") from error
    except ValueError as error:
        raise RunReadError(f"no metrics: {error}") from error
    records = replace(
        records, age_seconds=age_seconds, eval_records_path=records_path if records_path.exists() else None
    )
    return build_run(str(folder), metadata, records)


def _read_metrics(path: Path) -> RunRecords:
    """The rows by kind, and notes on what could not be read; of a long run the means of several steps each."""
    series = SeriesCollector()
    events: list[Mapping[str, Any]] = []
    num_bad, num_cut_off = 0, 0
    for lines in _iter_chunks(path):
        if not lines[-1].endswith(b"\n"):  # rows are written newline last
            lines.pop()
            num_cut_off += 1
        steps, rows, num_bad_here = _parse_lines(lines)
        num_bad += num_bad_here
        series.add(
            steps=steps,
            evals=to_series((row for row in rows if row["kind"] == "eval"), EVAL_FIELDS),
            epochs=to_series((row for row in rows if row["kind"] == "epoch"), EPOCH_FIELDS),
        )
        events += [row for row in rows if row["kind"] == "event"]
    notes = ["its last row was cut off and is left out"] if num_cut_off else []
    if num_bad:
        are = "rows could not be read and are" if num_bad > 1 else "row could not be read and is"
        notes.append(f"{num_bad} {are} left out")
    return series.to_records(events, notes)


def _iter_chunks(path: Path) -> Iterator[list[bytes]]:
    """The lines of a file, some megabytes at a time."""
    lines, size = [], 0
    for line in iter_lines(path):
        lines.append(line)
        size += len(line)
        if size > _CHUNK_BYTES:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


def _parse_lines(lines: list[bytes]) -> tuple[Series, list[dict[str, Any]], int]:
    """Step columns, other rows, and the number of lines that are neither."""
    step_lines = [line for line in lines if line.startswith(STEP_PREFIX)]
    steps = _parse_steps_with_arrow(step_lines)
    rows, num_bad = _parse_json(
        lines if steps is None else (line for line in lines if not line.startswith(STEP_PREFIX))
    )
    step_rows = [row for row in rows if row["kind"] == "step"]
    if steps is not None and step_rows:  # written with other spaces: all one by one, so that their order stands
        rows, num_bad = _parse_json(lines)
        step_rows, steps = [row for row in rows if row["kind"] == "step"], None
    return to_series(step_rows, STEP_FIELDS) if steps is None else steps, rows, num_bad


def _parse_steps_with_arrow(lines: list[bytes]) -> Series | None:
    """Columns of the step rows, about five times as fast as `json`; None where one of them is no JSON."""
    if not lines:
        return to_series([], STEP_FIELDS)
    import pyarrow
    import pyarrow.json

    schema = pyarrow.schema([(name, pyarrow.float64()) for name in STEP_FIELDS])
    options = pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = pyarrow.json.read_json(pyarrow.BufferReader(b"".join(lines)), parse_options=options)
    except pyarrow.ArrowInvalid:
        return None
    if len(table) != len(lines):
        return None
    return {name: table[name].to_numpy().astype(np.float64, copy=False) for name in STEP_FIELDS}


def _parse_json(lines: Iterable[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The rows that can be read, one by one, and the number of those that cannot."""
    rows, num_bad = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            to_record(row)
            rows.append(row)
        except ValueError:
            num_bad += 1
    return rows, num_bad
