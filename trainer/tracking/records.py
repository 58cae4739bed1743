"""The rows a run leaves in metrics.jsonl, and reading them back.

One JSON object a line, `kind` first. `epoch` is the fraction of the training set seen, `samples` the examples,
`tokens` the tokens fed (padding left out); losses are nats per counted token; `time` is seconds since the run began.
"""

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Protocol, TypeGuard, get_origin

from trainer.config.json_file import parse_json


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step: the token mean of its loss over the global batch, and the gradient norm before clipping."""

    step: int
    epoch: float
    samples: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    time: float


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One pass over the whole validation set; `eval_tokens` is the number of tokens the loss is the mean of.

    `bits_per_byte`: the same sum over the UTF-8 bytes of the targets, for models with other tokenizers; None where the
    text is not known. `row_nll`: the rows' sums, in their order, on the way to eval_records/; not in the line.
    """

    step: int
    epoch: float
    samples: int
    tokens: int
    loss: float
    perplexity: float
    eval_tokens: int
    time: float
    bits_per_byte: float | None = None
    row_nll: Sequence[float] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The token mean of the training loss over one epoch, as the weights moved."""

    epoch: float
    train_loss: float
    step: int
    samples: int
    tokens: int
    time: float


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened: `event` is its name, `message` one line for people, `facts` the rest."""

    event: str
    step: int
    message: str
    time: float
    facts: dict[str, Any] = field(default_factory=dict)


MAX_LINE_BYTES = 2**24  # far above any row; a longer line is no row, and is not read into memory
STEP_PREFIX = b'{"kind": "step"'
Record = StepRecord | EvalRecord | EpochRecord | EventRecord
RECORD_CLASSES: dict[str, type] = {"step": StepRecord, "eval": EvalRecord, "epoch": EpochRecord, "event": EventRecord}
_COLUMN_TYPES = {cls: {column.name: column.type for column in fields(cls)} for cls in RECORD_CLASSES.values()}
_RECORD_KINDS = {cls: kind for kind, cls in RECORD_CLASSES.items()}


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


def to_line(record: Record) -> str:
    """One JSON line without its newline. NaN and infinity are refused (ValueError): they must be an event's text."""
    row = {"kind": _RECORD_KINDS[type(record)], **asdict(record)}
    if isinstance(record, EvalRecord):
        del row["row_nll"]
    return json.dumps(row, allow_nan=False)


_WHOLE_NUMBER = rb"-?(?:0|[1-9]\d{0,17})"
_NUMBERS: dict[Any, bytes] = {int: _WHOLE_NUMBER, float: _WHOLE_NUMBER + rb"(?:\.\d{1,20})?(?:e-\d{2,3}|e\+\d\d)?"}
#: a step's row as `to_line` writes it, its numbers finite by their form: known in 2 us where parsing it takes 14
_STEP_LINE = re.compile(
    rb'\{"kind": "step", '
    + b", ".join(b'"%s": (%s)' % (name.encode(), _NUMBERS[kind]) for name, kind in _COLUMN_TYPES[StepRecord].items())
    + rb"\}\n?"
)


def from_line(line: bytes) -> Record:
    """The record of one line; ValueError where it is not one. Unknown fields are left out, for later versions."""
    if match := _STEP_LINE.fullmatch(line):
        step, epoch, samples, tokens, loss, lr, grad_norm, tokens_per_second, time = match.groups()
        return StepRecord(
            step=int(step),
            epoch=float(epoch),
            samples=int(samples),
            tokens=int(tokens),
            loss=float(loss),
            lr=float(lr),
            grad_norm=float(grad_norm),
            tokens_per_second=float(tokens_per_second),
            time=float(time),
        )
    return to_record(parse_json(line.decode()))


def step_of_row(line: bytes) -> int | None:
    """The step of a row that is one, without reading the rest; None for any other line, and for one to be parsed."""
    match = _STEP_LINE.fullmatch(line)
    return int(match[1]) if match else None


def to_record(row: Any) -> Record:
    """The record of a row of JSON; ValueError where it is not one."""
    cls: Any = RECORD_CLASSES.get(str(row.get("kind"))) if isinstance(row, dict) else None
    if cls is None:
        raise ValueError(f"not a record: {json.dumps(row)[:80]}")
    values = {name: row[name] for name in _COLUMN_TYPES[cls] if name in row}
    for name, value in values.items():
        expected = _COLUMN_TYPES[cls][name]
        if not _is_valid(value, expected):
            raise ValueError(f"{name} = {json.dumps(value)[:80]}: expected {_TYPE_NAMES.get(expected, expected)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"not a whole record: {json.dumps(row)[:80]}") from error


_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", dict[str, Any]: "an object"}


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_valid(value: Any, expected: Any) -> bool:
    """Whether a JSON value is one of a field's type: int, float (finite), str, dict, or several of them."""
    if expected is float:
        return is_number(value)
    if isinstance(expected, UnionType):
        return any(_is_valid(value, member) for member in expected.__args__)
    return type(value) is (get_origin(expected) or expected)


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file of rows, one at a time; ValueError, naming it, for one that is too long to be a row."""
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes")
            yield line


def read_records(path: Path, *, with_steps: bool = True) -> Iterator[Record]:
    """The records of a metrics.jsonl in order; a last line that a kill cut off is left out, a broken one raises.

    `with_steps`: False leaves out the rows of steps, nearly all of a long run, unread.
    """
    for line_number, line in enumerate(iter_lines(path), start=1):
        if not line.endswith(b"\n"):
            return  # rows are written newline last: this one was not finished
        if with_steps or not line.startswith(STEP_PREFIX):
            try:
                yield from_line(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {line_number}: {error}") from error
