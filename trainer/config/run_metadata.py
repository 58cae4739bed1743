"""run.json: its shape as pydantic models, and the one reader of it, which trusts nothing that it reads."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from trainer.config.choices import Mode, Precision, Preset, WandbMode
from trainer.config.errors import UserError
from trainer.config.fields import Float, Int, PositiveInt, RunId, Text, WandbProject, find_problems
from trainer.config.files import read_json_object
from trainer.config.settings import Settings
from trainer.config.text import flatten, shorten

# 5: label_smoothing and other settings; 4: no wandb_group; 3: no allow_leakage; 2: evaluation records in one file
SCHEMA_VERSION = 6


class SplitBlock(BaseModel):
    """Counts of the training or validation data."""

    records: Int
    examples: Int
    tokens: Int
    num_target_tokens: Int


class DataBlock(BaseModel):
    """What the data were."""

    source: Text
    fingerprint: Text
    train_fingerprint: Text
    val_fingerprint: Text
    split: Text
    tokenizer: Text | None
    vocabulary: Int
    objective: Text
    block_size: Int
    train: SplitBlock
    val: SplitBlock


class _ModelBlock(BaseModel):
    name: Text
    init: Text
    class_name: Annotated[Text, Field(alias="class")]
    parameters: Int
    trainable: PositiveInt
    share: Float
    fingerprint: Text
    lora_targets: list[Text]


class _ResolvedBlock(BaseModel):
    lr: Float
    precision: Precision
    ds_config: Text
    ranks: Int
    nodes: Int
    device: Text
    micro_batch: Int
    accumulation: Int
    global_batch: Int
    steps_per_epoch: Int
    total_steps: Int
    warmup_steps: Int
    dropout: Float


class _ExecutionEntry(BaseModel):
    path: Text


class _WandbBlock(BaseModel):
    id: RunId
    project: WandbProject
    group: Text
    mode: WandbMode


class _ResumedBlock(BaseModel):
    """The settings with which the run last went on, and {name: [at the start, now]} of what was changed."""

    settings: Settings
    changed: dict[str, tuple[Any, Any]]


class _RunMetadata(BaseModel):
    """The content of run.json, as far as anything here relies on it; it may hold more keys."""

    schema_version: Int
    run_id: RunId
    name: Text
    mode: Mode
    preset: Preset
    started: Text
    command: list[Text]
    settings: Settings
    overridden: list[Text]
    resolved: _ResolvedBlock
    execution: Annotated[list[_ExecutionEntry], Field(min_length=1)]
    deepspeed: dict[str, Any]
    data: DataBlock
    model: _ModelBlock
    not_comparable_with_card: list[Text]
    versions: dict[str, Text | None]
    git: dict[str, Any] | None
    hardware: dict[str, Any]
    wandb: _WandbBlock
    resumed: _ResumedBlock = Field(default=None)  # type: ignore[assignment]  # absent, never null


def read_run_metadata(path: Path) -> dict[str, Any]:
    """The content of a run.json; UserError, in one line that names file, key, value and what was expected."""
    with contextlib.suppress(PermissionError):  # who reads it says so
        if not (path.is_symlink() or path.exists()):
            raise UserError(f"{path.parent}: no run.json there; expected a run folder, for instance runs/<run name>")
    return check_run_metadata(read_json_object(path), source=str(path))


def check_run_metadata(content: dict[str, Any], *, source: str) -> dict[str, Any]:
    """`content`, where it is that of a run.json of this version; UserError that names `source` otherwise."""
    version = content.get("schema_version", content.get("format"))
    if version != SCHEMA_VERSION and isinstance(version, int):
        raise UserError(
            f"{source}: schema_version is {version}, expected {SCHEMA_VERSION}; the run was written by another "
            "version of this program; read it with that version"
        )
    try:
        metadata = _RunMetadata.model_validate(content)
    except ValidationError as error:
        key, value, expected, is_missing = next(find_problems(error))
        shown = "missing" if is_missing else shorten(json.dumps(value, ensure_ascii=False), 40)
        raise UserError(f"{source}: {key} is {shown}; expected {expected}") from None
    except UserError as error:  # each setting is right alone, but they exclude one another
        raise UserError(f"{source}: settings: {error}") from None
    if metadata.settings.mode != metadata.mode:
        raise UserError(f"{source}: mode is {metadata.mode}; expected that of settings, {metadata.settings.mode}")
    names = dict(flatten(metadata.settings.as_dict(), "."))
    for place, block in (("", content), ("resumed.", content.get("resumed", content))):
        if missing := sorted(names.keys() - dict(flatten(block["settings"], "."))):  # pydantic took its default
            raise UserError(f"{source}: {place}settings.{missing[0]} is missing; expected what a run writes")
    return content
