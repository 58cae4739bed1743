"""The rows of metrics.jsonl and how they are read.

One JSON object a line, `kind` first. `epoch` is the fraction of the training set seen, `samples` the examples,
`tokens` the tokens fed (padding left out); losses are nats per target token; `time` is seconds since the run began.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeGuard

from pydantic import SkipValidation, TypeAdapter, ValidationError

from trainer.config.fields import Accepts, Float, Int, first_problem
from trainer.config.files import open_plain_file, parse_json

MAX_LINE_BYTES = 2**24  # far above any row; a longer line is no row, and is not read into memory
# After the first step they are made at a run's end, and again when it is resumed; they name the step of the weights.
FINAL_EVALUATIONS = ("test_evaluation", "retain_evaluation")
_STEP_PREFIX = b'{"kind": "step"'


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step: the token mean of its loss over the global batch, and the gradient norm before clipping."""

    kind: ClassVar = "step"
    step: Int
    epoch: Float
    samples: Int
    tokens: Int
    loss: Float
    lr: Float
    grad_norm: Float
    tokens_per_second: Float
    time: Float


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One pass over the whole validation set; `eval_tokens` is the number of tokens the loss is the mean of.

    `bits_per_byte`: the same sum over the UTF-8 bytes of the targets, for models with other tokenizers; None where the
    text is not known. `row_nll`: the rows' sums, in their order, on the way to eval_records/; not in the line.
    """

    kind: ClassVar = "eval"
    step: Int
    epoch: Float
    samples: Int
    tokens: Int
    loss: Float
    perplexity: Float
    eval_tokens: Int
    time: Float
    bits_per_byte: Float | None = None
    row_nll: SkipValidation[Sequence[float] | None] = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The token mean of the training loss over one epoch, as the weights moved."""

    kind: ClassVar = "epoch"
    epoch: Float
    train_loss: Float
    step: Int
    samples: Int
    tokens: Int
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


Record = StepRecord | EvalRecord | EpochRecord | EventRecord
_ADAPTERS = {cls.kind: TypeAdapter[Any](cls) for cls in (StepRecord, EvalRecord, EpochRecord, EventRecord)}


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
    adapter = _ADAPTERS.get(str(row.get("kind"))) if isinstance(row, dict) else None
    if adapter is None:
        raise ValueError(f"not a record: {json.dumps(row)[:80]}")
    try:
        record: Record = adapter.validate_python(row)
        return record
    except ValidationError as error:
        problem = first_problem(error)
        value = "missing" if problem.is_missing else json.dumps(problem.value)[:80]
        raise ValueError(f"{problem.key} = {value}: expected {problem.expected}") from None


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file of rows, one at a time; ValueError, naming it, for one that is too long to be a row."""
    with open_plain_file(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes")
            yield line


def iter_records(path: Path, *, with_steps: bool = True) -> Iterator[tuple[int, bytes, Record | ValueError | None]]:
    """(number, line, its record or what is wrong with it) of every line; None for a last one that a kill cut off.

    The rows of a run never step back, and only events repeat a step: a row that does is wrong, as where a file was
    appended to itself. `with_steps`: False leaves out the rows of steps, nearly all of a long run, unread.
    """
    last_steps: dict[str, int] = {}
    for number, line in enumerate(iter_lines(path), start=1):
        if not line.endswith(b"\n"):  # rows are written newline last: this one was not finished
            yield number, line, None
        elif with_steps or not line.startswith(_STEP_PREFIX):
            try:
                record = from_line(line)
                if not isinstance(record, EventRecord) or record.event not in FINAL_EVALUATIONS:
                    last_step = max(last_steps.values(), default=-1)
                    is_second = record.kind != "event" and record.step == last_steps.get(record.kind)
                    if record.step < last_step or is_second:
                        raise ValueError(f"a row of step {record.step} after one of step {last_step}")
                    last_steps[record.kind] = record.step
            except ValueError as error:
                yield number, line, error
            else:
                yield number, line, record


def read_records(path: Path, *, with_steps: bool = True) -> Iterator[Record]:
    """The records of `iter_records`; a ValueError that names file and line for one that is wrong."""
    for number, _, record in iter_records(path, with_steps=with_steps):
        if isinstance(record, ValueError):
            raise ValueError(f"{path}, line {number}: {record}") from record
        if record is not None:
            yield record
