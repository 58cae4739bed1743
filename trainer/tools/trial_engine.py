"""The engine of a few steps beside a run: what bench, `--find-batch` and `doctor.py --prove` measure."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import DistContext
from trainer.model.build import TrainableModel, build_model, load_config
from trainer.tracking.records import StepRecord
from trainer.training.loop import train
from trainer.training.run_plan import RunPlan, make_plan
from trainer.training.schedule import TrainState


def start_trial(
    settings: Settings, data: PreparedDataset, dist_context: DistContext, model: TrainableModel | None = None
) -> tuple[RunPlan, Engine]:
    """The plan of a run of these settings and its engine. `model`: where it is built already."""
    model = model or build_model(settings, with_fingerprint=False, device=dist_context.device)
    plan = make_plan(settings, dist_context, data, model.metadata, load_config(settings.model))
    return plan, Engine(dist_context, model, plan.deepspeed_config, plan.settings.train, plan.execution)


def take_steps(plan: RunPlan, engine: Engine, data: PreparedDataset) -> Iterator[StepRecord]:
    """The run's own loop, step by step; nothing is saved, nor evaluated before the first step."""
    nothing_saved: Any = SimpleNamespace(save=lambda *_: None)
    state = TrainState(eval_pending=False)
    for record in train(engine, data, plan.schedule, state, nothing_saved, lambda: False):
        if isinstance(record, StepRecord):
            yield record


def device_seconds(work: Callable[[], object], device: torch.device, num_times: int = 1) -> float:
    """How long the device takes for a piece of work, which finds it idle: the mean of so many in a row."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start_time = time.perf_counter()
    for _ in range(num_times):
        work()
    synchronize()
    return (time.perf_counter() - start_time) / num_times


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_bytes` begin anew: the allocator's peak, or the one that Linux counts of this process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
