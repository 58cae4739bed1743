"""One rank of a variant: `python -m trainer.tools.bench.worker JOB`, which writes its result."""

import fcntl
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.data.sampler import epoch_order, step_batches
from trainer.distributed.engine import Engine, import_deepspeed
from trainer.distributed.process_group import destroy_process_group, init_distributed, peak_memory_bytes
from trainer.model.build import TrainableModel
from trainer.model.flops import count_step_flops
from trainer.tools.bench import runners
from trainer.tools.bench.configs import BenchmarkConfig
from trainer.tools.trial_engine import device_seconds
from trainer.tracking.silence import silence_libraries
from trainer.training.evaluation import evaluate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_OUTPUT_BYTES = 2**27  # of one product; over more rows it is several
LayerShapes = Counter[tuple[int, int, bool]]  #: layers by inputs, outputs, and whether they train


def main(job_file: str) -> None:
    """Do the job that the file names and write its result beside it."""
    silence_libraries()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    config = BenchmarkConfig(**job["variant"])
    if config.device == "cuda":
        import_deepspeed()
    with open(job["turn"], "ab") as turn:
        if os.environ.get("RANK", "0") == "0":  # the others wait for it
            fcntl.flock(turn, fcntl.LOCK_EX)  # all is imported: one variant measures at a time
        result = measure(config)
    if result is not None:
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def measure(config: BenchmarkConfig) -> dict[str, Any] | None:
    """The times of a variant, in seconds, and what else it used; None on the ranks that do not report."""
    dist_context = init_distributed(config.device)
    try:
        device, start_time = dist_context.device, time.perf_counter()
        setup = runners.build_setup(config, dist_context)
        step_flops = count_step_flops(setup.model, num_rows=config.global_batch, sequence_length=config.block_size)
        layer_shapes = count_layer_shapes(setup.model)
        steps: Iterator[object]
        engine: Engine | None = None
        if config.program == "ours":
            steps, engine = runners.run_ours(setup)
        else:
            steps = (runners.run_plain if config.program == "plain" else runners.run_hf_trainer)(setup)
        device_seconds(lambda: next(steps), device)
        first_step_seconds = time.perf_counter() - start_time
        for _ in range(config.warmup_steps - 1):
            next(steps)
        windows, product_seconds, (peak_memory, device_memory) = time_windows(steps, setup, layer_shapes)
        result = {
            "ran_by": "; ".join([engine.plan.path, *(change.reason for change in engine.plan_changes)])
            if engine is not None
            else "",
            "windows": windows,
            "products": product_seconds,
            "first_step": first_step_seconds,
            "peak_memory": max(dist_context.all_gather_object(peak_memory)),
            "device_memory": device_memory,
            "input": _input_seconds(setup),
            "eval": _eval_seconds(setup, engine) if engine is not None else None,
            "threads": dist_context.num_threads,
            "gpu": torch.cuda.get_device_name() if config.device == "cuda" else None,
            "flops_per_token": step_flops / config.tokens,
            "ceiling": measure_ceiling(config, device),
        }
        return result if dist_context.rank == 0 else None
    finally:
        destroy_process_group()


def time_windows(
    steps: Iterator[object], setup: runners.BenchmarkSetup, layer_shapes: LayerShapes
) -> tuple[list[float], list[float], tuple[int, int]]:
    """(seconds of a step in each window, seconds of its bare products after each, bytes without these).

    Bytes: the peak of what is in use, and what is taken of the device, as nvidia-smi says (0: of a CPU).
    """
    config, device = setup.config, setup.dist_context.device
    windows = [device_seconds(lambda: next(steps), device, config.steps_per_window)]
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    memory = peak_memory_bytes(device), total - free
    products = WeightProducts(layer_shapes, config.tokens // config.world_size, DTYPES[config.precision], device)
    products.seconds()  # the first time is not that of the others
    product_seconds = [products.seconds()]
    for _ in range(config.num_windows - 1):
        windows.append(device_seconds(lambda: next(steps), device, config.steps_per_window))
        product_seconds.append(products.seconds())
    return windows, product_seconds, memory


def count_layer_shapes(model: TrainableModel) -> LayerShapes:
    """The linear layers of the model, before ZeRO shards them."""
    shapes: LayerShapes = Counter()
    for layer in model.causal.modules():
        if isinstance(layer, (Conv1D, nn.Linear)):
            num_in, num_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
            shapes[num_in, num_out, layer.weight.requires_grad] += 1
    return shapes


class WeightProducts:
    """The matrix products of a step with the model's weights, bare: the time that the machine itself takes for them.

    For each layer the product forward, the gradient of its input and, where it trains, that of its weight.
    """

    def __init__(self, layer_shapes: LayerShapes, num_tokens: int, dtype: torch.dtype, device: torch.device):
        """`num_tokens`: of this rank's step; `dtype`: in which the step's products are computed."""
        self.device = device
        self.products: list[tuple[Callable[[], torch.Tensor], float]] = []  # each with how often a step has it
        for (num_in, num_out, is_trained), num_layers in layer_shapes.items():
            num_rows = min(num_tokens, max(1, MAX_OUTPUT_BYTES // (4 * max(num_in, num_out))))
            x, weight, grad = (
                torch.randn(size, dtype=dtype, device=device)
                for size in ((num_rows, num_in), (num_in, num_out), (num_rows, num_out))
            )
            for left, right in [(x, weight), (grad, weight.T), (x.T, grad)][: 3 if is_trained else 2]:
                output = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=device)
                product = partial(torch.mm, left, right, out=output)
                self.products.append((product, num_layers * num_tokens / num_rows))

    def seconds(self) -> float:
        """The time of all of them once; each is repeated as often as a step has it."""
        return sum(
            times_per_step * device_seconds(product, self.device, max(1, round(times_per_step)))
            for product, times_per_step in self.products
        )


def _input_seconds(setup: runners.BenchmarkSetup) -> float:
    """Seconds to draw one step's micro-batches, measured apart."""
    data, batch, rank = setup.data.train, setup.settings.train.batch(setup.config.world_size), setup.dist_context.rank
    order = epoch_order(data, seed=42, epoch=0, global_batch=batch.global_batch, shuffle=True, group_by_length=False)
    return statistics.median(
        device_seconds(partial(step_batches, data, order, step, batch, rank), torch.device("cpu"))
        for step in range(min(20, setup.config.steps))
    )


def _eval_seconds(setup: runners.BenchmarkSetup, engine: Engine) -> float:
    """Seconds per evaluated token, over all ranks; a first pass warms up."""
    evaluation = partial(evaluate, engine, setup.data.val, setup.config.global_batch)
    evaluation()
    return device_seconds(evaluation, setup.dist_context.device) / int(setup.data.val.lengths().sum())


def measure_ceiling(config: BenchmarkConfig, device: torch.device) -> float:
    """The rate of one large matrix product in the variant's precision: what arithmetic can reach here, FLOP/s."""
    matrix_size = 8192 if config.device == "cuda" else 1024
    a, b = (torch.randn(matrix_size, matrix_size, dtype=DTYPES[config.precision], device=device) for _ in range(2))
    times = [device_seconds(lambda: a @ b, device) for _ in range(12)]
    return 2 * matrix_size**3 / statistics.median(times[2:])


if __name__ == "__main__":
    main(sys.argv[1])
