"""Makes run folders as a training run leaves them, from formulas instead of training."""

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

NUM_EXAMPLES, NUM_PARAMS, BLOCK_SIZE = 240, 2_000_000, 256
INITIAL_LOSS, LOSS_FLOOR = 4.0, {"full": 2.0, "lora": 2.1}  # of the invented validation loss


def make_metadata(mode: str = "full", *, seed: int = 42, preset: str = "demo", **overrides: Any) -> dict[str, Any]:
    """The content of a run.json of `mode`; `overrides` replace nested values, with dots as `__`: data__vocabulary=9."""
    settings = resolve(mode, preset, {"train": {"seed": seed}}, overridden=("--seed",))
    steps_per_epoch = math.ceil(NUM_EXAMPLES / settings.train.global_batch)
    num_trainable = NUM_PARAMS if mode == "full" else 19_000

    def count_split(num_records: int, num_examples: int) -> dict[str, int]:
        tokens = {"tokens": num_examples * BLOCK_SIZE, "num_target_tokens": num_examples * (BLOCK_SIZE - 1)}
        return {"records": num_records, "examples": num_examples, **tokens}

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
            **{"lr": settings.train.lr, "precision": "fp32", "ds_config": "zero0", "ds_reason": "one rank"},
            **{"ranks": 1, "nodes": 1, "device": "cpu", "threads_per_rank": 2},
            **{"micro_batch": 8, "accumulation": 1, "global_batch": 8, "warmup_steps": 0, "dropout": 0.1},
            **{"steps_per_epoch": steps_per_epoch, "total_steps": 3 * steps_per_epoch},
        },
        "execution": [{"step": 0, "reason": "as planned", "path": "eager"}],
        "deepspeed": {"train_batch_size": 8, "zero_optimization": {"stage": 0}},
        "data": {
            **{"source": "acled-demo", "form": "acled", "split": "hash 0.1", "vocabulary": 4096, "objective": "blocks"},
            **{"fingerprint": "d1" * 8, "train_fingerprint": "a1" * 8, "val_fingerprint": "b1" * 8},
            **{"tokenizer": "c1" * 8, "block_size": BLOCK_SIZE, "notices": ["41 tail tokens dropped"]},
            **{"train": count_split(900, NUM_EXAMPLES), "val": count_split(100, 27)},
        },
        "model": {
            **{"name": "demo-base", "init": "pretrained", "class": "GPT2LMHeadModel", "fingerprint": "e1" * 8},
            **{"parameters": NUM_PARAMS, "trainable": num_trainable, "share": num_trainable / NUM_PARAMS},
            "lora_targets": ["c_attn", "c_fc"] if mode == "lora" else [],
        },
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": {"commit": "0" * 40, "dirty": False},
        "hardware": {"cpu": "some cpu", "cores": 2, "memory_gb": 8.0, "gpu": None, "gpus": 0},
        "wandb": {
            **{"id": f"{mode}{seed:04d}", "mode": "offline"},
            **{"project": "gpt2-full-vs-lora", "group": "full-vs-lora-acled-demo"},
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
    num_parameters = 124_439_808
    reference_values = {
        **{"data__source": "export.csv", "data__vocabulary": 50_257, "data__block_size": 1024},
        **{"model__name": "gpt2", "model__parameters": num_parameters, "data__train__examples": 13_242},
        "model__trainable": num_parameters if mode == "full" else 1_179_648,
        **{"resolved__steps_per_epoch": 6_621, "resolved__total_steps": 19_863, "resolved__global_batch": 2},
    }
    return make_metadata(mode, preset="card", **{**reference_values, **overrides})


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
) -> list[Record]:
    """Records of such a run: a step row every `every` steps, evaluations at step 0 and each epoch (`losses`)."""
    steps_per_epoch, global_batch = metadata["resolved"]["steps_per_epoch"], metadata["resolved"]["global_batch"]
    floor = LOSS_FLOOR[metadata["mode"]] if floor is None else floor
    total_steps = steps_per_epoch * epochs
    step_seconds, step_tokens = wall_seconds / total_steps, global_batch * metadata["data"]["block_size"]
    records: list[Record] = []

    for step in range(total_steps + 1):
        epoch = step / steps_per_epoch
        axes: dict[str, Any] = {"step": step, "epoch": epoch, "samples": step * global_batch}
        axes |= {"tokens": step * step_tokens, "time": step * step_seconds}
        if step and (step % every == 0 or step == total_steps):
            lr = metadata["resolved"]["lr"] * (total_steps - step + 1) / total_steps
            values = {"lr": lr, "grad_norm": 1 + 0.2 * math.cos(step), "tokens_per_second": step_tokens / step_seconds}
            loss = synthetic_val_loss(epoch, floor) + 0.05 * math.sin(step)
            records.append(StepRecord(**axes, loss=loss, **values))
        if step and step % steps_per_epoch == 0:
            records.append(EpochRecord(**axes, train_loss=synthetic_val_loss(epoch - 0.5, floor)))
        if step % steps_per_epoch == 0 and (losses is None or epoch in losses):
            loss = synthetic_val_loss(epoch, floor) if losses is None else losses[epoch]
            num_targets = metadata["data"]["val"]["num_target_tokens"]
            records.append(EvalRecord(**axes, loss=loss, perplexity=perplexity(loss), eval_tokens=num_targets))
    if not finished:
        return [record for record in records if record.step < total_steps]
    evaluations = [record for record in records if isinstance(record, EvalRecord)]
    evals = [{name: getattr(record, name) for name in ("step", "epoch", "loss")} for record in evaluations]
    facts: dict[str, Any] = {"wall_seconds": wall_seconds, "peak_memory_bytes": peak_memory_bytes}
    facts |= {"checkpoint_bytes": 24_000_000, "device_hours": wall_seconds / 3600, "export_bytes": 8_000_000}
    facts |= {"final": evals[-1] if evals else None, "best": min(evals, key=lambda row: row["loss"], default=None)}
    time = total_steps * step_seconds
    return [*records, EventRecord(event="finished", step=total_steps, message="", time=time, facts=facts)]


def write_eval_records(
    folder: Path,
    losses_by_step: Mapping[int, Sequence[float]],
    *,
    targets: Sequence[int],
    split: EvalSplit = "val",
    groups: Sequence[str | None] | None = None,
    ids: Sequence[str] | None = None,
    num_seen: int = 0,
    bytes_per_target: int = 4,
    scores: Mapping[str, Sequence[float | None]] | None = None,
) -> Path:
    """eval_records/ of a run folder: `losses_by_step` (nats per token) and `scores` by `score_name` of each record."""
    columns = {
        "id": ids or [f"record{i:04d}" for i in range(len(targets))],
        "occurrence": 0,
        "group": groups or [None] * len(targets),
        "targets": targets,
        "bytes": [bytes_per_target * n for n in targets],
        "is_seen": [i < num_seen for i in range(len(targets))],
        "excerpt": [f"text {i:04d}" for i in range(len(targets))],
    }
    for step, losses in losses_by_step.items():
        nll, place = np.asarray(losses, np.float64) * np.asarray(targets), folder / EVAL_RECORDS_FOLDER
        write_evaluation(place, pd.DataFrame(columns), step=step, split=split, nll=nll, scores=scores)
    return folder


def write_run_folder(folder: Path, metadata: Mapping[str, Any], records: Sequence[Record]) -> Path:
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
