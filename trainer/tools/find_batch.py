"""`--find-batch`: the fastest micro-batch that fits, for the same global batch, on one host.

Rank 0 starts a group of processes for each size, which take steps of the longest rows: a rank that runs out of memory
leaves the others waiting in a collective, so all of a group are ended.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.batch_config import BatchConfig
from trainer.config.errors import TrainingError, UserError
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, load
from trainer.data.sampler import GlobalBatch, step_batches, step_counts
from trainer.distributed.execution import NUM_WARMUP_CALLS
from trainer.distributed.process_group import DistContext
from trainer.tools.trial_engine import run_job, start_trial
from trainer.training.run_plan import RunPlan

OUT_OF_MEMORY_EXIT_CODE = 77
#: How a rank ends that needs too much; -9: killed by the system, which is how a host's memory runs out.
MEMORY_EXIT_CODES = {OUT_OF_MEMORY_EXIT_CODE: "out of memory", -9: "killed by the system"}
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")  # torch's
EQUAL_SPEED_SHARE = 0.03  # of the speed; within it two sizes are as fast, and the smaller one needs less memory
NUM_TIMED_STEPS = 2  # after those that warm up and show whether it fits


def find_micro_batch_size(plan: RunPlan, data: PreparedDataset) -> int:
    """Try sizes that keep the global batch, each at least twice the one before, until one does not fit; 0. UserError on
    several hosts, TrainingError where no micro-batch fits."""
    context = plan.dist_context
    if context.num_nodes > 1:
        remedy = "expected one host, with as many times smaller a --global-batch as it has fewer ranks"
        raise UserError(f"--find-batch: {context.world_size} ranks on several hosts; {remedy}")
    if context.rank > 0:
        return 0
    per_rank, sizes = plan.schedule.batch.global_batch // context.world_size, [1]
    while size := next((n for n in range(2 * sizes[-1], per_rank + 1) if per_rank % n == 0), 0):
        sizes.append(size)
    speeds: dict[int, float] = {}
    print("micro-batch  tokens/s  memory of a rank", flush=True)
    most_bytes = 0.0  # that the next size may take: a micro-batch twice as large needs at most twice the memory
    for size in sizes:
        if context.device.type == "cpu" and most_bytes > (free := context.free_host_bytes()):  # else others are killed
            print(f"{size:>11}  not tried: up to {most_bytes / 2**30:.2f} GiB a rank, {free / 2**30:.2f} GiB are free")
            break
        trial = run_trial(plan, data.folder, size)
        if "problem" in trial:
            print(f"{size:>11}  does not fit: {trial['problem']}")
            break
        speeds[size] = trial["tokens_per_second"]
        most_bytes = trial["peak_memory_bytes"] * sizes[min(len(speeds), len(sizes) - 1)] / size
        print(f"{size:>11}  {speeds[size]:>8,.0f}  {trial['peak_memory_bytes'] / 2**30:.2f} GiB", flush=True)
    if not speeds:
        remedy = "--ds-config zero3 or zero2_offload, --mode lora or a shorter --block-size need less"
        raise TrainingError(f"--find-batch: not even the smallest micro-batch fits; {remedy}")
    best = next(n for n, speed in speeds.items() if speed >= (1 - EQUAL_SPEED_SHARE) * max(speeds.values()))
    print(f"suggestion     --micro-batch {best}: {speeds[best]:,.0f} tokens/s; nothing was trained", flush=True)
    return 0


def run_trial(plan: RunPlan, data_folder: Path, size: int) -> dict[str, Any]:
    """`tokens_per_second` and `peak_memory_bytes` (of the rank that needs most) of a micro-batch on its own processes,
    or the `problem` where it does not fit. TrainingError where they end for another reason than memory."""
    timeout = plan.settings.engine.hang_timeout
    job = {"settings": plan.settings.as_dict(), "data": str(data_folder), "size": size}
    answers, exit_codes, reason = run_job(measure_size, job, plan.dist_context.world_size, timeout_seconds=timeout)
    if exit_codes is None:
        raise TrainingError(f"--find-batch: micro-batch {size} took over {timeout:g} s (--hang-timeout): {reason}")
    for rank, exit_code in enumerate(exit_codes):
        if exit_code in MEMORY_EXIT_CODES:
            return {"problem": f"{MEMORY_EXIT_CODES[exit_code]} on rank {rank}"}
    if any(exit_codes):
        raise TrainingError(f"--find-batch: micro-batch {size} failed: {reason}")
    return answers[0]


# --- one rank ---


def measure_size(job: dict[str, Any], context: DistContext) -> Iterator[dict[str, Any]]:
    """Try the job's size by steps of the longest rows."""
    settings = Settings(**job["settings"])
    settings = replace(settings, train=replace(settings.train, micro_batch=job["size"]))
    try:
        prepared = load(Path(job["data"]))
        _, engine = start_trial(settings, prepared, context)
        batch = BatchConfig.divide(settings.train.global_batch, job["size"], context.world_size)
        data = prepared.train
        order = np.argsort(-data.lengths(), kind="stable").astype(np.int64)
        num_tokens, num_target_tokens = step_counts(data, order, 0, batch.global_batch)
        step_batch = GlobalBatch(
            step=0,
            epoch=0,
            example_ids=order[: batch.global_batch].tolist(),
            micro_batches=step_batches(data, order, 0, batch, context.rank),
            num_tokens=num_tokens,
            num_target_tokens=num_target_tokens,
        )
        num_warmup_steps = NUM_WARMUP_CALLS + 2 if engine.plan.cuda_graphs else 1
        batches = [step_batch] * (num_warmup_steps + NUM_TIMED_STEPS)
        seconds = [result.elapsed_seconds for _, result in engine.run(batches, lambda _: 0.0)]
        yield {"tokens_per_second": num_tokens / max(context.all_gather_object(min(seconds[-NUM_TIMED_STEPS:])))}
    except (RuntimeError, MemoryError) as error:
        is_own_error = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not (is_own_error or any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)):
            raise
        print(f"out of memory: {error}", flush=True)
        os._exit(OUT_OF_MEMORY_EXIT_CODE)  # at once: leaving a group waits for the others
