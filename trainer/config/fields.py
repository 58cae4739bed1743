"""Types of settings and of run.json's values: pydantic checks them, `Accepts` has the words for what they accept."""

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import core_schema

from trainer.config.errors import UserError

T = TypeVar("T")


class Accepts:
    """In an Annotated type: pydantic's constraints, or a check, and the words for the values that pass."""

    def __init__(self, words: str, check: Callable[[Any], object] | None = None, **constraints: Any) -> None:
        self.words, self.check, self.constraints = words, check, constraints

    def _require(self, value: Any) -> Any:
        if self.check is not None and not self.check(value):
            raise ValueError(self.words)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        schema: Any = {**handler(source), "strict": True, **self.constraints}
        if self.check is not None:
            schema = core_schema.no_info_after_validator_function(self._require, schema)
        return core_schema.custom_error_schema(schema, "expected", custom_error_message=self.words)


def is_name(text: str) -> bool:
    """Whether a text can name a file: it is not empty and holds no null byte."""
    return bool(text) and "\0" not in text


MAX_INT = 2**63 - 1
Switch = Annotated[bool, Accepts("true or false")]
Int = Annotated[int, Accepts("a whole number", ge=-MAX_INT, le=MAX_INT)]
NonNegativeInt = Annotated[int, Accepts("a whole number from 0", ge=0, le=MAX_INT)]
PositiveInt = Annotated[int, Accepts("a whole number from 1", ge=1, le=MAX_INT)]
Float = Annotated[float, Accepts("a number", allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Accepts("0 or a number above it", ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Accepts("a number above 0", gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Accepts("a probability from 0 up to 1", ge=0, lt=1)]
Share = Annotated[float, Accepts("a share between 0 and 1", gt=0, lt=1)]
Text = Annotated[str, Accepts("a text", lambda value: "\0" not in value)]
Name = Annotated[str, Accepts("a name or a folder", is_name)]
Interval = Annotated[
    str,
    Accepts(
        "a number of steps, `epoch` or `never`",
        lambda value: value in ("epoch", "never") or (value.isdecimal() and int(value) > 0),
    ),
]
RunId = Annotated[  # part of names of files and of W&B's paths
    str, Accepts("1 to 64 letters, digits, _ and -", re.compile(r"[A-Za-z0-9_-]{1,64}").fullmatch)
]
WandbProject = Annotated[
    str,
    Accepts(
        "a name of at most 128 characters without / \\ # ? % :",
        lambda value: 0 < len(value) <= 128 and value.isprintable() and not set(value) & set("/\\#?%:"),
    ),
]


def option(default: Any = dataclasses.MISSING, *, help: str, flag: str = "", unit: str = "") -> Any:
    """A field of a settings class: what `--help` says of it, its unit, and its flag where that is not its own name."""
    return dataclasses.field(default=default, metadata={"flag": flag, "help": help, "unit": unit})


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The flag of a settings field: `--max-steps` of `max_steps`."""
    return field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def settings_class(cls: type[T]) -> type[T]:
    """A frozen pydantic dataclass. A value that is not accepted is a UserError: flag, value, what is accepted."""
    settings: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    validate = settings.__init__

    def __init__(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            problem = first_problem(error)
            fields = {field.name: field for field in dataclasses.fields(settings)}
            is_option = len(problem.path) == 1 and problem.path[0] in fields
            flag = flag_of(fields[str(problem.path[0])]) if is_option else problem.key
            value = problem.value
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            shown = text if str(text).isprintable() and text != "" else repr(text)
            raise UserError(f"{flag} {shown}: expected {problem.expected}") from None

    settings.__init__ = __init__
    return typing.cast(type[T], settings)


def check_value(annotation: Any, name: str, value: object) -> None:
    """UserError, in one line that begins with `name`, where a value is not of a type."""
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        raise UserError(f"{name} {value}: expected {first_problem(error).expected}") from None


class Problem(NamedTuple):
    """Where a value is not as it should be, what stands there, and what was expected in words."""

    path: tuple[str | int, ...]
    value: object
    expected: str
    is_missing: bool = False

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


_EXPECTED = {
    "dict_type": "an object",
    "model_type": "an object",
    "dataclass_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "missing": "what a run writes",
    "unexpected_keyword_argument": "no setting of this name",
}


def first_problem(error: ValidationError) -> Problem:
    """The first thing that pydantic found wrong."""
    first = error.errors(include_url=False)[0]
    expected = _EXPECTED.get(first["type"], first["msg"].removeprefix("Input should be ").replace("'", ""))
    return Problem(first["loc"], first["input"], expected, first["type"] == "missing")


def unwrap(annotation: Any) -> Any:
    """`X` of `X | None` and of `Annotated[X, ...]`."""
    if typing.get_origin(annotation) is Annotated:
        return unwrap(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return unwrap(next(part for part in typing.get_args(annotation) if part is not type(None)))
    return annotation


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal type, or of an optional one; empty for any other type."""
    annotation = unwrap(annotation)
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
