"""What preparing large text files costs.

Makes a text file of each size from a seed, tokenises and packs it as a run would: the rate, the largest resident memory
above the start, and what an epoch's order and a resumed run's way back to its rows take. Prepared data is as large on
disk as it has to be; memory must not grow with it.
"""

import itertools
import resource
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.config import cli
from trainer.data.dataset import load, prepare
from trainer.data.demo_base_text import documents
from trainer.data.sampler import epoch_order

HEADINGS = "text", "tokens", "prepare", "rate", "memory above the start", "order of an epoch", "rows of a resumed run"


def measure_preparation(megabytes: Sequence[int], model: str) -> int:
    """Print one row of a Markdown table for each size; 0."""
    print("| " + " | ".join(HEADINGS) + " |\n|" + "--:|" * len(HEADINGS), flush=True)
    for size in megabytes:
        print(measure(size, model), flush=True)
    return 0


def measure(megabytes: int, model: str) -> str:
    """The row of a text file of that size."""
    with tempfile.TemporaryDirectory() as scratch:
        text_path = Path(scratch) / "text.txt"
        write_text(text_path, megabytes * 10**6)
        settings = cli.parse_args(["--mode", "full", "--data", str(text_path), "--model", model]).settings
        prepare_small(Path(scratch), model)  # the libraries are in memory before the count starts
        memory_sampler = PeakMemorySampler()
        start_time = time.perf_counter()
        prepared_data = prepare(settings.data, model=model, global_batch=8, cache=Path(scratch) / "cache")
        elapsed_seconds = time.perf_counter() - start_time
        growth_bytes = memory_sampler.stop()
        start_time = time.perf_counter()
        train_rows = load(
            prepare(settings.data, model=model, global_batch=8, cache=Path(scratch) / "cache").folder
        ).train
        reload_seconds = time.perf_counter() - start_time
        start_time = time.perf_counter()
        epoch_order(train_rows, seed=42, epoch=1, global_batch=8, shuffle=True, group_by_length=False)
        order_seconds = time.perf_counter() - start_time
    tokens = prepared_data.metadata["train"]["tokens"] + prepared_data.metadata["val"]["tokens"]
    return (
        f"| {megabytes:,} MB | {tokens:,} | {elapsed_seconds:.1f} s | {megabytes / elapsed_seconds:.2f} MB/s | "
        f"{growth_bytes / 2**20:.0f} MiB | {1000 * order_seconds:.1f} ms | {reload_seconds:.2f} s |"
    )


def write_text(path: Path, size: int) -> None:
    """A text file of about `size` bytes, one record a line."""
    lines = [document.replace("\n", " ") for document in itertools.islice(documents(7), 20_000)]
    with open(path, "w", encoding="utf-8") as file:
        line_number = 0
        while file.tell() < size:
            # numbered, so that no record stands there twice
            file.writelines(f"{line_number + n} {line}\n" for n, line in enumerate(lines[:2000]))
            line_number += 2000
            lines = lines[2000:] + lines[:2000]


def prepare_small(scratch: Path, model: str) -> None:
    """One small preparation, for what it imports."""
    small_path = scratch / "small.txt"
    write_text(small_path, 300_000)
    settings = cli.parse_args(["--mode", "full", "--data", str(small_path), "--model", model]).settings
    prepare(settings.data, model=model, global_batch=1, cache=scratch / "small-cache")


class PeakMemorySampler:
    """The largest resident memory of this process since it was made, sampled ten times a second."""

    def __init__(self) -> None:
        self.start_bytes = self.peak_bytes = resident_bytes()
        self.stop_event = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.stop_event.wait(0.1):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def stop(self) -> int:
        """Bytes above the start."""
        self.stop_event.set()
        self.thread.join()
        return self.peak_bytes - self.start_bytes


def resident_bytes() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()
