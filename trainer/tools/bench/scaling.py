"""How the cost of a token grows with ranks, block length and width, and a model of more GPUs than are here.

Measured on this machine, each variant in processes of its own and in alternation; 8 and 64 GPUs follow by the formula
of `trainer.tools.bench.comm_model` from the time of one GPU's step.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.tools.bench.comm_model import Workload, scaling_table
from trainer.tools.bench.configs import BenchmarkConfig
from trainer.tools.bench.shapes import save_config
from trainer.tools.bench.steps import run_rounds
from trainer.tools.bench.tables import table_lines

GPT2, ADAPTERS = 124_439_808, 1_179_648  # weights of GPT-2, and of adapters of rank 8 on its Conv1D layers
GPT2_EMBEDDING = 50_257 * 768  # of them those of the tied embedding
HEADINGS = ("width", "block", "ranks", "batch", "ms/step", "spread", "us/token")  # spread: of the rounds' medians


def measure_scaling(args: argparse.Namespace) -> int:
    """Measure and print; 1 where a variant failed."""
    rows: list[dict[str, Any]] = []
    if not args.only_model:
        with tempfile.TemporaryDirectory() as scratch:
            rows = run_rounds(_build_configs(args, Path(scratch)), rounds=args.rounds)
        print("", *table_lines(HEADINGS, map(_format_cells, rows), num_left=0), sep="\n", flush=True)
    if args.step_ms:
        print(f"\nmodelled: GPT-2 124M, 2 x 1024 tokens a GPU in {args.step_ms:g} ms; efficiency (communication)\n")
        print(scaling_table(_model_workloads(args.step_ms / 1000)))
    return int(any(row["problem"] for row in rows))


def _model_workloads(compute_seconds: float) -> dict[str, tuple[int, Workload]]:
    full = Workload(compute_seconds=compute_seconds, num_trainable=GPT2, tied_share=GPT2_EMBEDDING / GPT2)
    adapters = Workload(
        compute_seconds=compute_seconds, num_trainable=ADAPTERS, num_frozen=GPT2, num_persistent=ADAPTERS
    )
    return {
        "full, zero0": (0, full),
        "full, zero1": (1, full),
        "full, zero3": (3, full),
        "LoRA, zero1": (1, adapters),
        "LoRA, zero3": (3, adapters),
    }


def _build_configs(args: argparse.Namespace, scratch: Path) -> list[BenchmarkConfig]:
    """One of width, block length and ranks varied at a time, from the largest width and the middle block."""
    width, block_size, world_size = max(args.widths), sorted(args.blocks)[len(args.blocks) // 2], min(args.ranks)
    combinations = [(width, block_size, n) for n in args.ranks]
    combinations += [(width, n, world_size) for n in args.blocks] + [(n, block_size, world_size) for n in args.widths]
    return [
        BenchmarkConfig(
            program="ours",
            mode="full",
            global_batch=max(world_size, args.tokens // block_size),
            ds_config=None,
            world_size=world_size,
            model=save_config(scratch / f"gpt2-width-{width}", n_embd=width),
            block_size=block_size,
            device=args.device,
            dropout=0.1,
            num_windows=args.windows,
            steps_per_window=1,
            warmup_steps=1,
        )
        for width, block_size, world_size in dict.fromkeys(combinations)
    ]


def _format_cells(row: Mapping[str, Any]) -> list[str]:
    width = row["model"].rsplit("-", 1)[-1]
    cells = [width, *(str(row[name]) for name in ("block_size", "world_size", "global_batch"))]
    if row["problem"]:
        return [*cells, row["problem"], "", ""]
    low, high = (1000 * seconds for seconds in row["spread"])
    return [*cells, f"{1000 * row['step']:.0f}", f"{low:.0f}-{high:.0f}", f"{1e6 / row['tokens_per_second']:.0f}"]
