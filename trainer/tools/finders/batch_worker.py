"""One rank that tries one micro-batch by real steps: `python -m trainer.tools.finders.batch_worker JOB`."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trainer.config.batch_config import BatchConfig
from trainer.config.settings import Settings
from trainer.data.dataset import TokenDataset, load
from trainer.data.sampler import GlobalBatch, step_batches, step_counts
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import destroy_process_group, init_distributed, peak_memory_bytes
from trainer.tools.trial_engine import start_trial
from trainer.tools.worker_processes import end_with_parent

OUT_OF_MEMORY_EXIT_CODE = 77
MAX_MICRO_BATCHES = 4  # that are run in a step; the time of more is extrapolated
NUM_TIMED_STEPS = 2  # after those that warm up and show whether it fits


def main(job_file: str) -> int:
    """Try the job's size; rank 0 writes what a step took into the job's answer."""
    end_with_parent()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    context = init_distributed()
    settings = Settings.from_dict(job["settings"])
    settings = replace(settings, train=replace(settings.train, micro_batch=job["size"]))
    try:
        data = load(Path(job["data"]))
        _, engine = start_trial(settings, data, context)
        batch = BatchConfig.divide(settings.train.global_batch, job["size"], context.world_size)
        step_seconds = measure_step(engine, data.train, batch)
        numbers = {
            "step_seconds": max(context.all_gather_object(step_seconds)),
            "tokens": step_counts(data.train, longest_rows(data.train), 0, batch.global_batch)[0],
            "peak_memory_bytes": max(context.all_gather_object(peak_memory_bytes(context.device))),
        }
        if context.rank == 0:
            Path(job["answer"]).write_text(json.dumps(numbers), encoding="utf-8")
        return 0
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", flush=True)
        os._exit(OUT_OF_MEMORY_EXIT_CODE)  # at once: leaving a group waits for the others
    finally:
        context.watchdog.close()
        destroy_process_group()


def measure_step(engine: Engine, dataset: TokenDataset, batch: BatchConfig) -> float:
    """Seconds of a step of the longest rows, the least of those that are timed; the weights stay."""
    num_micro_batches = min(batch.gradient_accumulation_steps, MAX_MICRO_BATCHES)
    seconds = _time_step(engine, dataset, batch, num_micro_batches)
    num_left = batch.gradient_accumulation_steps - num_micro_batches
    if num_left:
        one = _time_step(engine, dataset, batch, 1)
        seconds += num_left * max(0.0, seconds - one) / (num_micro_batches - 1)
    return seconds


def _time_step(engine: Engine, dataset: TokenDataset, batch: BatchConfig, num_micro_batches: int) -> float:
    """Seconds of a step of so many micro-batches on each rank."""
    part = replace(batch, gradient_accumulation_steps=num_micro_batches)
    order = longest_rows(dataset)
    num_tokens, num_target_tokens = step_counts(dataset, order, 0, part.global_batch)
    step_batch = GlobalBatch(
        step=0,
        epoch=0,
        step_in_epoch=0,
        example_ids=order[: part.global_batch].tolist(),
        micro_batches=step_batches(dataset, order, 0, part, engine.dist_context.rank),
        num_tokens=num_tokens,
        num_target_tokens=num_target_tokens,
    )
    times = []
    for _ in range(engine.num_warmup_steps + NUM_TIMED_STEPS):
        start_time = time.perf_counter()
        list(engine.run([step_batch], lambda _: 0.0))
        if engine.dist_context.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start_time)
    return min(times[-NUM_TIMED_STEPS:])


def longest_rows(dataset: TokenDataset) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """All rows, the longest first, int64 [n]."""
    return np.argsort(-dataset.lengths(), kind="stable").astype(np.int64)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that memory ran out, as torch's allocators and libraries put it."""
    messages = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")
    is_allocators_own = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_allocators_own or any(message in str(error) for message in messages)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
