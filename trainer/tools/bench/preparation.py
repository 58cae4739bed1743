"""What preparing large text files costs.

Makes a text file of each size from a seed, tokenises and packs it as a run would: the rate, the largest resident memory
above the start, and what an epoch's order and a resumed run's way back to its rows take. Prepared data is as large on
disk as it has to be; memory must not grow with it.
"""

import argparse
import itertools
import tempfile
from functools import partial
from pathlib import Path

import psutil
import torch

from trainer.config import cli
from trainer.data.dataset import load, prepare
from trainer.data.sampler import epoch_order
from trainer.data.sources import DEMO_FILES
from trainer.distributed.process_group import peak_memory_bytes
from trainer.tools.bench.tables import table_lines
from trainer.tools.trial_engine import device_seconds, reset_peak_memory

HEADINGS = "text", "tokens", "prepare", "rate", "memory above the start", "order of an epoch", "rows of a resumed run"
CPU = torch.device("cpu")
SMALL_BYTES = 300_000


def measure_preparation(args: argparse.Namespace) -> int:
    """Print one row of a Markdown table for each size; 0."""
    for line in table_lines(HEADINGS, (_measure(size, args.model) for size in args.megabytes), num_left=0):
        print(line, flush=True)
    return 0


def _measure(megabytes: int, model: str) -> list[str]:
    """The row of a text file of that size."""
    with tempfile.TemporaryDirectory() as scratch:
        small_path, text_path, cache = (Path(scratch) / name for name in ("small.txt", "text.txt", "cache"))
        for path, size in ((small_path, SMALL_BYTES), (text_path, megabytes * 10**6)):
            write_text(path, size)

        def prepare_text(path: Path) -> Path:
            settings = cli.parse_args(["--mode", "full", "--data", str(path), "--model", model]).settings
            return prepare(settings.data, model=model, global_batch=8, cache=cache).folder

        prepare_text(small_path)  # the libraries are in memory before the count starts
        start_bytes = psutil.Process().memory_info().rss
        reset_peak_memory(CPU)
        elapsed_seconds = device_seconds(partial(prepare_text, text_path), CPU)
        growth_bytes = peak_memory_bytes(CPU) - start_bytes
        reload_seconds = device_seconds(lambda: load(prepare_text(text_path)), CPU)
        data = load(prepare_text(text_path))
        order = partial(epoch_order, data.train, seed=42, epoch=1, global_batch=8, shuffle=True, group_by_length=False)
        order_seconds = device_seconds(order, CPU)
    tokens = data.metadata["train"]["tokens"] + data.metadata["val"]["tokens"]
    return [
        f"{megabytes:,} MB",
        f"{tokens:,}",
        f"{elapsed_seconds:.1f} s",
        f"{megabytes / elapsed_seconds:.2f} MB/s",
        f"{growth_bytes / 2**20:.0f} MiB",
        f"{1000 * order_seconds:.1f} ms",
        f"{reload_seconds:.2f} s",
    ]


def write_text(path: Path, size: int) -> None:
    """A text file of about `size` bytes, one record a line, numbered so that none stands there twice."""
    lines = itertools.cycle(DEMO_FILES["demo-base"].read_text(encoding="utf-8").splitlines())
    with open(path, "w", encoding="utf-8") as file:
        for number in itertools.count():
            file.write(f"{number} {next(lines)}\n")
            if number % 2000 == 1999 and file.tell() >= size:
                return
