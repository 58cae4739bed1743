"""metrics.jsonl: one row a line, handed to the system before the next step begins, to the disk at the end."""

import os
from pathlib import Path

from trainer.config.errors import TrainingError, UserError
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, from_line, to_line

EVALUATION_EVENTS = ("early_stop", "diagnosis", "samples")  # events that an evaluation brings; they come again with it
FINAL_EVALUATIONS = ("test_evaluation",)  # after the first step they are made at a run's end, and again when resumed


class JsonlLogger:
    """Appends records to `path`; with `resume` a file that already holds rows is continued, else it is refused.

    Each row goes to the system in one call, so a killed process leaves whole rows only. A row that cannot be
    written (full disk, read-only folder) is a TrainingError; one that holds NaN is `to_line`'s ValueError.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and not resume:
                os.close(self._file)
                raise UserError(
                    f"{path} already holds the rows of a run: pass --resume to go on, or another --output-dir"
                )
            if size:
                os.ftruncate(self._file, _complete_lines_size(path))
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


def rewind(path: Path, step: int, *, eval_pending: bool = False) -> int:
    """Drop the rows after `step` (and an earlier end of the run), so that a resumed run continues them; how many went.

    `pending`: what is due after the step is still to come, so its evaluation and epoch rows go too.

    A run killed between two checkpoints leaves rows of steps that will be done again. The file is replaced
    whole or not at all. A line within it that is no record is a UserError.
    """
    remaining_lines, num_dropped = [], 0
    try:
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                num_dropped += 1  # cut off by a kill
                continue
            try:
                record = from_line(line.decode())
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}; cannot resume from a damaged file") from error
            is_run_end = isinstance(record, EventRecord) and (
                record.event == "finished" or (record.event in FINAL_EVALUATIONS and record.step > 0)
            )
            follows_evaluation = isinstance(record, EvalRecord | EpochRecord) or (
                isinstance(record, EventRecord) and record.event in EVALUATION_EVENTS
            )
            is_repeated = eval_pending and record.step == step and follows_evaluation
            if record.step > step or is_run_end or is_repeated:
                num_dropped += 1
            else:
                remaining_lines.append(line)
        if num_dropped:
            replace_file(path, b"".join(remaining_lines))
    except OSError as error:
        raise _write_error(path, error) from error
    return num_dropped


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of the file at once: temporary name, flush, rename; OSError leaves the old one."""
    temporary_path = path.with_name(path.name + ".tmp")
    try:
        with open(temporary_path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary_path, path)
    except OSError:
        temporary_path.unlink(missing_ok=True)
        raise


def _complete_lines_size(path: Path) -> int:
    """The number of bytes up to and with the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def _write_error(path: Path, error: OSError) -> TrainingError:
    return TrainingError(f"cannot write {path}: {error.strerror or error}")
