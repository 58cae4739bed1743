"""One rank of a trial: `python -m trainer.tools.finders.batch_size_worker JOB` takes real steps of growing
micro-batches.

A process of its own, because nothing can be said of the ranks after one of them ran out of memory in the middle of a
collective: all are ended, and the parents, which hold no model, go on.
"""

import json
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.batch_config import BatchConfig
from trainer.config.settings import Settings
from trainer.data.dataset import load
from trainer.data.sampler import PAD_ID, step_batches, step_counts
from trainer.data.token_dataset import TokenDataset
from trainer.distributed.engine import Engine
from trainer.distributed.execution import ExecutionPlan
from trainer.distributed.process_group import destroy_process_group, init_distributed, peak_memory_bytes
from trainer.model.build import build_model

OUT_OF_MEMORY_EXIT_CODE = 77  # the exit code that says so
MAX_MICRO_BATCHES = 4  # micro-batches of one trial step; a step of more is reckoned from their mean
NUM_TIMED_STEPS = 2  # timed steps, after those that warm up and show whether it fits


def main(job_file: str) -> int:
    """Try the job's sizes in order; one JSON line each goes to the job's answer. Returns the exit code."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    dist_context = init_distributed()
    settings = Settings.from_dict(job["settings"])
    dataset = load(Path(job["data"])).train
    try:
        engine = Engine(
            dist_context,
            build_model(settings, with_fingerprint=False),
            job["deepspeed"],
            settings.train,
            ExecutionPlan(**job["execution"]),
        )
        with open(f"{job['answer']}-{dist_context.rank}", "a", encoding="utf-8", buffering=1) as answer_file:
            for micro_batch_size in job["sizes"]:
                use_plan_for(engine, micro_batch_size, settings.data.block_size)
                gradient_accumulation_steps = settings.train.global_batch // (
                    micro_batch_size * dist_context.world_size
                )
                measurements = measure_step(
                    engine,
                    dataset,
                    BatchConfig(
                        micro_batch_size=micro_batch_size,
                        gradient_accumulation_steps=gradient_accumulation_steps,
                        world_size=dist_context.world_size,
                    ),
                )
                answer_file.write(json.dumps({"micro_batch_size": micro_batch_size, **measurements}) + "\n")
        return 0
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", flush=True)
        os._exit(OUT_OF_MEMORY_EXIT_CODE)  # at once: leaving a group waits for the others
    finally:
        dist_context.watchdog.close()
        destroy_process_group()


def use_plan_for(engine: Engine, micro_batch_size: int, block_size: int) -> None:
    """Record, and compile where that is planned, anew for a size: each is timed as a run of it would take its steps."""
    shapes = ((micro_batch_size, block_size),) if engine.plan.compiled_shapes else ()
    engine.execution.use_plan(replace(engine.plan, compiled_shapes=shapes))


def measure_step(engine: Engine, dataset: TokenDataset, batch: BatchConfig) -> dict[str, Any]:
    """Seconds, tokens and peak bytes of a step of this micro-batch over the longest rows; the weights stay.

    `seconds` is that of the whole step: accumulation x the mean of the passes taken + the update.
    """
    longest_indices = np.argsort(-dataset.lengths(), kind="stable").astype(np.int64)[: batch.global_batch]
    micro_batches = step_batches(dataset, longest_indices, 0, batch, engine.dist_context.rank, PAD_ID)[
        :MAX_MICRO_BATCHES
    ]
    _, num_tokens, num_target_tokens = step_counts(dataset, longest_indices, 0, batch.global_batch)
    is_gpu = engine.dist_context.device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats(engine.dist_context.device)
    step_times = []
    for _ in range(engine.execution.num_warmup_steps + NUM_TIMED_STEPS):
        start_time = _synchronized_time(is_gpu)
        loss_sums = [
            engine.forward_backward(micro_batch, step=0, num_target_tokens=num_target_tokens)
            for micro_batch in micro_batches
        ]
        backward_end_time = _synchronized_time(is_gpu)
        engine.launch_update(0.0, loss_sums)()
        step_times.append(
            (backward_end_time - start_time) / len(micro_batches) * batch.gradient_accumulation_steps
            + _synchronized_time(is_gpu)
            - backward_end_time
        )
    return {
        "seconds": min(step_times[-NUM_TIMED_STEPS:]),
        "tokens": num_tokens,
        "peak_memory_bytes": peak_memory_bytes(engine.dist_context.device),
    }


def _synchronized_time(is_gpu: bool) -> float:
    if is_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that memory ran out, as torch's allocators and libraries put it."""
    messages = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        message in str(error) for message in messages
    )


def exit_with_parent() -> None:
    """Nobody writes to our input: it ends when the rank that asked has ended."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=exit_with_parent, daemon=True).start()
    sys.exit(main(sys.argv[1]))
