"""Measure what preparing a large text file costs: `python launch/bench_data.py --megabytes 2048`.

Makes a text file of that size from a seed, tokenises and packs it as a run would, and prints the rate and the largest
resident memory above the start. Prepared data is as large on disk as it has to be; memory must not grow with it.
"""

import argparse
import itertools
import resource
import tempfile
import threading
import time
from pathlib import Path

from trainer import flags
from trainer.base.text import documents
from trainer.data import prepare


def main() -> None:
    """Make, prepare, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256, help="size of the text file (default: 256)")
    parser.add_argument("--model", default="demo-base", help="whose tokenizer (default: demo-base)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        write_text(text, options.megabytes * 10**6)
        settings = flags.read(["--mode", "full", "--data", str(text), "--model", options.model]).settings
        prepare_small(Path(scratch), options.model)  # the libraries are in memory before the count starts
        watch = Watch()
        began = time.perf_counter()
        ready = prepare(settings.data, model=options.model, global_batch=8, cache=Path(scratch) / "cache")
        seconds = time.perf_counter() - began
        growth = watch.stop()
        began = time.perf_counter()
        prepare(settings.data, model=options.model, global_batch=8, cache=Path(scratch) / "cache")
        again = time.perf_counter() - began
    tokens = ready.facts["train"]["tokens"] + ready.facts["val"]["tokens"]
    print(
        f"{options.megabytes} MB of text, {tokens:,} tokens: {seconds:.0f} s, {options.megabytes / seconds:.2f} MB/s, "
        f"resident memory at most {growth / 2**20:.0f} MiB above the start; from the cache {again:.1f} s"
    )


def write_text(path: Path, size: int) -> None:
    """A text file of about `size` bytes, one record a line."""
    lines = [document.replace("\n", " ") for document in itertools.islice(documents(7), 20_000)]
    with open(path, "w") as file:
        number = 0
        while file.tell() < size:
            # numbered, so that no record stands there twice
            file.writelines(f"{number + n} {line}\n" for n, line in enumerate(lines[:2000]))
            number += 2000
            lines = lines[2000:] + lines[:2000]


def prepare_small(scratch: Path, model: str) -> None:
    """One small preparation, for what it imports."""
    small = scratch / "small.txt"
    write_text(small, 300_000)
    settings = flags.read(["--mode", "full", "--data", str(small), "--model", model]).settings
    prepare(settings.data, model=model, global_batch=1, cache=scratch / "small-cache")


class Watch:
    """The largest resident memory of this process since it was made, sampled ten times a second."""

    def __init__(self) -> None:
        self.start = self.most = resident()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()

    def _sample(self) -> None:
        while not self.stopped.wait(0.1):
            self.most = max(self.most, resident())

    def stop(self) -> int:
        """Bytes above the start."""
        self.stopped.set()
        self.thread.join()
        return self.most - self.start


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
