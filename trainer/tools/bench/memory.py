"""What each way of training holds, writes and reaches: `python -m trainer.tools.bench.memory JOB` measures one.

All go through the program's own engine and loop, on one device: the GPU where there is one, else the CPU. Weights are
random unless a folder has real ones, and the rows count upwards with some noise, so a loss says whether a method
learns, not how good it is.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config

from trainer.config import cli
from trainer.config.choices import LORA_LR_FACTOR
from trainer.config.files import folder_size
from trainer.config.text import markdown_table
from trainer.distributed.machine import peak_memory_bytes
from trainer.distributed.process_group import DistContext
from trainer.model.build import build_model, load_config
from trainer.tools.bench.steps import describe_hardware, wrap_rows
from trainer.tools.processes import run_job
from trainer.tools.trial_engine import run_rank, start_trial
from trainer.tracking.records import EvalRecord, StepRecord
from trainer.training.checkpoint import CheckpointManager
from trainer.training.loop import train
from trainer.training.run_plan import validate_early
from trainer.training.schedule import TrainState

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512, "n_positions": 128},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
FULL_LR = 3e-4  # of full training; adapters learn at ten times that, as the program has it
NUM_VAL_ROWS = 4
MAX_TOKEN_ID = 256  # the ids that rows count through
HEADINGS = ("method", "trainable", "optimizer MiB", "peak MiB", "checkpoint MiB", "tokens/s", "validation loss")


def measure_memory(args: argparse.Namespace, flags_of_methods: Mapping[str, str]) -> int:
    """Measure every method and print the table; 1 where one failed."""
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for method in args.methods:
        job = {**vars(args), "flags": flags_of_methods[method]}
        answers, _, reason = run_job(("-m", "trainer.tools.bench.memory"), job, 1)
        results += answers
        rows.append([method, *(format_cells(answers[0]) if answers else ["-"] * (len(HEADINGS) - 2) + [reason])])
        print(f"{method}: {answers[0] if answers else f'failed: {reason}'}", file=sys.stderr, flush=True)
    print(markdown_table(HEADINGS, rows))
    if results:
        model = args.model or f"{args.shape}'s shape with random weights"
        workload = f"{args.steps} steps of {args.micro_batch} rows of {args.block_size} tokens"
        print("\n{}, {}, {precision}, on {device} with torch {torch}".format(model, workload, **results[-1]))
    return int(len(results) < len(rows))


def format_cells(result: Mapping[str, Any]) -> list[str]:
    sizes = [f"{result[name] / 2**20:,.1f}" for name in ("optimizer_bytes", "peak_bytes", "checkpoint_bytes")]
    return [f"{result['trainable']:,}", *sizes, f"{result['tokens_per_second']:,.0f}", f"{result['loss']:.4f}"]


def measure_method(job: dict[str, Any], dist_context: DistContext) -> Iterator[dict[str, Any]]:
    """What a method trains, holds, writes and reaches. Bytes; the peak on a CPU is above the start."""
    with tempfile.TemporaryDirectory() as folder:
        scratch, device = Path(folder), dist_context.device
        lr = FULL_LR * (LORA_LR_FACTOR if "--mode lora" in job["flags"] else 1)
        flags = f"{job['flags']} --preset card --ds-config zero0 --lr {lr} --max-steps {job['steps']}"
        flags += f" --global-batch {job['micro_batch']} --eval-batch {job['micro_batch']} --eval-every never"
        flags += f" --save-every never --block-size {job['block_size']}"
        flags += f" --precision {job['precision']}" if job["precision"] else ""
        model = job["model"]
        if not model:  # a folder with nothing but the configuration
            flags += " --init random"
            model = str(scratch / job["shape"])
            GPT2Config(**SHAPES[job["shape"]], architectures=["GPT2LMHeadModel"]).save_pretrained(model)
        argv = [*flags.split(), "--model", model, "--output-dir", str(scratch / "run")]
        settings = cli.parse_args(argv).settings
        validate_early(settings, dist_context)
        # Every method imports what adapters need, so that no peak counts it.
        build_model(cli.parse_args(["--mode", "lora", "--model", "demo-base"]).settings, on_meta=True)
        baseline_bytes = 0 if device.type == "cuda" else peak_memory_bytes(device)
        rng, vocab_size = np.random.default_rng(0), load_config(settings.model).vocab_size
        num_rows, rows = job["micro_batch"] * job["steps"], []
        for _ in range(num_rows + NUM_VAL_ROWS):  # from a random start, two at a time now and then
            strides = 1 + (rng.random(job["block_size"]) < 0.2)
            rows.append((rng.integers(vocab_size) + strides.cumsum()) % min(vocab_size, MAX_TOKEN_ID))
        data = wrap_rows(rows[:num_rows], rows[num_rows:], vocab_size=vocab_size)
        plan, engine = start_trial(settings, data, dist_context)
        checkpoints = CheckpointManager(
            scratch / "checkpoints", dist_context, save_total_limit=1, identity=plan.checkpoint_identity("bench")
        )
        records = list(train(engine, data, plan.schedule, TrainState(), checkpoints, lambda: False))
        speeds = [record.tokens_per_second for record in records if isinstance(record, StepRecord)]
        losses = [record.loss for record in records if isinstance(record, EvalRecord)]
        yield {
            "trainable": plan.model_info["trainable"],
            "optimizer_bytes": engine.state.optimizer_bytes(),
            "peak_bytes": peak_memory_bytes(device) - baseline_bytes,
            "checkpoint_bytes": folder_size(scratch / "checkpoints"),
            "tokens_per_second": statistics.median(speeds[1:] or speeds),
            "loss": losses[-1],
            "loss_before": losses[0],
            "precision": plan.precision,
            "device": f"{describe_hardware(device)}, {dist_context.num_threads} threads",
            "torch": torch.__version__,
        }


if __name__ == "__main__":
    run_rank(measure_method)
