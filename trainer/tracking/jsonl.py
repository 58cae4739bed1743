"""metrics.jsonl: one row a line, handed to the system before the next step begins, to the disk at the end."""

import errno
import hashlib
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.config.errors import TrainingError, UserError
from trainer.config.files import replace_atomically
from trainer.tracking.records import (
    FINAL_EVALUATIONS,
    EpochRecord,
    EvalRecord,
    EventRecord,
    Record,
    iter_lines,
    iter_records,
    to_line,
)

METRICS_FILE = "metrics.jsonl"
EVALUATION_EVENTS = ("early_stop", "diagnosis", "samples")  # events that an evaluation brings; they come again with it


class JsonlLogger:
    """Appends records to `path`; with `resume` a file that already holds rows is continued, else it is refused.

    Each row goes to the system in one call, so a killed process leaves whole rows only. A row that cannot be
    written (full disk, read-only folder) is a TrainingError; one that holds NaN is `to_line`'s ValueError.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self._path, self._hash, self._num_rows = path, hashlib.sha256(), 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            if os.fstat(self._file).st_size and not resume:
                os.close(self._file)
                raise UserError(
                    f"{path} already holds the rows of a run: pass --resume to go on, or another --output-dir"
                )
            for self._num_rows, line in enumerate(iter_lines(path) if resume else (), start=1):
                self._hash.update(line)
        except OSError as error:
            raise _write_error(path, error) from error

    def log(self, record: Record) -> None:
        """Append one row; a row that fits only in part is taken back before the error is raised."""
        line = to_line(record).encode() + b"\n"
        try:
            old_size = os.fstat(self._file).st_size
            if os.write(self._file, line) < len(line):
                os.ftruncate(self._file, old_size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _write_error(self._path, error) from error
        self._hash.update(line)
        self._num_rows += 1

    def digest(self) -> dict[str, Any]:
        """How many rows there are so far, and the SHA-256 of their bytes; a checkpoint keeps it."""
        return {"num_rows": self._num_rows, "sha256": self._hash.hexdigest()}

    def close(self, exit_code: int) -> None:
        """Hand the rows to the disk and let go of the file; a second call does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            try:
                os.fsync(file)
            except OSError as error:
                raise _write_error(self._path, error) from error
            finally:
                os.close(file)


def find_changed_rows(path: Path, expected: Mapping[str, Any], step: int, *, eval_pending: bool = False) -> str | None:
    """How the rows differ from when the checkpoint of `step` kept their digest, in half a sentence; None where they do
    not.

    Behind those rows there can be events, rows of later steps and, with `eval_pending`, what is due after this one.
    """
    num_rows, rows_hash = 0, hashlib.sha256()
    try:
        for line in islice(iter_lines(path), expected["num_rows"]):
            rows_hash.update(line)
            num_rows += line.endswith(b"\n")
        if num_rows < expected["num_rows"]:
            return f"it has {num_rows} of the {expected['num_rows']} rows that were written"
        if rows_hash.hexdigest() != expected["sha256"]:
            return f"one of its first {num_rows} rows was changed"
        for number, _, record in iter_records(path):
            if isinstance(record, ValueError):
                return f"line {number}: {record}"
            if number > num_rows and record is not None and not isinstance(record, EventRecord):
                is_pending = eval_pending and record.step == step and isinstance(record, EvalRecord | EpochRecord)
                if record.step <= step and not is_pending:
                    return f"line {number}: a row of step {record.step} behind the {num_rows} rows that were written"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error).removeprefix(f"{path}, ")
    return None


def rewind(path: Path, step: int, *, eval_pending: bool = False) -> int:
    """Drop the rows after `step` (and an earlier end of the run), so that a resumed run continues them; how many went.

    `eval_pending`: what is due after the step is still to come, so its evaluation and epoch rows go too.

    A run killed between two checkpoints leaves rows of steps that will be done again, and may leave half a row. The
    file is replaced whole or not at all, and read a line at a time. A line within it that is no record is a UserError.
    """
    num_dropped = 0
    try:
        with replace_atomically(path) as file:
            for number, line, record in iter_records(path):
                if isinstance(record, ValueError):
                    raise ValueError(f"{path}, line {number}: {record}")
                if record is None:
                    num_dropped += 1
                    continue
                event = record.event if isinstance(record, EventRecord) else None
                is_run_end = event == "finished" or (event in FINAL_EVALUATIONS and record.step > 0)
                follows_evaluation = isinstance(record, EvalRecord | EpochRecord) or event in EVALUATION_EVENTS
                if record.step > step or is_run_end or (eval_pending and record.step == step and follows_evaluation):
                    num_dropped += 1
                else:
                    file.write(line)
    except OSError as error:
        raise _write_error(path, error) from error
    except ValueError as error:
        raise UserError(f"{error}; cannot resume from a damaged file") from error
    return num_dropped


def _write_error(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"cannot write {path}: {error.strerror or error}")
