"""Types of settings and of run.json's values: pydantic checks them, `Accepts` has the words for what they accept."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import core_schema

from trainer.config.errors import UserError
from trainer.config.files import expand_user_path, parse_json, read_text_file

T = TypeVar("T")


class Accepts:
    """In an Annotated type: what passes, in words; by pydantic's constraints, or a check that raises ValueError."""

    def __init__(self, words: str, check: Callable[[Any], Any] | None = None, **constraints: Any) -> None:
        self.words, self.check, self.constraints = words, check, {"strict": True, **constraints}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        schema: Any = {**handler(source), **self.constraints}
        if self.check is not None:
            schema = core_schema.no_info_after_validator_function(self.check, schema)
        return core_schema.custom_error_schema(schema, "expected", custom_error_message=self.words)


def _refuse_null_byte(text: str) -> str:
    """Not a pattern of pydantic, which refuses names of files that are not UTF-8."""
    if "\0" in text:
        raise ValueError("a null byte")
    return text


def _read_peft_config(value: str) -> str:
    """What a peft config says of the method, as JSON; `value`: the file, or this text itself."""
    is_text = value.startswith("{")
    text = value if is_text else read_text_file(Path(expand_user_path(value)), "--peft-config", "")
    config = parse_json(text)
    if not isinstance(config["peft_type"], str):
        raise ValueError("no method")
    places = ("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping")
    return json.dumps({key: config[key] for key in sorted(config) if key not in places}, separators=(",", ":"))


MAX_INT = 2**63 - 1
Switch = Annotated[bool, Accepts("true or false")]
Int = Annotated[int, Accepts("a whole number", ge=-MAX_INT, le=MAX_INT)]
NonNegativeInt = Annotated[int, Accepts("a whole number from 0", ge=0, le=MAX_INT)]
PositiveInt = Annotated[int, Accepts("a whole number from 1", ge=1, le=MAX_INT)]
Float = Annotated[float, Accepts("a number", allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Accepts("0 or a number above it", ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Accepts("a number above 0", gt=0, allow_inf_nan=False)]
Text = Annotated[str, Accepts("a text without a null byte", _refuse_null_byte)]
A_PATH = "a name, a file or a folder (~ or ~user for a home folder)"
UserPath = Annotated[str, Accepts(A_PATH, expand_user_path)]
PeftConfig = Annotated[str, Accepts("an adapter_config.json of peft, with a peft_type", _read_peft_config)]
#: Part of names of files and of W&B's paths.
RunId = Annotated[str, Accepts("1 to 64 letters, digits, _ and -", pattern=r"^[A-Za-z0-9_-]{1,64}$")]
WandbProject = Annotated[
    str, Accepts(r"a name of at most 128 characters without / \ # ? % :", pattern=r"^[^/\\#?%:\pC]{1,128}$")
]


def option(
    help: str, default: Any = dataclasses.MISSING, *, flag: str = "", is_repeated: bool = False, **presets: Any
) -> Any:
    """A field of a settings class: its help, its default, its flag if that is not its name, its values in presets.
    `is_repeated`: whether the flag is given once for each value of a tuple, rather than with commas between them."""
    metadata = {"help": help, "flag": flag, "is_repeated": is_repeated, "presets": presets}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The flag of a settings field: `--max-steps` of `max_steps`."""
    return field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def settings_class(cls: type[T]) -> type[T]:
    """A frozen pydantic dataclass. Values that are not accepted are a UserError: flag, value, what is accepted."""
    settings: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    validate = settings.__init__
    flags = {field.name: flag_of(field) for field in dataclasses.fields(settings)}

    def __init__(self: Any, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            problems = [(flags[p.key.partition(".")[0]], p) for p in find_problems(error)]  # "target_modules.0": a name
            raise UserError(*(f"{flag} {p.value}: expected {p.expected}" for flag, p in problems)) from None

    settings.__init__ = __init__
    return typing.cast(type[T], settings)


_make_adapter = functools.cache(TypeAdapter)


def what_is_expected(annotation: Any, value: object) -> str:
    """What a value should be that is not of a type; "" for one that is."""
    try:
        _make_adapter(annotation).validate_python(value)
    except ValidationError as error:
        return next(find_problems(error)).expected
    return ""


class Problem(NamedTuple):
    """Where a value is not as it should be, what stands there, and what was expected in words."""

    key: str  #: with dots between those of nested objects
    value: object
    expected: str
    is_missing: bool


def find_problems(error: ValidationError) -> Iterator[Problem]:
    kinds = {"missing": "what a run writes", "unexpected_keyword_argument": "no setting of this name"}
    kinds |= dict.fromkeys(("dict_type", "model_type", "dataclass_type"), "an object")
    kinds |= dict.fromkeys(("list_type", "tuple_type"), "a list") | {"too_short": "a list of at least one"}
    for found in error.errors(include_url=False):
        expected = kinds.get(found["type"], found["msg"].removeprefix("Input should be ").replace("'", ""))
        yield Problem(".".join(map(str, found["loc"])), found["input"], expected, found["type"] == "missing")


def unwrap(annotation: Any) -> Any:
    """`X` of `X | None` and of `Annotated[X, ...]`."""
    while typing.get_origin(annotation) in (Annotated, typing.Union, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    return annotation
