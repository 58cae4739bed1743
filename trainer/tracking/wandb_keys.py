"""What is called how on Weights & Biases: the one place that knows; needs neither wandb nor torch.

Runs with different batches line up by epoch because every row carries all three x axes (`AXES`) and because
`METRICS` binds the curves to the epoch.
"""

import re
from collections.abc import Mapping
from typing import Any

from trainer.config.reference import ReferenceRow
from trainer.config.text import flatten
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, StepRecord

AXES = ("epoch", "samples", "tokens")
METRICS = (  # (pattern, x axis, what the summary keeps)
    ("train/*", "epoch", None),
    ("val/*", "epoch", "min,last"),
    ("sample/*", "epoch", None),
)
COLUMNS: dict[type, dict[str, str]] = {  # kind of record -> {name on W&B: field of the record}
    StepRecord: {
        "train/loss": "loss",
        "train/lr": "lr",
        "train/grad_norm": "grad_norm",
        "train/tokens_per_second": "tokens_per_second",
    },
    EvalRecord: {"val/loss": "loss", "val/perplexity": "perplexity", "val/bits_per_byte": "bits_per_byte"},
    EpochRecord: {"train/loss_epoch": "train_loss"},
}
RETAIN_KEYS = ("retain/loss_before", "retain/loss")  # of the summary: --retain-data before training and after
TAG_LENGTH = 64  # a longer tag makes wandb.init raise


def wandb_row(record: Record) -> dict[str, float]:
    """The history row of a record, without its step; {} for an event, which goes to the summary instead."""
    if isinstance(record, EventRecord):
        return {}
    fields = {axis: axis for axis in AXES} | COLUMNS[type(record)]
    values = {name: getattr(record, field) for name, field in fields.items()}
    return {name: value for name, value in values.items() if value is not None}


def reference_row(row: ReferenceRow) -> dict[str, float]:
    """The same names for one line of the card's table; its samples and tokens are not known and left out."""
    return {
        "epoch": float(row.epoch),
        "train/loss": row.train_loss,
        "train/loss_epoch": row.train_loss,
        "val/loss": row.val_loss,
        "val/perplexity": row.perplexity,
    }


def wandb_summary(record: EventRecord) -> dict[str, Any]:
    """What an event adds to the summary: the facts of the end of the run, else the event's own message."""
    if record.event == "finished":
        return dict(flatten(record.facts, "/"))
    if record.event == "diagnosis":  # several of them may be true
        return {f"event/diagnosis/{record.facts['code']}": record.message}
    if record.event == "test_evaluation" and record.step:
        return {"test/loss": record.facts["loss"], "test/bits_per_byte": record.facts["bits_per_byte"]}
    if record.event == "retain_evaluation":
        return {RETAIN_KEYS[record.step > 0]: record.facts["loss"]}
    return {f"event/{record.event}": record.message}


def wandb_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run that run.json describes: one flat name per fact, so that any of them can be a column.

    `run` holds run.json whole beside them: what a comparison reads back, wherever the run's folder is. Settings keep
    the name of their field (LoRA's are prefixed `lora_`); what was resolved (the rate, the batch sum, the precision)
    replaces what was asked for.
    """
    settings, model, data = metadata["settings"], metadata["model"], metadata["data"]
    config: dict[str, Any] = {name: metadata[name] for name in ("mode", "preset", "overridden")}
    for group in ("model", "data", "train", "engine"):
        config |= settings[group]
    if metadata["mode"] == "lora":
        config |= {f"lora_{name}": value for name, value in settings["lora"].items() if name != "target_modules"}
        config["lora_targets"] = model["lora_targets"]
    config |= metadata["resolved"]
    config |= {
        f"data_{name}": data.get(name) for name in ("fingerprint", "train_fingerprint", "val_fingerprint", "split")
    }
    for side in ("train", "val"):
        config |= {f"{side}_{name}": count for name, count in data[side].items()}
    config |= {name: data[name] for name in ("tokenizer", "vocabulary")}
    config |= {name: model[key] for name, key in _MODEL_NAMES.items()}
    config |= {name: metadata[name] for name in ("deepspeed", "versions", "hardware")}
    config["git_commit"] = (metadata.get("git") or {}).get("commit")
    return config | {"run": dict(metadata)}


_MODEL_NAMES = {  # {name on W&B: key of run.json's model}
    "model_class": "class",
    "model_fingerprint": "fingerprint",
    "parameters": "parameters",
    "trainable_parameters": "trainable",
    "trainable_share": "share",
}


def data_name(source: str) -> str:
    """The short name of a data source: the last part of a path or hub id, without its ending."""
    stem = re.sub(r"\.\w+$", "", source.rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^A-Za-z0-9_.+-]", "-", stem).strip("-") or "data"


def run_group(source: str) -> str:
    """The group in which the runs of one comparison meet."""
    return f"full-vs-lora-{data_name(source)}"[:128]


def run_tags(mode: str, model: str, source: str) -> list[str]:
    """Mode, model and data as tags, cut to the length that W&B takes."""
    return list(dict.fromkeys(tag[:TAG_LENGTH] for tag in (mode, data_name(model), data_name(source))))
