"""Makes run folders as a training run leaves them, from formulas instead of training, for the tests of the report."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from trainer.config.run_metadata import SCHEMA_VERSION
from trainer.config.settings import resolve
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, EvalSplit, write_evaluation
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, StepRecord, perplexity, to_line
from trainer.training.schedule import learning_rate

NUM_EXAMPLES = 240
NUM_PARAMS = 2_000_000
BLOCK_SIZE = 256
#: where the invented validation loss starts, and the floor it falls to by mode
INITIAL_LOSS = 4.0
LOSS_FLOOR = {"full": 2.0, "lora": 2.1}


def count_split(num_records: int, num_examples: int) -> dict[str, int]:
    """The counts of a split of joined texts."""
    return {
        "records": num_records,
        "examples": num_examples,
        "tokens": num_examples * BLOCK_SIZE,
        "num_target_tokens": num_examples * (BLOCK_SIZE - 1),
    }


def make_metadata(mode: str = "full", *, seed: int = 42, preset: str = "demo", **overrides: Any) -> dict[str, Any]:
    """The content of a run.json of `mode`; `overrides` replace nested values, with dots as `__`: data__vocabulary=9."""
    settings = resolve(mode, preset, {"train": {"seed": seed}}, overridden=("--seed",))
    steps_per_epoch = math.ceil(NUM_EXAMPLES / settings.train.global_batch)
    num_trainable = NUM_PARAMS if mode == "full" else 19_000
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "run_id": f"{mode}{seed:04d}",
        "name": f"{mode}-s{seed}",
        "mode": mode,
        "preset": preset,
        "started": "2026-01-02T03:04:05+00:00",
        "command": ["launch/train.py", "--mode", mode],
        "settings": settings.as_dict(),
        "overridden": ["--seed"],
        "not_comparable_with_card": [],
        "resolved": {
            "lr": settings.train.lr,
            "precision": "fp32",
            "ds_config": "zero0",
            "ds_reason": "one rank",
            "ranks": 1,
            "nodes": 1,
            "device": "cpu",
            "backend": "gloo",
            "threads_per_rank": 2,
            "micro_batch": 8,
            "accumulation": 1,
            "global_batch": 8,
            "steps_per_epoch": steps_per_epoch,
            "total_steps": 3 * steps_per_epoch,
            "warmup_steps": 0,
            "dropout": 0.1,
        },
        "execution": [{"step": 0, "reason": "as planned"}],
        "deepspeed": {"train_batch_size": 8, "zero_optimization": {"stage": 0}},
        "data": {
            "source": "acled-demo",
            "fingerprint": "d1" * 8,
            "train_fingerprint": "a1" * 8,
            "val_fingerprint": "b1" * 8,
            "split": "hash 0.1",
            "tokenizer": "c1" * 8,
            "vocabulary": 4096,
            "objective": "blocks",
            "block_size": BLOCK_SIZE,
            "train": count_split(900, NUM_EXAMPLES),
            "val": count_split(100, 27),
            "notices": ["41 tail tokens dropped"],
        },
        "model": {
            "name": "demo-base",
            "init": "pretrained",
            "class": "GPT2LMHeadModel",
            "parameters": NUM_PARAMS,
            "trainable": num_trainable,
            "share": num_trainable / NUM_PARAMS,
            "fingerprint": "e1" * 8,
            "lora_targets": ["c_attn", "c_fc"] if mode == "lora" else [],
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": {"commit": "0" * 40, "dirty": False},
        "hardware": {"cpu": "some cpu", "cores": 2, "memory_gb": 8.0, "gpu": None, "gpus": 0},
        "wandb": {
            "id": f"{mode}{seed:04d}",
            "project": "gpt2-full-vs-lora",
            "group": "full-vs-lora-acled-demo",
            "mode": "offline",
        },
    }
    for path, value in overrides.items():
        section: dict[str, Any] = metadata
        *sections, key = path.split("__")
        for section_name in sections:
            section = section[section_name]
        section[key] = value
    return metadata


def make_reference_like_metadata(mode: str = "full", **overrides: Any) -> dict[str, Any]:
    """A run of which all that is known of the card agrees: 13,242 blocks of 1,024, GPT-2, its vocabulary, 3 epochs."""
    reference_values = {
        "data__source": "export.csv",
        "data__vocabulary": 50_257,
        "data__block_size": 1024,
        "model__name": "gpt2",
        "model__parameters": 124_439_808,
        "model__trainable": 124_439_808 if mode == "full" else 1_179_648,
        "resolved__steps_per_epoch": 6_621,
        "resolved__total_steps": 19_863,
        "resolved__global_batch": 2,
    }
    metadata = make_metadata(mode, preset="card", **{**reference_values, **overrides})
    metadata["data"]["train"]["examples"] = overrides.get("data__train__examples", 13_242)
    return metadata


def synthetic_val_loss(epoch: float, floor: float) -> float:
    """An invented curve: from INITIAL_LOSS towards `floor`."""
    return floor + (INITIAL_LOSS - floor) * math.exp(-1.5 * epoch)


def make_records(
    metadata: Mapping[str, Any],
    *,
    floor: float | None = None,
    losses: Mapping[float, float] | None = None,
    epochs: int = 3,
    every: int = 1,
    finished: bool = True,
    wall_seconds: float = 100.0,
    peak_memory_bytes: int = 1_000_000_000,
    retained: Sequence[float] = (),
) -> list[Record]:
    """Records of such a run: a step row every `every` steps, evaluations at step 0 and each epoch (`losses`)."""
    steps_per_epoch, global_batch = metadata["resolved"]["steps_per_epoch"], metadata["resolved"]["global_batch"]
    floor = LOSS_FLOOR[metadata["mode"]] if floor is None else floor
    total_steps = steps_per_epoch * epochs
    step_seconds, step_tokens = wall_seconds / total_steps, global_batch * metadata["data"]["block_size"]

    def record_axes(step: int) -> dict[str, Any]:
        return {
            "step": step,
            "epoch": step / steps_per_epoch,
            "samples": step * global_batch,
            "tokens": step * step_tokens,
            "time": step * step_seconds,
        }

    def loss_at(epoch: float) -> float:
        return synthetic_val_loss(epoch, floor)

    def make_evals(step: int) -> list[Record]:
        epoch, num_targets = step / steps_per_epoch, metadata["data"]["val"]["num_target_tokens"]
        if losses is not None and epoch not in losses:
            return []
        loss = loss_at(epoch) if losses is None else losses[epoch]
        return [EvalRecord(**record_axes(step), loss=loss, perplexity=perplexity(loss), eval_tokens=num_targets)]

    records = make_evals(0)
    records += [
        EventRecord(event="retain_evaluation", step=n * total_steps, message="", time=0.0, facts={"loss": loss})
        for n, loss in enumerate(retained)
    ]
    for step in range(1, total_steps + 1):
        if step % every == 0 or step == total_steps:
            loss = loss_at(step / steps_per_epoch) + 0.05 * math.sin(step)
            lr = learning_rate(step - 1, peak_lr=metadata["resolved"]["lr"], warmup_steps=0, total_steps=total_steps)
            records.append(
                StepRecord(
                    **record_axes(step),
                    loss=loss,
                    lr=lr,
                    grad_norm=1 + 0.2 * math.cos(step),
                    tokens_per_second=step_tokens / step_seconds,
                )
            )
        if step % steps_per_epoch == 0:
            epoch = step // steps_per_epoch
            axes = {**record_axes(step), "epoch": epoch}
            records += [EpochRecord(**axes, train_loss=loss_at(epoch - 0.5)), *make_evals(step)]
    if not finished:
        return [record for record in records if record.step < total_steps]
    evals = [
        {"step": record.step, "epoch": record.epoch, "loss": record.loss}
        for record in records
        if isinstance(record, EvalRecord)
    ]
    summary = {
        "wall_seconds": wall_seconds,
        "device_hours": wall_seconds / 3600,
        "peak_memory_bytes": peak_memory_bytes,
        "checkpoint_bytes": 24_000_000,
        "export_bytes": 8_000_000,
        "best": min(evals, key=lambda row: row["loss"], default=None),
        "final": evals[-1] if evals else None,
    }
    end = EventRecord(event="finished", step=total_steps, message="done", time=wall_seconds, facts=summary)
    return [*records, end]


def write_eval_records(
    folder: Path,
    losses_by_step: Mapping[int, Sequence[float]],
    *,
    targets: Sequence[int],
    split: EvalSplit = "val",
    groups: Sequence[str | None] | None = None,
    ids: Sequence[str] | None = None,
    num_in_train: int = 0,
    bytes_per_target: int = 4,
) -> Path:
    """eval_records/ of a run folder: `losses_by_step` in nats per token of each record at each evaluation."""
    columns = {
        "id": ids or [f"record{i:04d}" for i in range(len(targets))],
        "occurrence": 0,
        "group": groups or [None] * len(targets),
        "targets": targets,
        "bytes": [bytes_per_target * n for n in targets],
        "in_train": [i < num_in_train for i in range(len(targets))],
    }
    for step, losses in losses_by_step.items():
        nll = np.asarray(losses, np.float64) * np.asarray(targets)
        write_evaluation(folder / EVAL_RECORDS_FOLDER, pd.DataFrame(columns), step=step, split=split, nll=nll)
    return folder


def write_run_folder(folder: Path, metadata: Mapping[str, Any], records: list[Record]) -> Path:
    """The run folder with both files; returns it."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(metadata))
    (folder / "metrics.jsonl").write_text("".join(to_line(record) + "\n" for record in records))
    return folder


def make_run_folder(
    folder: Path,
    mode: str = "full",
    *,
    seed: int = 42,
    metadata: Mapping[str, Any] | None = None,
    **record_options: Any,
) -> Path:
    """A run folder of `mode` in one call; `record_options` go to `make_records`."""
    run_metadata = copy.deepcopy(dict(metadata)) if metadata is not None else make_metadata(mode, seed=seed)
    return write_run_folder(folder, run_metadata, make_records(run_metadata, **record_options))
