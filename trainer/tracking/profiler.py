"""`--profile STEPS`: torch's profiler over some steps of a normal run; a trace file and a table of the ten largest."""

import logging
from pathlib import Path
from typing import Any

from trainer.tracking.records import Record, StepRecord

logger = logging.getLogger(__name__)
NUM_WARMUP_STEPS = 3  # steps before it begins: the first ones allocate and compile
NUM_TOP_OPERATIONS = 10


class ProfileLogger:
    """Profiles rank 0 from step 4 of this start on, for `num_steps` steps, and writes OUT/profile/.

    trace.json.gz opens in Perfetto or chrome://tracing; top.md holds the operations that took the most time of
    their own. It changes no number, but the profiled steps take longer.
    """

    def __init__(self, folder: Path, num_steps: int) -> None:
        self._folder, self._num_steps = folder / "profile", num_steps
        self._num_profiled = -NUM_WARMUP_STEPS  # below 0: the steps until it begins
        self._profiler: Any = None

    def log(self, record: Record) -> None:
        """Begin or end after a step."""
        if isinstance(record, StepRecord):
            self._num_profiled += 1
            if self._num_profiled == 0:
                from torch.profiler import profile

                self._profiler = profile(acc_events=True)  # of the processor, and of the GPU where there is one
                self._profiler.start()
            elif self._num_profiled == self._num_steps:
                self._end()

    def close(self, exit_code: int) -> None:
        """End, where the run was shorter than what was asked for."""
        if self._num_profiled <= 0:
            logger.info(f"--profile: the run ended before its step {NUM_WARMUP_STEPS + 1}, nothing was profiled")
        if self._profiler is not None:
            self._end()

    def _end(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._num_profiled == 0:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        table = top_table(profiler.key_averages(), self._num_profiled)
        (self._folder / "top.md").write_text(table, encoding="utf-8")
        logger.info(f"profile of {self._num_profiled} steps in {self._folder}:\n{table.rstrip()}")


def top_table(averages: Any, num_steps: int) -> str:
    """The NUM_TOP_OPERATIONS dearest operations of a profile by their own time, as Markdown; milliseconds per step."""
    on_gpu = any(row.self_device_time_total > 0 for row in averages)

    def self_time(row: Any) -> float:
        return float(row.self_device_time_total if on_gpu else row.self_cpu_time_total)

    total = sum(map(self_time, averages)) or 1.0
    lines = [f"| operation | calls/step | {'GPU' if on_gpu else 'CPU'} ms/step | share |", "|---|--:|--:|--:|"]
    for row in sorted(averages, key=self_time, reverse=True)[:NUM_TOP_OPERATIONS]:
        name = row.key.replace("|", "\\|")[:60]
        time, share = self_time(row) / 1000 / num_steps, 100 * self_time(row) / total
        lines.append(f"| {name} | {row.count / num_steps:.1f} | {time:.2f} | {share:.1f}% |")
    return "\n".join(lines) + "\n"
