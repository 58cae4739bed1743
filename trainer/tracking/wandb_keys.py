"""What is called how on Weights & Biases and TensorBoard: the one place that knows; needs neither of them, nor torch.

The names are those of Hugging Face's Trainer, so that its runs and ours share their panels. Every row carries all x
axes (`AXES`): runs with different batches line up by epoch, examples or tokens.
"""

from collections.abc import Mapping
from typing import Any

from trainer.config.reference import ReferenceRow
from trainer.config.text import flatten
from trainer.tracking.records import EpochRecord, EventRecord, OtherEvalRecord, Record, StepRecord

#: x axis -> field of the record; the first one is that of W&B's panels, as the Trainer has it
AXES = {"train/global_step": "step", "train/epoch": "epoch", "examples": "samples", "tokens": "tokens"}
#: pattern -> what the summary keeps
METRICS = {"train/*": None, "eval/*": "min,last", "eval_*": "min,last", "sample/*": None}
STEP_COLUMNS = {
    **{"train/loss": "loss", "train/learning_rate": "lr", "train/grad_norm": "grad_norm"},
    "train/tokens_per_second": "tokens_per_second",
}


def wandb_row(record: Record) -> dict[str, float]:
    """The history row of a record, without its step; {} for an event, which goes to the summary, but for samples."""
    if isinstance(record, EventRecord):
        facts = {"step": record.step, **record.facts}
        return {axis: facts[name] for axis, name in AXES.items()} if record.event == "samples" else {}
    if isinstance(record, StepRecord):
        columns = STEP_COLUMNS
    elif isinstance(record, EpochRecord):
        columns = {"train/loss_epoch": "train_loss"}
    else:
        group = f"eval_{record.val_set}" if isinstance(record, OtherEvalRecord) else "eval"
        columns = {f"{group}/{name}": name for name in ("loss", "perplexity", "bits_per_byte")}
    values = {name: getattr(record, field) for name, field in (AXES | columns).items()}
    return {name: value for name, value in values.items() if value is not None}


def reference_row(row: ReferenceRow) -> dict[str, float]:
    """The same names for one line of the card's table; its examples and tokens are not known and left out."""
    return {
        "train/global_step": row.step,
        "train/epoch": float(row.epoch),
        "train/loss": row.train_loss,
        "train/loss_epoch": row.train_loss,
        "eval/loss": row.val_loss,
        "eval/perplexity": row.perplexity,
    }


def wandb_summary(record: EventRecord) -> dict[str, Any]:
    """What an event adds to the summary: the facts of the end of the run, else the event's own message."""
    if record.event == "finished":
        return dict(flatten(record.facts, "/"))
    if record.event == "diagnosis":  # several of them may be true
        return {f"event/diagnosis/{record.facts['code']}": record.message}
    if record.event == "test_evaluation" and record.step:
        return {"test/loss": record.facts["loss"], "test/bits_per_byte": record.facts["bits_per_byte"]}
    if record.event in ("test_scores", "retain_scores"):
        split = record.event.removesuffix("_scores")
        return {f"{split}/score_{name}": score for name, score in record.facts["scores"].items()}
    if record.event == "retain_evaluation":
        return {"retain/loss" if record.step else "retain/loss_before": record.facts["loss"]}
    return {f"event/{record.event}": record.message} if record.message else {}


def wandb_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run that run.json describes: one flat name per fact, so that any of them can be a column.
    Settings keep the name of their field (LoRA's are prefixed `lora_`); what was resolved (the rate, the batch sum, the
    precision) replaces what was asked for."""
    settings, model, data = metadata["settings"], metadata["model"], metadata["data"]
    config = {name: metadata[name] for name in ("mode", "preset", "overridden", "deepspeed", "versions", "hardware")}
    config |= {name: value for group in ("model", "data", "train", "engine") for name, value in settings[group].items()}
    if metadata["mode"] == "lora":
        config |= {f"lora_{name}": value for name, value in settings["lora"].items() if name != "target_modules"}
        config["lora_targets"] = model["lora_targets"]
    return {
        **config,
        **metadata["resolved"],
        **{f"data_{name}": data.get(name) for name in ("fingerprint", "train_fingerprint", "val_fingerprint", "split")},
        **{f"{side}_{name}": count for side in ("train", "val") for name, count in data[side].items()},
        "tokenizer": data["tokenizer"],
        "vocabulary": data["vocabulary"],
        "model_class": model["class"],
        "base_model": model.get("base", model["name"]),
        "model_fingerprint": model["fingerprint"],
        "parameters": model["parameters"],
        "trainable_parameters": model["trainable"],
        "trainable_share": model["share"],
        "git_commit": (metadata.get("git") or {}).get("commit"),
    }
