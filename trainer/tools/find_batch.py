"""`--find-batch`: the fastest micro-batch that fits, for the same global batch, on one host.

Rank 0 starts a group of processes for each size, which take steps of the longest rows: a rank that runs out of memory
leaves the others waiting in a collective, so all of a group are ended.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.batch_config import BatchConfig
from trainer.config.errors import TrainingError, UserError
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, TokenDataset, load
from trainer.data.sampler import GlobalBatch, step_batches, step_counts
from trainer.distributed.engine import Engine
from trainer.distributed.execution import NUM_WARMUP_CALLS
from trainer.distributed.memory import required_bytes
from trainer.distributed.process_group import DistContext
from trainer.tools.trial_engine import run_job, start_trial, write_result
from trainer.training.run_plan import RunPlan

#: Of the memory that is free; on a CPU what is beyond it is taken from other programs, not refused.
MEMORY_BUDGET_SHARE = 0.8
OUT_OF_MEMORY_EXIT_CODE = 77
#: How a rank ends that needs too much; -9: killed by the system, which is how a host's memory runs out.
MEMORY_EXIT_CODES = {OUT_OF_MEMORY_EXIT_CODE: "out of memory", -9: "killed by the system"}
EQUAL_SPEED_SHARE = 0.03  # of the speed; within it two sizes are as fast, and the smaller one needs less memory
MAX_MICRO_BATCHES = 4  # that are run in a step; the time of more is extrapolated
NUM_TIMED_STEPS = 2  # after those that warm up and show whether it fits

#: One micro-batch as it ran: `micro_batch_size`, `gradient_accumulation_steps`, `fits`, and either `failure_reason` or
#: `step_seconds` (of the global batch), `tokens_per_second` and `peak_memory_bytes` (of the rank that needs most).
Trial = dict[str, Any]


def find_micro_batch_size(plan: RunPlan, data: PreparedDataset) -> int:
    """Try sizes that keep the global batch, each at least twice the one before, until one does not fit.

    Prints them and leaves find-batch.json in the run folder; returns 0. UserError on several hosts, TrainingError where
    no micro-batch fits.
    """
    context = plan.dist_context
    if context.num_nodes > 1:
        raise UserError(
            f"--find-batch: {context.world_size} ranks on several hosts; expected one host: try its "
            f"{context.local_world_size} ranks there, with as many times smaller a --global-batch"
        )
    if context.rank > 0:
        return 0
    row_length, global_batch = int(data.train.lengths().max()), plan.schedule.batch.global_batch
    limit_bytes = MEMORY_BUDGET_SHARE * context.free_host_bytes()
    trials: list[Trial] = []
    not_tried, size, examples_per_rank = "", 1, global_batch // context.world_size
    while size <= examples_per_rank:
        if context.device.type == "cpu":  # a GPU says itself what fits
            estimate = plan.estimate_memory(plan.deepspeed_file, row_length=row_length, micro_batch_size=size)
            needed_bytes = required_bytes(estimate, plan.model_info, context.device)[0]
            if needed_bytes > limit_bytes:
                not_tried = f"not tried: {size} and above, estimated at {needed_bytes / 2**30:.1f} GiB of a rank, over "
                not_tried += f"{MEMORY_BUDGET_SHARE:.0%} of the {context.free_host_bytes() / 2**30:.1f} GiB free"
                break
        print(f"trying micro-batch {size} ...", flush=True)
        trials.append(run_trial(plan, data.folder, size))
        if not trials[-1]["fits"]:
            break
        size = next((n for n in range(2 * size, examples_per_rank + 1) if examples_per_rank % n == 0), global_batch + 1)
    best = fastest(trials)
    content = {"global_batch": global_batch, "width": row_length, "tried": trials, "not_tried": not_tried}
    path = write_result("find-batch.json", plan, content | {"suggestion": best and best["micro_batch_size"]})
    print("\n".join([*format_lines(trials, best), *filter(None, [not_tried])]), flush=True)
    if best is None:
        raise TrainingError(
            "--find-batch: not even the smallest micro-batch fits; --ds-config zero3 or zero2_offload, --mode lora "
            "or a shorter --block-size need less"
        )
    print(f"numbers        {path}; nothing was trained", flush=True)
    return 0


def run_trial(plan: RunPlan, data_folder: Path, size: int) -> Trial:
    """A micro-batch on processes of its own. TrainingError where they end for another reason than memory."""
    world_size, timeout = plan.dist_context.world_size, plan.settings.engine.hang_timeout
    batch = BatchConfig.divide(plan.schedule.batch.global_batch, size, world_size)
    job = {"settings": plan.settings.as_dict(), "data": str(data_folder), "size": size}
    answers, exit_codes, reason = run_job(measure_size, job, world_size, timeout_seconds=timeout)
    trial = {"micro_batch_size": size, "gradient_accumulation_steps": batch.gradient_accumulation_steps}
    if exit_codes is None:
        raise TrainingError(f"--find-batch: micro-batch {size} took over {timeout:g} s (--hang-timeout): {reason}")
    for rank, exit_code in enumerate(exit_codes):
        if exit_code in MEMORY_EXIT_CODES:
            return trial | {"fits": False, "failure_reason": f"{MEMORY_EXIT_CODES[exit_code]} on rank {rank}"}
    if any(exit_codes):
        raise TrainingError(f"--find-batch: micro-batch {size} failed: {reason}")
    return trial | {"fits": True, **answers[0]}


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The smallest micro-batch among those that are as fast as the fastest; None where none fits."""
    fitting = [trial for trial in trials if trial["fits"]]
    min_speed = (1 - EQUAL_SPEED_SHARE) * max((trial["tokens_per_second"] for trial in fitting), default=0.0)
    return next((trial for trial in fitting if trial["tokens_per_second"] >= min_speed), None)


def format_lines(trials: Sequence[Trial], best: Trial | None) -> list[str]:
    lines = ["", "micro-batch  accumulation  ms per step    tokens/s  memory of a rank"]
    for trial in trials:
        outcome = f"does not fit: {trial.get('failure_reason')}"
        if trial["fits"]:
            step_ms, peak_gib = 1000 * trial["step_seconds"], trial["peak_memory_bytes"] / 2**30
            outcome = f"{step_ms:>11,.0f}  {trial['tokens_per_second']:>10,.0f}  {peak_gib:.2f} GiB"
        lines.append(f"{trial['micro_batch_size']:>11}  {trial['gradient_accumulation_steps']:>12}  {outcome}")
    if best is not None:
        lines.append(
            f"suggestion     --micro-batch {best['micro_batch_size']}: {best['tokens_per_second']:,.0f} tokens/s"
        )
    return lines


# --- one rank ---


def measure_size(job: dict[str, Any], context: DistContext) -> Iterator[dict[str, Any]]:
    """Try the job's size by real steps."""
    settings = Settings(**job["settings"])
    settings = replace(settings, train=replace(settings.train, micro_batch=job["size"]))
    try:
        data = load(Path(job["data"]))
        _, engine = start_trial(settings, data, context)
        batch = BatchConfig.divide(settings.train.global_batch, job["size"], context.world_size)
        # Of many micro-batches only a few are run; those left out take what one more of these takes.
        num_micro_batches = min(batch.gradient_accumulation_steps, MAX_MICRO_BATCHES)
        step_seconds = time_step(engine, data.train, batch, num_micro_batches)
        if num_left := batch.gradient_accumulation_steps - num_micro_batches:
            one = time_step(engine, data.train, batch, 1)
            step_seconds += num_left * max(0.0, step_seconds - one) / (num_micro_batches - 1)
        tokens = step_counts(data.train, longest_rows(data.train), 0, batch.global_batch)[0]
        step_seconds = max(context.all_gather_object(step_seconds))
        yield {"step_seconds": step_seconds, "tokens_per_second": tokens / step_seconds}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", flush=True)
        os._exit(OUT_OF_MEMORY_EXIT_CODE)  # at once: leaving a group waits for the others


def time_step(engine: Engine, dataset: TokenDataset, batch: BatchConfig, num_micro_batches: int) -> float:
    """Seconds of a step of so many micro-batches of the longest rows on each rank, the least of two."""
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
    num_warmup_steps = NUM_WARMUP_CALLS + 2 if engine.plan.cuda_graphs else 1
    for _ in range(num_warmup_steps + NUM_TIMED_STEPS):
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
