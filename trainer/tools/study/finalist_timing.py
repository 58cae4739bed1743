"""What a step of each finalist takes: short runs in alternation on one machine, after all trials are done.

A run's own clock says what the machine was busy with while it ran. Two finalists that take turns share that: their
ratio is what a study reports, with the least and the most of the rounds.
"""

import fcntl
import json
import shutil
import statistics
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from trainer.config.files import write_atomically
from trainer.report.options import CostRatio
from trainer.report.run_data import RunData
from trainer.report.run_folder import read_folder
from trainer.tools.study.rule import PRIMARY, Rule
from trainer.tools.study.search import Candidate
from trainer.tools.study.trial_process import start_training
from trainer.tools.study.worker import Slot, last_log_line, method_argv, train_command

TIMING_FILE = "timing.json"
NUM_ROUNDS = 3
MAX_SPREAD = 1.3  # of the rounds' ratios, most over least
NUM_STEPS, NUM_WARMUP_STEPS = 16, 6


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a step of each primary method, one a round, and its peak memory; `reason`: why there are none."""

    step_seconds: dict[str, list[float]]
    peak_memory_bytes: dict[str, int]
    machine: str
    reason: str = ""

    @property
    def ratios(self) -> list[float]:
        """LoRA's seconds over full's in each round, least first."""
        full, lora = (self.step_seconds.get(method, []) for method in PRIMARY)
        return sorted(b / a for a, b in zip(full, lora, strict=True))

    @property
    def blocker(self) -> str:
        """Why the times are not divided, "" where they may be: not taken, or on a machine that did other work."""
        if self.reason or self.ratios[-1] <= MAX_SPREAD * self.ratios[0]:
            return self.reason
        return (
            f"the machine was busy: LoRA's steps took {self.ratios[0]:.2f}x to {self.ratios[-1]:.2f}x full's in "
            f"{len(self.ratios)} rounds; without {TIMING_FILE} they are timed again"
        )

    @property
    def median_step_seconds(self) -> dict[str, float]:
        """Of each primary method; none where they may not be compared."""
        return {} if self.blocker else {m: statistics.median(seconds) for m, seconds in self.step_seconds.items()}

    @property
    def cost(self) -> CostRatio:
        """LoRA's time of a step beside full's: the median of the rounds' ratios."""
        seconds = {method: statistics.median(values) for method, values in self.step_seconds.items() if values}
        ratio = None if self.blocker else statistics.median(self.ratios)
        return CostRatio(
            ratio=ratio, reason=self.blocker, full=seconds.get("full"), lora=seconds.get("lora"), is_of_a_step=True
        )

    def describe(self) -> str:
        """One line for people."""
        if self.reason:
            return f"time and memory: not compared ({self.reason})"
        memory = self.peak_memory_bytes["lora"] / self.peak_memory_bytes["full"]
        time = f"not compared ({self.blocker})"
        if not self.blocker:
            time = (
                f"{statistics.median(self.ratios):.2f}x full's ({self.ratios[0]:.2f} to {self.ratios[-1]:.2f} in "
                f"{len(self.ratios)} rounds, in alternation on {self.machine})"
            )
        return f"LoRA's time of a step: {time}; its peak memory: {memory:.2f}x full's"


def time_finalists(
    folder: Path, rule: Rule, finalists: Mapping[str, Candidate], slot: Slot, should_stop: threading.Event
) -> Timing | None:
    """The timing of a study: read where it was taken before, by another worker too; None where it is to stop."""
    path = folder / TIMING_FILE
    with open(folder / f"{TIMING_FILE}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return Timing(**json.loads(path.read_text()))
        seconds: dict[str, list[float]] = {method: [] for method in PRIMARY}
        peaks, machine, reason = dict.fromkeys(PRIMARY, 0), "", ""
        for n in range(2 * NUM_ROUNDS):
            method = PRIMARY[(n + n // 2) % 2]  # full lora lora full full lora: a drift of the machine cancels
            run_folder, log = folder / "timing" / method, folder / f"timing-{method}.log"
            shutil.rmtree(run_folder, ignore_errors=True)
            argv = [
                *method_argv(rule, finalists[method]), "--max-steps", str(NUM_STEPS), "--export", "none",
                "--wandb", "disabled", "--output-dir", str(run_folder),
            ]  # fmt: skip
            process = start_training(train_command(slot, argv, log), lock)
            while process.exitcode is None:
                process.join(0.2)
                if should_stop.is_set():
                    process.kill()
                    return None
            if process.exitcode:
                reason = f"{method} failed: {last_log_line(log, process.exitcode)}"
                break
            step_seconds, peak_memory_bytes, machine = _measure(read_folder(run_folder))
            seconds[method].append(step_seconds)
            peaks[method] = max(peaks[method], peak_memory_bytes)
        shutil.rmtree(folder / "timing", ignore_errors=True)
        timing = Timing(step_seconds=seconds, peak_memory_bytes=peaks, machine=machine, reason=reason)
        write_atomically(path, json.dumps(asdict(timing), indent=1) + "\n")
        return timing


def _measure(run: RunData) -> tuple[float, int, str]:
    """(median seconds of a step, peak memory in bytes, device) of a run."""
    seconds = statistics.median(map(float, np.diff(run.steps["time"][NUM_WARMUP_STEPS:])))
    device = run.get("hardware.gpu") or f"{run.get('hardware.cores')} cores of {run.get('hardware.cpu')}"
    return seconds, run.summary["peak_memory_bytes"], device
