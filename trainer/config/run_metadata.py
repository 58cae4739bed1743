"""run.json: its shape as types, and the one reader of it, which trusts nothing that it reads."""

import dataclasses
import functools
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

from trainer.config.choices import Mode, Precision, Preset, WandbMode
from trainer.config.errors import UserError
from trainer.config.json_file import parse_json
from trainer.config.options import RUN_ID, WANDB_PROJECT, at_least, describe_type, has_type, value_problem, without_none
from trainer.config.settings import Settings

SCHEMA_VERSION = 3  # 2: evaluation records in one file; 1, under the key `format`: other names
_MISSING = object()  #: the value of a key that is not there

RunId = Annotated[str, RUN_ID]


class SplitBlock(TypedDict):
    """Counts of the training or validation data."""

    records: int
    examples: int
    tokens: int
    counted_tokens: int


class DataBlock(TypedDict):
    """What the data were."""

    source: str
    fingerprint: str
    train_fingerprint: str
    val_fingerprint: str
    split: str
    tokenizer: str | None
    vocabulary: int
    objective: str
    block_size: int
    train: SplitBlock
    val: SplitBlock


ModelBlock = TypedDict(
    "ModelBlock",
    {
        "name": str,
        "init": str,
        "class": str,
        "parameters": int,
        "trainable": Annotated[int, at_least(1)],
        "share": float,
        "fingerprint": str,
        "lora_targets": list[str],
    },
)


class ResolvedBlock(TypedDict):
    """What was derived or chosen."""

    lr: float
    precision: Precision
    ds_config: str
    ranks: int
    nodes: int
    device: str
    micro_batch: int
    accumulation: int
    global_batch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    dropout: float


class WandbBlock(TypedDict):
    """Where the run's W&B records are."""

    id: RunId
    project: Annotated[str, WANDB_PROJECT]
    group: str
    mode: WandbMode


class ResumedBlock(TypedDict):
    """The settings with which the run last went on, and {name: [at the start, now]} of what was changed."""

    settings: Settings
    changed: dict[str, tuple[Any, Any]]


class RunMetadata(TypedDict):
    """The content of run.json, as far as anything here relies on it; more keys may stand there."""

    schema_version: int
    run_id: RunId
    name: str
    mode: Mode
    preset: Preset
    started: str
    command: list[str]
    settings: Settings
    overridden: list[str]
    resolved: ResolvedBlock
    execution: list[dict[str, Any]]
    deepspeed: dict[str, Any]
    data: DataBlock
    model: ModelBlock
    not_comparable_with_card: list[str]
    versions: dict[str, str | None]
    git: dict[str, Any] | None
    hardware: dict[str, Any]
    wandb: WandbBlock
    resumed: NotRequired[ResumedBlock]


class Problem(NamedTuple):
    """Where a value is not as it should be, what stands there, and what was expected."""

    key: str
    actual: str
    expected: str


def read_run_metadata(path: Path) -> dict[str, Any]:
    """The content of a run.json; UserError, in one line that names file, key, found and expected, on any problem."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a file")
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path.parent}: no run.json there; expected a run folder, for instance runs/<run name>"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); expected what a run writes") from error
    return check_run_metadata(content, source=str(path))


def check_run_metadata(content: object, *, source: str) -> dict[str, Any]:
    """`content`, where it is that of a run.json of this version; UserError that names `source` otherwise."""
    if isinstance(content, dict) and content.get("schema_version") != SCHEMA_VERSION:
        version = content.get("schema_version", content.get("format"))
        if isinstance(version, int):
            raise UserError(
                f"{source}: schema_version is {version}, expected {SCHEMA_VERSION}; the run was written by another "
                "version of this program; read it with that version"
            )
    problem = find_problem(content, RunMetadata, "")
    if problem is not None:
        raise UserError(f"{source}: {problem.key or 'its content'} is {problem.actual}; expected {problem.expected}")
    assert isinstance(content, dict)
    for key, block in (("", content), ("resumed.", content.get("resumed", {}))):
        if "settings" in block:
            try:
                Settings.from_dict(block["settings"])
            except UserError as error:  # right alone, but not together
                raise UserError(f"{source}: {key}settings: {error}") from None
    if content["settings"]["mode"] != content["mode"]:
        raise UserError(
            f"{source}: mode is {content['mode']!r}; expected that of settings, {content['settings']['mode']}"
        )
    return content


def find_problem(value: object, annotation: Any, key: str) -> Problem | None:
    """The first thing in a JSON value that is not of its type: TypedDict, settings, dict, list, Literal or scalar."""
    if annotation is Any or (value is None and type(None) in typing.get_args(annotation)):
        return None
    annotation = without_none(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is NotRequired:
        return None if value is _MISSING else find_problem(value, arguments[0], key)
    if origin is Annotated:
        text_type, accepts = arguments
        is_accepted = find_problem(value, text_type, key) is None and accepts.check(value)
        return None if is_accepted else Problem(key, _describe(value), accepts.description)
    if dataclasses.is_dataclass(annotation) or typing.is_typeddict(annotation) or origin is dict:
        if not isinstance(value, dict):
            return Problem(key, _describe(value), "an object")
        if dataclasses.is_dataclass(annotation):
            return _first(_iter_settings_problems(value, annotation, key))
        if origin is dict:
            return _first(find_problem(item, arguments[1], _join(key, name)) for name, item in value.items())
        hints = _type_hints(annotation)
        return _first(find_problem(value.get(name, _MISSING), hints[name], _join(key, name)) for name in hints)
    if origin is list or origin is tuple:  # a tuple is of a fixed length
        if not isinstance(value, list) or (origin is tuple and len(value) != len(arguments)):
            return Problem(key, _describe(value), "a list" if origin is list else f"a list of {len(arguments)}")
        elements = arguments * len(value) if origin is list else arguments
        pairs = enumerate(zip(value, elements, strict=True))
        return _first(find_problem(item, element, _join(key, i)) for i, (item, element) in pairs)
    if not has_type(value, annotation) or (isinstance(value, str) and "\0" in value):
        return Problem(key, _describe(value), describe_type(annotation))
    return None


@functools.cache
def _type_hints(block: Any) -> dict[str, Any]:
    return typing.get_type_hints(block, include_extras=True)


def _iter_settings_problems(value: dict[str, Any], settings_class: Any, key: str) -> Iterator[Problem | None]:
    """As `find_problem`, field by field; an unknown setting is a problem too: it would be dropped without a word."""
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    for name, field in fields.items():
        item = value.get(name, _MISSING)
        if dataclasses.is_dataclass(field.type):
            yield find_problem(item, field.type, _join(key, name))
            continue
        expected = value_problem(tuple(item) if isinstance(item, list) else item, field)
        if not expected and isinstance(item, str) and "\0" in item:
            expected = describe_type(field.type)
        yield Problem(_join(key, name), _describe(item), expected) if expected else None
    for name in value:
        if name not in fields:
            yield Problem(_join(key, name), "an unknown setting", f"one of {', '.join(fields)}")


def _first(problems: Iterator[Problem | None]) -> Problem | None:
    return next(filter(None, problems), None)


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _describe(value: object) -> str:
    """A JSON value in a few characters."""
    if value is _MISSING:
        return "missing"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
