"""run.json: its shape, and the one reader of it, which trusts nothing that it reads."""

import contextlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError, conlist, create_model

from trainer.config.choices import Mode, Precision, Preset, WandbMode
from trainer.config.errors import UserError
from trainer.config.fields import Float, Int, PositiveInt, RunId, Text, WandbProject, find_problems
from trainer.config.files import read_json_object
from trainer.config.settings import Settings
from trainer.config.text import flatten, shorten

# 5: settings plus_ratio, profile, shuffle; 4: no wandb_group; 3: no allow_leakage; 2: evaluation records in one file
SCHEMA_VERSION = 6


def _block(*groups: tuple[Any, str], **base: Any) -> Any:
    """A model of an object, in which the values of the keys in each text are of the type before it."""
    fields: dict[str, Any] = {name: (annotation, ...) for annotation, names in groups for name in names.split()}
    return create_model("Block", **fields, **base)


_Split = _block((Int, "records examples tokens num_target_tokens"))
_Data = _block(
    (Text, "source fingerprint train_fingerprint val_fingerprint split tokenizer objective"),
    (Int, "vocabulary block_size"),
    (_Split, "train val"),
)
_Model = _block(
    (Text, "name init class fingerprint"),
    (Int, "parameters"),
    (PositiveInt, "trainable"),
    (Float, "share"),
    (list[Text], "lora_targets"),
)
_Resolved = _block(
    (Text, "ds_config device"),
    (Precision, "precision"),
    (Float, "lr dropout"),
    (Int, "ranks nodes micro_batch accumulation global_batch steps_per_epoch total_steps warmup_steps"),
)
_Wandb = _block((RunId, "id"), (WandbProject, "project"), (Text, "group"), (WandbMode, "mode"))
#: The settings with which the run last went on, and {name: [at the start, now]} of what was changed.
_Resumed = _block((Settings, "settings"), (dict[str, tuple[Any, Any]], "changed"))
#: The content of run.json, as far as anything here relies on it; it may hold more keys.
_RunMetadata = _block(
    (Int, "schema_version"),
    (RunId, "run_id"),
    (Text, "name started"),
    (Mode, "mode"),
    (Preset, "preset"),
    (list[Text], "command overridden not_comparable_with_card"),
    (Settings, "settings"),
    (_Resolved, "resolved"),
    (conlist(_block((Text, "path")), min_length=1), "execution"),
    (dict[str, Any], "deepspeed hardware"),
    (_Data, "data"),
    (_Model, "model"),
    (dict[str, Text | None], "versions"),
    (dict[str, Any] | None, "git"),
    (_Wandb, "wandb"),
    resumed=(_Resumed, None),  # absent, never null
)


def read_run_metadata(path: Path) -> dict[str, Any]:
    """The content of a run.json; UserError, in one line that names file, key, value and what was expected."""
    with contextlib.suppress(PermissionError):  # who reads it says so
        if not (path.is_symlink() or path.exists()):
            raise UserError(f"{path.parent}: no run.json there; expected a run folder, for instance runs/<run name>")
    content = read_json_object(path)
    version = content.get("schema_version", content.get("format"))
    if version != SCHEMA_VERSION and isinstance(version, int):
        raise UserError(
            f"{path}: schema_version is {version}, expected {SCHEMA_VERSION}; the run was written by another "
            "version of this program; read it with that version"
        )
    try:
        metadata = _RunMetadata.model_validate(content)
    except ValidationError as error:
        key, value, expected, is_missing = next(find_problems(error))
        shown = "missing" if is_missing else shorten(json.dumps(value, ensure_ascii=False), 40)
        raise UserError(f"{path}: {key} is {shown}; expected {expected}") from None
    except UserError as error:  # each setting is right alone, but they exclude one another
        raise UserError(f"{path}: settings: {error}") from None
    if metadata.settings.mode != metadata.mode:
        raise UserError(f"{path}: mode is {metadata.mode}; expected that of settings, {metadata.settings.mode}")
    names = dict(flatten(metadata.settings.as_dict(), "."))
    for place, block in (("", content), ("resumed.", content.get("resumed", content))):
        if missing := sorted(names.keys() - dict(flatten(block["settings"], "."))):  # pydantic took its default
            raise UserError(f"{path}: {place}settings.{missing[0]} is missing; expected what a run writes")
    return content
