"""One rank of a trial: `python -m trainer.tools.finders.batch_size_worker JOB` takes real steps of growing micro-batches.

A process of its own, because nothing can be said of the ranks after one of them ran out of memory in the middle of a
collective: all are ended, and the parents, which hold no model, go on.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.config.schema import Batch, Settings
from trainer.data.dataset import load
from trainer.data.sampler import step_batches, step_counts
from trainer.data.token_dataset import Rows
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import leave_world, peak_memory, start_world
from trainer.model.build import build
from trainer.training.loop import PAD_ID

OUT_OF_MEMORY = 77  # the exit code that says so
PASSES = 4  # micro-batches of one trial step; a step of more is reckoned from their mean
REPEATS = 2  # timed steps, after those that warm up and show whether it fits


def main(job_file: str) -> int:
    """Try the job's sizes in order; one JSON line each goes to the job's answer. Returns the exit code."""
    job = json.loads(Path(job_file).read_text())
    world = start_world()
    settings = Settings.from_dict(job["settings"])
    rows = load(Path(job["data"])).train
    try:
        engine = Engine(world, build(settings, hashed=False), job["deepspeed"], settings.train, job["precision"])
        with open(f"{job['answer']}-{world.rank}", "a", buffering=1) as answer:
            for micro in job["sizes"]:
                accumulation = settings.train.global_batch // (micro * world.size)
                told = measure(engine, rows, Batch(micro=micro, accumulation=accumulation, ranks=world.size))
                answer.write(json.dumps({"micro": micro, **told}) + "\n")
        return 0
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
        print(f"out of memory: {problem}", flush=True)
        os._exit(OUT_OF_MEMORY)  # at once: leaving a group waits for the others
    finally:
        world.board.close()
        leave_world()


def measure(engine: Engine, rows: Rows, batch: Batch) -> dict[str, Any]:
    """Seconds, tokens and peak bytes of a step of this micro-batch over the longest rows; the weights stay.

    `seconds` is that of the whole step: accumulation x the mean of the passes taken + the update.
    """
    longest = np.argsort(-rows.lengths(), kind="stable").astype(np.int64)[: batch.global_batch]
    micros = step_batches(rows, longest, 0, batch, engine.world.rank, PAD_ID)[:PASSES]
    _, tokens, counted = step_counts(rows, longest, 0, batch.global_batch)
    gpu = engine.world.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(engine.world.device)
    taken = []
    for _ in range(engine.warm_steps + REPEATS):
        began = _now(gpu)
        sums = [engine.accumulate(micro, step=0, counted=counted) for micro in micros]
        passed = _now(gpu)
        engine.step(0.0, sums)
        taken.append((passed - began) / len(micros) * batch.accumulation + _now(gpu) - passed)
    return {"seconds": min(taken[-REPEATS:]), "tokens": tokens, "peak": peak_memory(engine.world.device)}


def _now(gpu: bool) -> float:
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error is that memory ran out, as torch's allocators and libraries put it."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")
    return isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(word in str(problem) for word in words)


def end_with_parent() -> None:
    """Nobody writes to our input: it ends when the rank that asked has ended."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(main(sys.argv[1]))
