"""A settings field and all that derives from it: its flag, its help, its unit, and which values it accepts."""

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from trainer.config.errors import UserError

_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class Accepted(NamedTuple):
    """Which values of a field's type are accepted, as a check and in words."""

    check: Callable[[Any], bool]
    description: str


def at_least(minimum: int) -> Accepted:
    """Whole numbers from `minimum`."""
    return Accepted(lambda value: value >= minimum, f"a whole number from {minimum}")


ABOVE_ZERO = Accepted(lambda value: 0 < value < math.inf, "a number above 0")
FROM_ZERO = Accepted(lambda value: 0 <= value < math.inf, "0 or a number above it")
PROBABILITY = Accepted(lambda value: 0 <= value < 1, "a probability from 0 up to 1")
SHARE = Accepted(lambda value: 0 < value < 1, "a share between 0 and 1")
SHARE_OR_NONE = Accepted(lambda value: 0 <= value < 1, "0 (none) or a share between 0 and 1")
NOT_EMPTY = Accepted(bool, "a name or a folder")
INTERVAL = Accepted(
    lambda value: value in ("epoch", "never") or (value.isdecimal() and int(value) > 0),
    "a number of steps, `epoch` or `never`",
)

RUN_ID = Accepted(  # part of names of files and of W&B's paths
    lambda value: re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value) is not None, "1 to 64 letters, digits, _ and -"
)
WANDB_PROJECT = Accepted(
    lambda value: 0 < len(value) <= 128 and value.isprintable() and not set(value) & set("/\\#?%:"),
    "a name of at most 128 characters without / \\ # ? % :",
)


def option(
    default: Any = dataclasses.MISSING, *, help: str, flag: str = "", unit: str = "", accepts: Accepted | None = None
) -> Any:
    """One field with what `--help` says of it and its unit; `flag` where that is not the field's own name."""
    return dataclasses.field(default=default, metadata={"flag": flag, "help": help, "unit": unit, "accepts": accepts})


def flag_of(item: dataclasses.Field[Any]) -> str:
    """The flag of a settings field: `--max-steps` of `max_steps`."""
    return item.metadata.get("flag") or f"--{item.name.replace('_', '-')}"


def check_range(is_accepted: bool, flag: str, value: object, accepted: str) -> None:
    """Refuse `value` in one line that names the flag, the value and what would be accepted."""
    if not is_accepted:
        raise UserError(f"{flag} {value}: expected {accepted}")


def check_fields(group: Any) -> None:
    """UserError for the first field of a settings dataclass with a value it does not accept."""
    for item in dataclasses.fields(group):
        value = getattr(group, item.name)
        problem = value_problem(value, item)
        if problem:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            shown = text if str(text).isprintable() and text != "" else repr(text)
            raise UserError(f"{flag_of(item)} {shown}: expected {problem}")


def value_problem(value: object, item: dataclasses.Field[Any]) -> str:
    """What a field would accept instead of `value`; empty where it accepts `value`."""
    accepts: Accepted | None = item.metadata.get("accepts")
    if not has_type(value, item.type):
        return accepts.description if accepts else describe_type(item.type)
    return accepts.description if accepts and value is not None and not accepts.check(value) else ""


def has_type(value: object, annotation: Any) -> bool:
    """Whether a value is of a field's type: int, float (or int), str, bool, Literal, `X | None` or tuple[X, ...]."""
    if annotation is float:
        return isinstance(value, float) or has_type(value, int)
    if annotation is int:  # one that can be computed with
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if _is_union(annotation):
        return any(has_type(value, part) for part in typing.get_args(annotation))
    if choices := choices_of(annotation):
        return isinstance(value, str) and value in choices
    if typing.get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(has_type(part, typing.get_args(annotation)[0]) for part in value)
    return isinstance(value, annotation)


def describe_type(annotation: Any) -> str:
    """A field's type in words; None, which stands for a flag that is left out, is not mentioned."""
    annotation = without_none(annotation)
    if choices := choices_of(annotation):
        return join_words(choices)
    if typing.get_origin(annotation) is tuple:
        element = typing.get_args(annotation)[0]
        return f"{describe_type(element)}, separated by commas" if choices_of(element) else "names separated by commas"
    return _TYPE_NAMES[annotation]


def without_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if _is_union(annotation):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The values of a Literal type, or of an optional one; empty for any other type."""
    annotation = without_none(annotation)
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()


def join_words(names: tuple[str, ...]) -> str:
    """`a, b or c`."""
    return " or ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
