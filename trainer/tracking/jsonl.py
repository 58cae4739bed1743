"""metrics.jsonl: one row a line, handed to the system before the next step begins, to the disk at the end."""

import os
from pathlib import Path

from trainer.config.errors import RunFailed, UserError
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, from_line, to_line

AFTER_EVALUATION = ("early_stop", "diagnosis", "samples")  # events that an evaluation brings; they come again with it


class JsonlSink:
    """Appends records to `path`; with `resume` a file that already holds rows is continued, else it is refused.

    Each row goes to the system in one call, so a killed process leaves whole rows only. A row that cannot be
    written (full disk, read-only folder) is a RunFailed; one that holds NaN is `to_line`'s ValueError.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and not resume:
                os.close(self._file)
                raise UserError(f"{path} already holds the rows of a run: pass --resume to go on, or another --out")
            if size:
                os.ftruncate(self._file, _whole_lines(path))
        except OSError as problem:
            raise _failed(path, problem) from problem

    def write(self, record: Record) -> None:
        """Append one row; a row that fits only in part is taken back before the error is raised."""
        line = to_line(record).encode() + b"\n"
        try:
            before = os.fstat(self._file).st_size
            written = os.write(self._file, line)
            if written < len(line):
                os.ftruncate(self._file, before)
                raise OSError(28, "No space left on device")
        except OSError as problem:
            raise _failed(self._path, problem) from problem

    def close(self, exit_code: int) -> None:
        """Hand the rows to the disk and let go of the file; a second call does nothing."""
        if self._file < 0:
            return
        file, self._file = self._file, -1
        try:
            os.fsync(file)
        except OSError as problem:
            raise _failed(self._path, problem) from problem
        finally:
            os.close(file)


def rewind(path: Path, step: int, *, pending: bool = False) -> int:
    """Drop the rows after `step` (and an earlier end of the run), so that a resumed run continues them; how many went.

    `pending`: what is due after the step is still to come, so its evaluation and epoch rows go too.

    A run killed between two checkpoints leaves rows of steps that will be done again. The file is replaced
    whole or not at all. A line within it that is no record is a UserError.
    """
    kept, dropped = [], 0
    try:
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                dropped += 1  # cut off by a kill
                continue
            try:
                record = from_line(line.decode())
            except ValueError as problem:
                raise UserError(f"{path}, line {number}: {problem}; cannot resume from a damaged file") from problem
            ended = isinstance(record, EventRecord) and record.event == "finished"
            due = isinstance(record, EvalRecord | EpochRecord) or (
                isinstance(record, EventRecord) and record.event in AFTER_EVALUATION
            )
            again = pending and record.step == step and due
            if record.step > step or ended or again:
                dropped += 1
            else:
                kept.append(line)
        if dropped:
            _replace(path, b"".join(kept))
    except OSError as problem:
        raise _failed(path, problem) from problem
    return dropped


def _replace(path: Path, content: bytes) -> None:
    """Put `content` in the place of the file at once: temporary name, flush, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _whole_lines(path: Path) -> int:
    """The number of bytes up to and with the last newline."""
    return path.read_bytes().rfind(b"\n") + 1


def _failed(path: Path, problem: OSError) -> RunFailed:
    return RunFailed(f"cannot write {path}: {problem.strerror or problem}")
