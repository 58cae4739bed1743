"""metrics.jsonl: its rows, how they are written and read, and what a resumed run keeps of them.

One JSON object a line, `kind` first, handed to the system before the next step begins, to the disk at the end. `epoch`
is the fraction of the training set seen, `samples` the examples, `tokens` the tokens fed (padding left out); losses are
nats per target token; `time` is seconds since the run began.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeGuard, get_args

from pydantic import SkipValidation, TypeAdapter, ValidationError

from trainer.config.errors import TrainingError, UserError
from trainer.config.fields import Accepts, Float, Int, find_problems
from trainer.config.files import open_plain_file, parse_json, replace_atomically

METRICS_FILE = "metrics.jsonl"
MAX_LINE_BYTES = 2**24  # far above any row; a longer line is no row, and is not read into memory
# After the first step they are made at a run's end, and again when it is resumed; they name the step of the weights.
FINAL_EVALUATIONS = ("test_evaluation", "retain_evaluation", "test_scores", "retain_scores")
EVALUATION_EVENTS = ("early_stop", "diagnosis", "samples")  # events that an evaluation brings; they come again with it
_STEP_PREFIX = b'{"kind": "step"'


@dataclass(frozen=True, kw_only=True)
class _Axes:
    step: Int
    epoch: Float
    samples: Int
    tokens: Int


@dataclass(frozen=True, kw_only=True)
class StepRecord(_Axes):
    """One optimizer step: the token mean of its loss over the global batch, and the gradient norm before clipping."""

    kind: ClassVar = "step"
    loss: Float
    lr: Float
    grad_norm: Float
    tokens_per_second: Float
    time: Float


@dataclass(frozen=True, kw_only=True)
class _Evaluation(_Axes):
    """One pass over a whole validation set; `eval_tokens`: of which the loss is the mean; `bits_per_byte`: the same sum
    over the UTF-8 bytes of the targets, for models with other tokenizers; None where the text is not known."""

    kind: ClassVar = "eval"
    loss: Float
    perplexity: Float
    eval_tokens: Int
    time: Float
    bits_per_byte: Float | None = None


@dataclass(frozen=True, kw_only=True)
class EvalRecord(_Evaluation):
    """Of the validation set by which a run is judged. `row_nll`: each row's sum, for eval_records/; not in the line."""

    row_nll: SkipValidation[Sequence[float] | None] = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class OtherEvalRecord(_Evaluation):
    """Of a further set of --val-data, which decides nothing: the rows of kind `eval` with a `val_set`, its name."""

    val_set: Annotated[str, Accepts("a text")]


@dataclass(frozen=True, kw_only=True)
class EpochRecord(_Axes):
    """The token mean of the training loss over one epoch, as the weights moved."""

    kind: ClassVar = "epoch"
    train_loss: Float
    time: Float


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened: `event` is its name, `message` one line for people, `facts` the rest."""

    kind: ClassVar = "event"
    event: Annotated[str, Accepts("a text")]
    step: Int
    message: Annotated[str, Accepts("a text")]
    time: Float
    facts: dict[str, Any] = field(default_factory=dict)


Record = StepRecord | EvalRecord | OtherEvalRecord | EpochRecord | EventRecord
#: {(kind, whether the row names a `val_set`): the record}
_ADAPTERS = {(cls.kind, cls is OtherEvalRecord): TypeAdapter[Any](cls) for cls in get_args(Record)}


class RecordLogger(Protocol):
    """What takes the records of a run, in order; rank 0 only."""

    def log(self, record: Record) -> None:
        """Take one record."""

    def close(self, exit_code: int) -> None:
        """The run is over; 0 is success."""


def bits_per_byte(nll_sum: float, num_bytes: int) -> float | None:
    """Nats over all targets as bits for each byte of their text; None where the bytes are not known (0)."""
    return nll_sum / math.log(2) / num_bytes if num_bytes else None


def perplexity(loss: float) -> float:
    """exp(loss), infinity where that overflows a float."""
    return math.exp(loss) if loss < 709 else math.inf


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def to_line(record: Record) -> str:
    """One JSON line without its newline. NaN and infinity are refused (ValueError): they must be an event's text."""
    row = {"kind": record.kind, **vars(record)}
    row.pop("row_nll", None)
    return json.dumps(row, allow_nan=False)


def from_line(line: bytes) -> Record:
    """The record of one line; ValueError where it is not one. Unknown fields are left out, for later versions."""
    row = parse_json(line.decode())
    adapter = _ADAPTERS.get((str(row.get("kind")), "val_set" in row)) if isinstance(row, dict) else None
    if adapter is None:
        raise ValueError(f"not a record: {json.dumps(row)[:80]}")
    try:
        record: Record = adapter.validate_python(row)
        return record
    except ValidationError as error:
        problem = next(find_problems(error))
        value = "missing" if problem.is_missing else json.dumps(problem.value)[:80]
        raise ValueError(f"{problem.key} = {value}: expected {problem.expected}") from None


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file of rows, one at a time; ValueError, naming it, for one that is too long to be a row."""
    with open_plain_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes")
            yield line


def iter_records(path: Path, *, with_steps: bool = True) -> Iterator[tuple[int, bytes, Record | None]]:
    """(number, line, its record) of every line; None for a last one that a kill cut off. ValueError, with file and
    line, for one that is wrong.

    The rows of a run never step back, and only events repeat a step: a row that does is wrong, as where a file was
    appended to itself. `with_steps`: False leaves out the rows of steps, nearly all of a long run, unread.
    """
    last_steps: dict[tuple[str, str | None], int] = {}
    for number, line in enumerate(iter_lines(path), start=1):
        if not line.endswith(b"\n"):  # rows are written newline last: this one was not finished
            yield number, line, None
        elif with_steps or not line.startswith(_STEP_PREFIX):
            try:
                record = from_line(line)
                if not isinstance(record, EventRecord) or record.event not in FINAL_EVALUATIONS:
                    last_step = max(last_steps.values(), default=-1)
                    key = (record.kind, getattr(record, "val_set", None))
                    is_second = record.kind != "event" and record.step == last_steps.get(key)
                    if record.step < last_step or is_second:
                        raise ValueError(f"a row of step {record.step} after one of step {last_step}")
                    last_steps[key] = record.step
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            yield number, line, record


def read_records(path: Path, *, with_steps: bool = True) -> Iterator[Record]:
    """The records of `iter_records`, but for a line that was cut off."""
    return (record for _, _, record in iter_records(path, with_steps=with_steps) if record is not None)


class JsonlLogger:
    """Appends records to `path`; with `resume` a file that already holds rows is continued, else it is refused. Each
    row goes to the system in one call, so a killed process leaves whole rows only. A row that cannot be written is a
    TrainingError; one that holds NaN is `to_line`'s ValueError."""

    def __init__(self, path: Path, resume: bool = False) -> None:
        self._path, self._hash, self._num_rows = path, hashlib.sha256(), 0
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            if os.fstat(self._file).st_size and not resume:
                os.close(self._file)
                problem = "already holds the rows of a run: pass --resume to go on, or another --output-dir"
                raise UserError(f"{path} {problem}")
            for self._num_rows, line in enumerate(iter_lines(path) if resume else (), start=1):
                self._hash.update(line)

    def log(self, record: Record) -> None:
        """Append one row; a row that fits only in part is taken back before the error is raised."""
        line = to_line(record).encode() + b"\n"
        with writing(self._path):
            old_size = os.fstat(self._file).st_size
            if os.write(self._file, line) < len(line):
                os.ftruncate(self._file, old_size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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
                with writing(self._path):
                    os.fsync(file)
            finally:
                os.close(file)


def find_changed_rows(path: Path, expected: Mapping[str, Any], step: int, *, eval_pending: bool = False) -> str | None:
    """How the rows differ from when the checkpoint of `step` kept their digest, in half a sentence; None where they do
    not. Behind those rows there can be events, rows of later steps and, with `eval_pending`, what is due next."""
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
            if number > num_rows and record is not None and not isinstance(record, EventRecord):
                is_pending = eval_pending and record.step == step and record.kind in ("eval", "epoch")
                if record.step <= step and not is_pending:
                    return f"line {number}: a row of step {record.step} behind the {num_rows} rows that were written"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except ValueError as error:
        return str(error).removeprefix(f"{path}, ")
    return None


def rewind(path: Path, step: int, *, eval_pending: bool = False) -> int:
    """Drop the rows after `step` (and an earlier end of the run), so that a resumed run continues them; how many went.
    `eval_pending`: what is due after the step is still to come, so its evaluation and epoch rows go too. The file is
    replaced whole or not at all, and read a line at a time. A line within it that is no record is a UserError."""
    num_dropped = 0
    try:
        with writing(path), replace_atomically(path) as file:
            for _, line, record in iter_records(path):
                if record is None:
                    num_dropped += 1
                    continue
                event = record.event if isinstance(record, EventRecord) else None
                is_run_end = event == "finished" or (event in FINAL_EVALUATIONS and record.step > 0)
                follows_evaluation = record.kind in ("eval", "epoch") or event in EVALUATION_EVENTS
                if record.step > step or is_run_end or (eval_pending and record.step == step and follows_evaluation):
                    num_dropped += 1
                else:
                    file.write(line)
    except ValueError as error:
        raise UserError(f"{error}; cannot resume from a damaged file") from error
    return num_dropped


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError within is a TrainingError that names the path."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error
