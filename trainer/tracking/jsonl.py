"""metrics.jsonl: one row a line, handed to the system before the next step begins, to the disk at the end."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import TrainingError, UserError
from trainer.config.files import open_for_append, replace_atomically, write_all
from trainer.tracking.records import (
    EpochRecord,
    EvalRecord,
    EventRecord,
    Record,
    StepRecord,
    from_line,
    iter_lines,
    to_line,
)

METRICS_FILE = "metrics.jsonl"
EVALUATION_EVENTS = ("early_stop", "diagnosis", "samples")  # events that an evaluation brings; they come again with it
# After the first step they are made at a run's end, and again when it is resumed.
FINAL_EVALUATIONS = ("test_evaluation", "retain_evaluation")


@dataclass(frozen=True, kw_only=True)
class RowsDigest:
    """The beginning of a metrics.jsonl: how many rows, and the SHA-256 of their bytes, newlines included."""

    num_rows: int
    sha256: str


class JsonlLogger:
    """Appends records to `path`; with `resume` a file that already holds rows is continued, else it is refused.

    Each row goes to the system in one call, so a killed process leaves whole rows only. A row that cannot be
    written (full disk, read-only folder) is a TrainingError; one that holds NaN is `to_line`'s ValueError.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self._path = path
        self._hash = hashlib.sha256()
        self._num_rows = 0
        try:
            self._file = open_for_append(path)
            size = os.fstat(self._file).st_size
            if size and not resume:
                os.close(self._file)
                raise UserError(
                    f"{path} already holds the rows of a run: pass --resume to go on, or another --output-dir"
                )
            whole_size = 0
            for line in _iter_whole_lines(path) if size else ():
                self._add_to_digest(line)
                whole_size += len(line)
            if whole_size < size:  # the rest is a line that a kill cut off
                os.ftruncate(self._file, whole_size)
        except OSError as error:
            raise _write_error(path, error) from error

    def log(self, record: Record) -> None:
        """Append one row; a row that fits only in part is taken back before the error is raised."""
        line = to_line(record).encode() + b"\n"
        try:
            old_size = os.fstat(self._file).st_size
            num_written = os.write(self._file, line)
            if num_written < len(line):
                os.ftruncate(self._file, old_size)
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise _write_error(self._path, error) from error
        self._add_to_digest(line)

    def digest(self) -> RowsDigest:
        """Of all rows so far; a checkpoint keeps it."""
        return RowsDigest(num_rows=self._num_rows, sha256=self._hash.hexdigest())

    def _add_to_digest(self, line: bytes) -> None:
        self._hash.update(line)
        self._num_rows += 1

    def close(self, exit_code: int) -> None:
        """Hand the rows to the disk and let go of the file; a second call does nothing."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            os.fsync(file)
        except OSError as error:
            raise _write_error(self._path, error) from error
        finally:
            os.close(file)


def find_changed_rows(path: Path, digests: Sequence[RowsDigest]) -> str | None:
    """Which rows are not as they were written, in half a sentence; None where all are.

    `digests`: of the checkpoint that is resumed from and, to narrow the place down, of those before it.
    """
    if not digests:
        return None
    pending = sorted(digests, key=lambda digest: digest.num_rows)
    num_rows, first_suspect, running_hash = 0, 1, hashlib.sha256()
    try:
        lines = _iter_whole_lines(path)
        for expected in pending:
            while num_rows < expected.num_rows and (line := next(lines, None)) is not None:
                running_hash.update(line)
                num_rows += 1
            if num_rows < expected.num_rows or running_hash.hexdigest() != expected.sha256:
                if place := _find_step_gap(path, expected.num_rows):
                    return place
                if num_rows < expected.num_rows:
                    return f"it has {num_rows} of the {pending[-1].num_rows} rows that were written"
                return f"one of lines {first_suspect} to {expected.num_rows} was changed"
            first_suspect = num_rows + 1
    except FileNotFoundError:
        return f"it is gone, with the {pending[-1].num_rows} rows that were written" if pending[-1].num_rows else None
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error).removeprefix(f"{path}, ")
    return None


def _find_step_gap(path: Path, num_rows: int) -> str | None:
    """The first of the rows that is no record, or a step that does not follow the one before it."""
    last_step = 0
    for number, line in enumerate(_iter_whole_lines(path), start=1):
        if number > num_rows:
            return None
        try:
            record = from_line(line)
        except ValueError:
            return f"line {number} is not a record"
        if isinstance(record, StepRecord) or (isinstance(record, EventRecord) and record.event == "skipped_step"):
            if record.step != last_step + 1:
                return f"line {number}: step {record.step} follows step {last_step}"
            last_step = record.step
    return None


def rewind(path: Path, step: int, *, eval_pending: bool = False) -> int:
    """Drop the rows after `step` (and an earlier end of the run), so that a resumed run continues them; how many went.

    `eval_pending`: what is due after the step is still to come, so its evaluation and epoch rows go too.

    A run killed between two checkpoints leaves rows of steps that will be done again. The file is replaced
    whole or not at all, and read a line at a time, with a byte of memory for each. A line within it that is no record
    is a UserError.
    """
    try:
        lines = enumerate(iter_lines(path), start=1)
        keep = bytearray(_is_continued(path, n, line, step, eval_pending) for n, line in lines)
        if not all(keep):
            with replace_atomically(path) as file:
                for is_kept, line in zip(keep, iter_lines(path), strict=True):
                    if is_kept:
                        write_all(file, line)
    except OSError as error:
        raise _write_error(path, error) from error
    except ValueError as error:
        raise UserError(f"{error}; cannot resume from a damaged file") from error
    return keep.count(0)


def _is_continued(path: Path, number: int, line: bytes, step: int, eval_pending: bool) -> bool:
    """Whether a row stays when the run goes on after `step`."""
    if not line.endswith(b"\n"):
        return False  # cut off by a kill
    try:
        record = from_line(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error
    event = record.event if isinstance(record, EventRecord) else None
    is_run_end = event == "finished" or (event in FINAL_EVALUATIONS and record.step > 0)
    follows_evaluation = isinstance(record, EvalRecord | EpochRecord) or event in EVALUATION_EVENTS
    is_repeated = eval_pending and record.step == step and follows_evaluation
    return not (record.step > step or is_run_end or is_repeated)


def _iter_whole_lines(path: Path) -> Iterator[bytes]:
    """The lines that end in a newline: one that a kill cut off can only be the last."""
    return (line for line in iter_lines(path) if line.endswith(b"\n"))


def _write_error(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"cannot write {path}: {error.strerror or error}")
