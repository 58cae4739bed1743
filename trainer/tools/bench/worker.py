"""One rank of one variant, or the ceiling: `python -m trainer.tools.bench.worker JOB`, which writes its result as
JSON."""

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
from trainer.distributed.process_group import destroy_process_group, init_distributed, peak_memory_bytes
from trainer.tools.bench import runners
from trainer.tools.bench.configs import BenchmarkConfig, flops_per_token
from trainer.tracking.silence import silence_libraries
from trainer.training.evaluation import evaluate


def main(job_file: str) -> None:
    """Do the job that the file names and write its result beside it."""
    silence_libraries()
    job = json.loads(Path(job_file).read_text())
    config = BenchmarkConfig(**job["variant"])
    result = measure_ceiling(config) if job["kind"] == "ceiling" else measure(config)
    if result is not None:
        Path(job["result"]).write_text(json.dumps(result))


def measure(config: BenchmarkConfig) -> dict[str, Any] | None:
    """The times of a variant, in seconds, and what else it used; None on the ranks that do not speak."""
    dist_context = init_distributed(config.device)
    try:
        torch.set_num_threads(dist_context.num_threads)
        start_time = time.perf_counter()
        setup = runners.build_setup(config, dist_context)
        engine: Engine | None = None
        if config.program == "ours":
            steps, engine = runners.run_ours(setup)
        else:
            steps = {"plain": runners.run_plain}.get(config.program, runners.run_hf_trainer)(setup)
        window_seconds, first_step_time = time_windows(steps, config, _synchronizer(dist_context.device))
        result = {
            "windows": window_seconds,
            "first_step": first_step_time - start_time,
            "peak_memory": max(dist_context.all_gather_object(peak_memory_bytes(dist_context.device))),
            "input": _input_seconds(setup),
            "eval": _eval_seconds(setup, engine) if engine is not None else None,
            "threads": dist_context.num_threads,
            "flops_per_token": _flops(setup),
        }
        return result if dist_context.rank == 0 else None
    finally:
        destroy_process_group()


def time_windows(
    steps: Iterator[None], config: BenchmarkConfig, synchronize: Callable[[], None]
) -> tuple[list[float], float]:
    """(seconds per step of each window, when the first step was done). `wait`: until the device has caught up."""
    first_step_time = 0.0
    for step in range(config.warmup_steps):
        next(steps)
        if not step:
            synchronize()
            first_step_time = time.perf_counter()
    window_seconds = []
    for _ in range(config.num_windows):
        synchronize()
        start_time = time.perf_counter()
        for _ in range(config.steps_per_window):
            next(steps)
        synchronize()
        window_seconds.append((time.perf_counter() - start_time) / config.steps_per_window)
    return window_seconds, first_step_time


def _synchronizer(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _input_seconds(setup: runners.BenchmarkSetup) -> float:
    """Seconds to draw one step's micro-batches, measured apart."""
    data, batch = setup.data.train, setup.settings.train.batch(setup.dist_context.world_size)
    order = epoch_order(data, seed=42, epoch=0, global_batch=batch.global_batch, shuffle=True, group_by_length=False)
    times = []
    for step in range(min(20, setup.config.steps)):
        start_time = time.perf_counter()
        step_batches(data, order, step, batch, setup.dist_context.rank, 0)
        times.append(time.perf_counter() - start_time)
    return statistics.median(times)


def _eval_seconds(setup: runners.BenchmarkSetup, engine: Engine) -> float:
    """Seconds per evaluated token, over all ranks; a first pass warms up."""
    synchronize = _synchronizer(setup.dist_context.device)
    evaluate(engine, setup.data.val, setup.config.global_batch)
    synchronize()
    start_time = time.perf_counter()
    evaluate(engine, setup.data.val, setup.config.global_batch)
    synchronize()
    return (time.perf_counter() - start_time) / int(setup.data.val.lengths().sum())


def _flops(setup: runners.BenchmarkSetup) -> float:
    model_config, model_metadata = setup.model.causal.config, setup.model.metadata
    return flops_per_token(
        mode=setup.config.mode, num_parameters=model_metadata["parameters"], num_trainable=model_metadata["trainable"],
        num_layers=model_config.num_hidden_layers, hidden_size=model_config.hidden_size,
        block_size=setup.config.block_size,
    )  # fmt: skip


def measure_ceiling(config: BenchmarkConfig) -> dict[str, Any]:
    """The rate of one large matrix product in the variant's precision: what arithmetic can reach here, FLOP/s."""
    matrix_size = 8192 if config.device == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)
    dist_context = init_distributed(config.device)
    torch.set_num_threads(dist_context.num_threads)
    a, b = (torch.randn(matrix_size, matrix_size, dtype=dtype, device=dist_context.device) for _ in range(2))
    synchronize = _synchronizer(dist_context.device)
    times = []
    for _ in range(12):
        synchronize()
        start_time = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start_time)
    gpu_name = torch.cuda.get_device_name() if config.device == "cuda" else None
    destroy_process_group()
    return {
        "flops": 2 * matrix_size**3 / statistics.median(times[2:]),
        "gpu": gpu_name,
        "threads": dist_context.num_threads,
    }


if __name__ == "__main__":
    main(sys.argv[1])
