"""What each way of training holds, writes and reaches, one process each.

All go through the program's own engine and loop, on one device: the GPU where there is one, else the CPU. Weights are
random unless a folder has real ones, and the rows count upwards with some noise, so a loss says whether a method
learns, not how good it is.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from trainer.config.errors import UserError
from trainer.tools.bench.configs import METHODS
from trainer.tools.bench.tables import table_lines
from trainer.tools.worker_processes import last_line

HEADINGS = ("method", "trainable", "optimizer MiB", "peak MiB", "checkpoint MiB", "tokens/s", "validation loss")


def measure_methods(args: argparse.Namespace) -> int:
    """Measure every method and print the table; 1 where one failed."""
    for method in args.methods:
        if method not in METHODS:
            raise UserError(f"--methods {method}: expected some of {', '.join(METHODS)}")
    rows: list[list[str]] = []
    results: list[dict[str, Any]] = []
    for method in args.methods:
        job = json.dumps({**vars(args), "flags": METHODS[method]})
        command = [sys.executable, "-m", "trainer.tools.bench.method_worker", job]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            reason = last_line(process.stderr)
            rows.append([method, *["-"] * (len(HEADINGS) - 2), reason])
            print(f"{method}: failed: {reason}", file=sys.stderr, flush=True)
            continue
        results.append(json.loads(process.stdout.strip().splitlines()[-1]))
        rows.append([method, *format_cells(results[-1])])
        print(f"{method}: {results[-1]}", file=sys.stderr, flush=True)
    print("\n".join(table_lines(HEADINGS, rows)))
    if results:
        model = args.model or f"{args.shape}'s shape with random weights"
        workload = f"{args.steps} steps of {args.micro_batch} rows of {args.block_size} tokens"
        print("\n{}, {}, {precision}, on {device} with torch {torch}".format(model, workload, **results[-1]))
    return int(len(results) < len(rows))


def format_cells(result: Mapping[str, Any]) -> list[str]:
    """The cells of a row after its name."""
    sizes = [f"{result[name] / 2**20:,.1f}" for name in ("optimizer_bytes", "peak_bytes", "checkpoint_bytes")]
    return [f"{result['trainable']:,}", *sizes, f"{result['tokens_per_second']:,.0f}", f"{result['loss']:.4f}"]
