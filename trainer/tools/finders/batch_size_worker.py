"""One rank of a trial, which takes real steps of growing micro-batches: `python -m ...batch_size_worker JOB`.

A process of its own, because nothing can be said of the ranks after one of them ran out of memory in the middle of a
collective: all are ended, and the parents, which hold no model, go on.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.batch_config import BatchConfig
from trainer.config.settings import Settings
from trainer.data.dataset import load
from trainer.data.sampler import step_batches, step_counts
from trainer.data.token_dataset import TokenDataset
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import destroy_process_group, init_distributed, peak_memory_bytes
from trainer.tools.trial_engine import device_seconds, start_trial

OUT_OF_MEMORY_EXIT_CODE = 77  # the exit code that says so
MAX_MICRO_BATCHES = 4  # micro-batches of one trial step; a step of more is reckoned from their mean
NUM_TIMED_STEPS = 2  # timed steps, after those that warm up and show whether it fits


def main(job_file: str) -> int:
    """Try the job's sizes in order; one JSON line each goes to the job's answer. Returns the exit code."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    dist_context = init_distributed()
    settings, data = Settings.from_dict(job["settings"]), load(Path(job["data"]))
    try:
        _, engine = start_trial(settings, data, dist_context)
        with open(job["answer"], "a", encoding="utf-8", buffering=1) as answer_file:
            for micro_batch_size in job["sizes"]:
                engine.reset_graphs()  # each size is timed as a run of it would take its steps
                batch = BatchConfig.divide(settings.train.global_batch, micro_batch_size, dist_context.world_size)
                measurements = measure_step(engine, data.train, batch)
                answer_file.write(json.dumps(measurements) + "\n")
        return 0
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"out of memory: {error}", flush=True)
        os._exit(OUT_OF_MEMORY_EXIT_CODE)  # at once: leaving a group waits for the others
    finally:
        dist_context.watchdog.close()
        destroy_process_group()


def measure_step(engine: Engine, dataset: TokenDataset, batch: BatchConfig) -> dict[str, Any]:
    """Seconds, tokens and peak bytes of a step of this micro-batch over the longest rows; the weights stay.

    `seconds` is that of the whole step: accumulation x the mean of the passes taken + the update.
    """
    device, rank = engine.dist_context.device, engine.dist_context.rank
    longest_indices = np.argsort(-dataset.lengths(), kind="stable").astype(np.int64)[: batch.global_batch]
    micro_batches = step_batches(dataset, longest_indices, 0, batch, rank)[:MAX_MICRO_BATCHES]
    num_tokens, num_target_tokens = step_counts(dataset, longest_indices, 0, batch.global_batch)
    loss_sums: list[Any] = []

    def run_passes() -> None:
        loss_sums[:] = [
            engine.forward_backward(micro_batch, step=0, num_target_tokens=num_target_tokens)
            for micro_batch in micro_batches
        ]

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_times = []
    for _ in range(engine.num_warmup_steps + NUM_TIMED_STEPS):
        passes_seconds = device_seconds(run_passes, device)
        update_seconds = device_seconds(lambda: engine.launch_update(0.0, loss_sums)(), device)
        step_times.append(passes_seconds / len(micro_batches) * batch.gradient_accumulation_steps + update_seconds)
    return {
        "seconds": min(step_times[-NUM_TIMED_STEPS:]),
        "tokens": num_tokens,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that memory ran out, as torch's allocators and libraries put it."""
    messages = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")
    is_allocators_own = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_allocators_own or any(message in str(error) for message in messages)


def exit_with_parent() -> None:
    """Nobody writes to our input: it ends when the rank that asked has ended."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=exit_with_parent, daemon=True).start()
    sys.exit(main(sys.argv[1]))
