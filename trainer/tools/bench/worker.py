"""One rank of a variant: `python -m trainer.tools.bench.worker JOB`, which writes its result."""

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.data.sampler import epoch_order, step_batches
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import destroy_process_group, init_distributed, peak_memory_bytes
from trainer.model.flops import count_step_flops
from trainer.tools.bench import runners
from trainer.tools.bench.configs import BenchmarkConfig
from trainer.tools.bench.weight_products import WeightProducts, count_layer_shapes
from trainer.tracking.silence import silence_libraries
from trainer.training.evaluation import evaluate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(job_file: str) -> None:
    """Do the job that the file names and write its result beside it."""
    silence_libraries()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    result = measure(BenchmarkConfig(**job["variant"]))
    if result is not None:
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def measure(config: BenchmarkConfig) -> dict[str, Any] | None:
    """The times of a variant, in seconds, and what else it used; None on the ranks that do not report."""
    dist_context = init_distributed(config.device)
    try:
        torch.set_num_threads(dist_context.num_threads)
        synchronize = _synchronizer(dist_context.device)
        start_time = time.perf_counter()
        setup = runners.build_setup(config, dist_context)
        flops_per_token = count_step_flops(
            setup.model, num_rows=config.global_batch, sequence_length=config.block_size
        ).total / config.tokens  # fmt: skip
        layer_shapes = count_layer_shapes(setup.model)
        engine: Engine | None = None
        if config.program == "ours":
            steps, engine = runners.run_ours(setup)
        else:
            steps = {"plain": runners.run_plain}.get(config.program, runners.run_hf_trainer)(setup)
        first_step_time = warm_up(steps, config.warmup_steps, synchronize)
        windows, product_seconds, peak_memory = time_windows(steps, setup, layer_shapes, synchronize)
        result = {
            "windows": windows,
            "products": product_seconds,
            "first_step": first_step_time - start_time,
            "peak_memory": max(dist_context.all_gather_object(peak_memory)),
            "input": _input_seconds(setup),
            "eval": _eval_seconds(setup, engine) if engine is not None else None,
            "threads": dist_context.num_threads,
            "gpu": torch.cuda.get_device_name() if config.device == "cuda" else None,
            "flops_per_token": flops_per_token,
            "ceiling": measure_ceiling(config, dist_context.device, synchronize),
        }
        return result if dist_context.rank == 0 else None
    finally:
        destroy_process_group()


def warm_up(steps: Iterator[None], num_steps: int, synchronize: Callable[[], None]) -> float:
    """Take the steps that are not timed; returns when the first was done."""
    next(steps)
    synchronize()
    first_step_time = time.perf_counter()
    for _ in range(num_steps - 1):
        next(steps)
    return first_step_time


def time_windows(
    steps: Iterator[None], setup: runners.BenchmarkSetup, layer_shapes: Counter[tuple[int, int, bool]],
    synchronize: Callable[[], None],
) -> tuple[list[float], list[float], int]:  # fmt: skip
    """(seconds of a step in each window, seconds of its bare products after each, peak bytes without these)."""
    config, device = setup.config, setup.dist_context.device
    windows: list[float] = []
    product_seconds: list[float] = []
    products: WeightProducts | None = None
    peak_memory = 0
    for _ in range(config.num_windows):
        synchronize()
        start_time = time.perf_counter()
        for _ in range(config.steps_per_window):
            next(steps)
        synchronize()
        windows.append((time.perf_counter() - start_time) / config.steps_per_window)
        if products is None:
            peak_memory = peak_memory_bytes(device)
            dtype = DTYPES[config.precision]
            products = WeightProducts(layer_shapes, config.tokens // config.world_size, dtype, device)
            products.seconds(synchronize)  # the first time is not that of the others
        product_seconds.append(products.seconds(synchronize))
    return windows, product_seconds, peak_memory


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


def measure_ceiling(config: BenchmarkConfig, device: torch.device, synchronize: Callable[[], None]) -> float:
    """The rate of one large matrix product in the variant's precision: what arithmetic can reach here, FLOP/s."""
    matrix_size = 8192 if config.device == "cuda" else 1024
    a, b = (torch.randn(matrix_size, matrix_size, dtype=DTYPES[config.precision], device=device) for _ in range(2))
    times = []
    for _ in range(12):
        synchronize()
        start_time = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start_time)
    return 2 * matrix_size**3 / statistics.median(times[2:])


if __name__ == "__main__":
    main(sys.argv[1])
