"""Makes run folders as a training run leaves them, from formulas instead of training, for the tests of the report."""

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config import schema
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, Record, StepRecord, perplexity, to_line
from trainer.training.lr_schedule import learning_rate

EXAMPLES = 240
BLOCK = 256
#: where the invented validation loss starts, and the floor it falls to by mode
BASE_LOSS = 4.0
FLOOR = {"full": 2.0, "lora": 2.1}


def facts(mode: str = "full", *, seed: int = 42, preset: str = "demo", **given: Any) -> dict[str, Any]:
    """The content of a run.json of `mode`; `given` replaces nested values, with dots as `__`: data__vocabulary=9."""
    chosen = schema.resolve(mode, preset, {"train": {"seed": seed}}, overridden=("--seed",))
    steps = math.ceil(EXAMPLES / chosen.train.global_batch)
    total = 2_000_000
    trainable = total if mode == "full" else 19_000
    run = {
        "format": 1,
        "run_id": f"{mode}{seed:04d}",
        "name": f"{mode}-s{seed}",
        "mode": mode,
        "preset": preset,
        "started": "2026-01-02T03:04:05+00:00",
        "command": ["launch/train.py", "--mode", mode],
        "settings": chosen.as_dict(),
        "overridden": ["--seed"],
        "resolved": {
            "lr": chosen.train.lr,
            "precision": "fp32",
            "ds_config": "zero0",
            "ds_reason": "one rank",
            "ranks": 1,
            "nodes": 1,
            "device": "cpu",
            "backend": "gloo",
            "micro_batch": 8,
            "accumulation": 1,
            "global_batch": 8,
            "steps_per_epoch": steps,
            "total_steps": 3 * steps,
            "threads_per_rank": 2,
            "dropout": 0.1,
            "adapters_fused": mode == "lora",
        },
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
            "block_size": BLOCK,
            "train": {
                "records": 900,
                "examples": EXAMPLES,
                "tokens": EXAMPLES * BLOCK,
                "counted_tokens": EXAMPLES * (BLOCK - 1),
            },
            "val": {"records": 100, "examples": 27, "tokens": 27 * BLOCK, "counted_tokens": 27 * (BLOCK - 1)},
            "notices": ["41 tail tokens dropped"],
        },
        "model": {
            "name": "demo-base",
            "class": "GPT2LMHeadModel",
            "parameters": total,
            "trainable": trainable,
            "share": trainable / total,
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
    for path, value in given.items():
        where: dict[str, Any] = run
        *groups, last = path.split("__")
        for group in groups:
            where = where[group]
        where[last] = value
    return run


def like_the_card(mode: str = "full", **given: Any) -> dict[str, Any]:
    """A run of which all that is known of the card agrees: 13,242 blocks of 1,024, GPT-2, its vocabulary, 3 epochs."""
    same = {
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
    run = facts(mode, preset="card", **{**same, **given})
    run["data"]["train"]["examples"] = given.get("data__train__examples", 13_242)
    return run


def val_loss(epoch: float, floor: float, base: float = BASE_LOSS) -> float:
    """An invented curve: from `base` towards `floor`."""
    return floor + (base - floor) * math.exp(-1.5 * epoch)


def rows(
    run: Mapping[str, Any],
    *,
    floor: float | None = None,
    base: float = BASE_LOSS,
    losses: Mapping[float, float] | None = None,
    epochs: int = 3,
    every: int = 1,
    finished: bool = True,
    wall_seconds: float = 100.0,
    peak_memory_bytes: int = 1_000_000_000,
) -> list[Record]:
    """The records of `run`: a step row every `every` steps, evaluations at step 0 and each epoch (`losses`)."""
    per_epoch, batch = run["resolved"]["steps_per_epoch"], run["resolved"]["global_batch"]
    block, peak = run["data"]["block_size"], run["resolved"]["lr"]
    total = per_epoch * epochs
    floor = FLOOR[run["mode"]] if floor is None else floor
    seconds = wall_seconds / total

    def seen(step: int) -> dict[str, Any]:
        samples = step * batch
        return {
            "step": step,
            "epoch": step / per_epoch,
            "samples": samples,
            "tokens": samples * block,
            "time": step * seconds,
        }

    def evaluation(step: int) -> EvalRecord:
        epoch = step / per_epoch
        loss = losses[epoch] if losses is not None else val_loss(epoch, floor, base)
        return EvalRecord(
            **seen(step), loss=loss, perplexity=perplexity(loss), eval_tokens=run["data"]["val"]["counted_tokens"]
        )

    records: list[Record] = [evaluation(0)] if losses is None or 0 in losses else []
    for step in range(1, total + 1):
        if step % every == 0 or step == total:
            loss = val_loss(step / per_epoch, floor, base) + 0.05 * math.sin(step)
            rate = learning_rate(step - 1, peak=peak, warmup=0, total=total)
            records.append(
                StepRecord(
                    **seen(step),
                    loss=loss,
                    lr=rate,
                    grad_norm=1 + 0.2 * math.cos(step),
                    tokens_per_second=batch * block / seconds,
                )
            )
        if step % per_epoch == 0:
            epoch = step // per_epoch
            records.append(EpochRecord(**{**seen(step), "epoch": epoch}, train_loss=val_loss(epoch - 0.5, floor, base)))
            if losses is None or epoch in losses:
                records.append(evaluation(step))
    if finished:
        evals = [record for record in records if isinstance(record, EvalRecord)]
        best = min(evals, key=lambda record: record.loss, default=None)
        ended = {
            "wall_seconds": wall_seconds,
            "device_hours": wall_seconds / 3600,
            "peak_memory_bytes": peak_memory_bytes,
            "checkpoint_bytes": 24_000_000,
            "export_bytes": 8_000_000,
            "best": best and {"step": best.step, "epoch": best.epoch, "loss": best.loss},
            "final": (evals and {"step": evals[-1].step, "epoch": evals[-1].epoch, "loss": evals[-1].loss}) or None,
        }
        records.append(EventRecord(event="finished", step=total, message="done", time=wall_seconds, facts=ended))
    return records


def write(folder: Path, run: Mapping[str, Any], records: list[Record]) -> Path:
    """The run folder with both files; returns it."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(to_line(record) + "\n" for record in records))
    return folder


def make(
    folder: Path, mode: str = "full", *, seed: int = 42, facts_of: Mapping[str, Any] | None = None, **how: Any
) -> Path:
    """A run folder of `mode` in one call; `how` goes to `rows`."""
    run = copy.deepcopy(dict(facts_of)) if facts_of is not None else facts(mode, seed=seed)
    return write(folder, run, rows(run, **how))
