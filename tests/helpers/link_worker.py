"""`python -m helpers.link_worker JOB`: one rank's steps in windows, each begun when a file says so."""

import json
import sys
import time
from pathlib import Path

from trainer.distributed import gradients
from trainer.distributed.process_group import destroy_process_group, init_distributed
from trainer.tools.bench import runners
from trainer.tools.bench.configs import BenchmarkConfig


def count_sent_bytes() -> int:
    """All that this host's link has sent since it was made, headers included."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0" in line)
    return int(line.split()[9])


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    config, folder = BenchmarkConfig(**job["config"]), Path(job["folder"])
    gradients.MIN_BUCKET_BYTES["gloo"] = job["bucket_bytes"]
    context = init_distributed("cpu")
    try:
        setup = runners.build_setup(config, context)
        steps, _ = runners.run_ours(setup)
        for _ in range(config.warmup_steps):
            next(steps)
        (folder / f"ready-{context.rank}").touch()
        for window in range(config.num_windows):
            deadline = time.monotonic() + 120
            while not (folder / f"go-{window}").exists():
                assert time.monotonic() < deadline, "nobody sets the links"
                time.sleep(0.01)
            next(steps)  # both are there after it
            start, num_bytes = time.perf_counter(), count_sent_bytes()
            for _ in range(config.steps_per_window - 1):
                next(steps)
            num_steps = config.steps_per_window - 1
            figures = ((time.perf_counter() - start) / num_steps, (count_sent_bytes() - num_bytes) / num_steps)
            (folder / f"unfinished.{context.rank}").write_text(json.dumps(figures))
            (folder / f"unfinished.{context.rank}").rename(folder / f"done-{window}-{context.rank}")
    finally:
        destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
