"""One rank of one variant, or the ceiling: `python -m trainer.tools.bench.worker JOB`, which writes its result as JSON."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.data.sampler import epoch_order, step_batches
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import leave_world, peak_memory, start_world
from trainer.tools.bench import runners
from trainer.tools.bench.configs import Variant, flops_per_token
from trainer.tracking.silence import quiet
from trainer.training.loop import evaluate


def main(job_file: str) -> None:
    """Do the job that the file names and write its result beside it."""
    quiet()
    job = json.loads(Path(job_file).read_text())
    variant = Variant(**job["variant"])
    result = ceiling(variant) if job["kind"] == "ceiling" else measure(variant)
    if result is not None:
        Path(job["result"]).write_text(json.dumps(result))


def measure(variant: Variant) -> dict[str, Any] | None:
    """The times of a variant, in seconds, and what else it used; None on the ranks that do not speak."""
    world = start_world(variant.device)
    try:
        torch.set_num_threads(world.threads)
        began = time.perf_counter()
        bench = runners.make(variant, world)
        made: Engine | None = None
        if variant.program == "ours":
            steps, made = runners.ours(bench)
        else:
            steps = {"plain": runners.plain}.get(variant.program, runners.hugging_face)(bench)
        windows, first = timed(steps, variant, _waiter(world.device))
        result = {
            "windows": windows,
            "first_step": first - began,
            "peak_memory": max(world.gather(peak_memory(world.device))),
            "input": _input_seconds(bench),
            "eval": _eval_seconds(bench, made) if made is not None else None,
            "threads": world.threads,
            "flops_per_token": _flops(bench),
        }
        return result if world.rank == 0 else None
    finally:
        leave_world()


def timed(steps: Iterator[None], variant: Variant, wait: Callable[[], None]) -> tuple[list[float], float]:
    """(seconds per step of each window, when the first step was done). `wait`: until the device has caught up."""
    first = 0.0
    for number in range(variant.warmup):
        next(steps)
        if not number:
            wait()
            first = time.perf_counter()
    windows = []
    for _ in range(variant.windows):
        wait()
        began = time.perf_counter()
        for _ in range(variant.window):
            next(steps)
        wait()
        windows.append((time.perf_counter() - began) / variant.window)
    return windows, first


def _waiter(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _input_seconds(bench: runners.Bench) -> float:
    """Seconds to draw one step's micro-batches, measured apart."""
    data, batch = bench.data.train, bench.settings.train.batch(bench.world.size)
    order = epoch_order(data, seed=42, epoch=0, global_batch=batch.global_batch, shuffle=True, by_length=False)
    times = []
    for step in range(min(20, bench.variant.steps)):
        began = time.perf_counter()
        step_batches(data, order, step, batch, bench.world.rank, 0)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _eval_seconds(bench: runners.Bench, made: Engine) -> float:
    """Seconds per evaluated token, over all ranks; a first pass warms up."""
    wait = _waiter(bench.world.device)
    evaluate(made, bench.data.val, bench.variant.batch)
    wait()
    began = time.perf_counter()
    evaluate(made, bench.data.val, bench.variant.batch)
    wait()
    return (time.perf_counter() - began) / int(bench.data.val.lengths().sum())


def _flops(bench: runners.Bench) -> float:
    config, facts = bench.model.causal.config, bench.model.facts
    return flops_per_token(
        mode=bench.variant.mode, parameters=facts["parameters"], trainable=facts["trainable"],
        layers=config.num_hidden_layers, width=config.hidden_size, block_size=bench.variant.block_size,
    )  # fmt: skip


def ceiling(variant: Variant) -> dict[str, Any]:
    """The rate of one large matrix product in the variant's precision: what arithmetic can reach here, FLOP/s."""
    size = 8192 if variant.device == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(variant.precision, torch.float32)
    world = start_world(variant.device)
    torch.set_num_threads(world.threads)
    a, b = (torch.randn(size, size, dtype=dtype, device=world.device) for _ in range(2))
    wait = _waiter(world.device)
    times = []
    for _ in range(12):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - began)
    name = torch.cuda.get_device_name() if variant.device == "cuda" else None
    leave_world()
    return {"flops": 2 * size**3 / statistics.median(times[2:]), "gpu": name, "threads": world.threads}


if __name__ == "__main__":
    main(sys.argv[1])
