"""What a step of each finalist takes: short runs in alternation on one machine, after all trials are done.

A run's own clock says what the machine was busy with while it ran. Two finalists that take turns share that, and of
each step the least over the rounds counts: other work only ever makes one longer. Where leaving out one of the rounds
changes the ratio much it is withheld.
"""

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from trainer.config.files import write_atomically
from trainer.report.judge import CostRatio
from trainer.report.run_data import read_folder
from trainer.tools.processes import Slot, acquire_when_free, failure_reason, start_run
from trainer.tools.study.rule import METHODS, Rule
from trainer.tools.study.search import Candidate
from trainer.tools.study.trials import method_argv

TIMING_FILE = "timing.json"
NUM_ROUNDS = 4
MAX_SPREAD = 1.1  # of the ratios without one of the rounds, most over least
NUM_STEPS, NUM_WARMUP_STEPS = 16, 6


class Timing(BaseModel):
    """Seconds of each step of each primary method, a list a round, and its peak memory: the content of timing.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    step_seconds: dict[str, list[list[float]]] = {}
    peak_memory_bytes: dict[str, int] = {}
    machine: str = ""
    reason: str = ""  #: why there are none

    def _mean_seconds(self, method: str, left_out: int | None = None) -> float:
        """Seconds of a step: of each step the least over the rounds but one, the mean over the steps."""
        rounds = [seconds for n, seconds in enumerate(self.step_seconds[method]) if n != left_out]
        return float(np.mean(np.min(rounds, axis=0)))

    @property
    def ratios(self) -> list[float]:
        """LoRA's seconds over full's without one of the rounds, least first."""
        rounds = range(len(self.step_seconds["full"]))
        return sorted(self._mean_seconds("lora", n) / self._mean_seconds("full", n) for n in rounds)

    @property
    def cost(self) -> CostRatio:
        """LoRA's time of a step beside full's; no ratio where none was taken, or on a machine that did other work."""
        if self.reason:
            return CostRatio(ratio=None, reason=self.reason, full=None, lora=None, is_of_a_step=True)
        (full, lora), (low, *_, high) = map(self._mean_seconds, METHODS), self.ratios
        reason = ""
        if high > MAX_SPREAD * low:
            reason = (
                f"the machine was busy: LoRA's steps took {low:.2f}x to {high:.2f}x full's, by which round is left "
            )
            reason += f"out; without {TIMING_FILE} they are timed again"
        ratio = None if reason else lora / full
        return CostRatio(ratio=ratio, reason=reason, full=full, lora=lora, is_of_a_step=True)

    @property
    def memory(self) -> CostRatio:
        """LoRA's peak memory beside full's, other work or not: that takes none of a process's own."""
        full, lora = (self.peak_memory_bytes.get(method) for method in METHODS)
        return CostRatio(ratio=lora / full if full and lora else None, reason=self.reason, full=full, lora=lora)

    def describe(self) -> str:
        if self.reason:
            return f"time and memory: not compared ({self.reason})"
        cost, (low, *_, high) = self.cost, self.ratios
        time = f"not compared ({cost.reason})"
        if cost.ratio is not None:
            time = f"{cost.ratio:.2f}x full's ({low:.2f} to {high:.2f} without one round, in alternation on "
            time += f"{self.machine})"
        return f"LoRA's time of a step: {time}; its peak memory: {self.memory.ratio:.2f}x full's"


def time_finalists(
    study_folder: Path, rule: Rule, finalists: Mapping[str, Candidate], slot: Slot, should_stop: threading.Event
) -> Timing | None:
    """The timing of a study, read where it was taken before, by another worker too; None where it is to stop."""
    folder = study_folder / "timing"
    if (lock := acquire_when_free(folder, should_stop)) is None:
        return None
    try:
        if (timing := read_timing(study_folder)) is not None:
            return timing
        step_seconds: dict[str, list[list[float]]] = {method: [] for method in METHODS}
        peaks = dict.fromkeys(METHODS, 0)
        machine = reason = ""
        for method in (*METHODS, *METHODS[::-1]) * (NUM_ROUNDS // 2):  # so that a drift of the machine cancels
            shutil.rmtree(folder / method, ignore_errors=True)
            argv = [*method_argv(rule, finalists[method]), "--max-steps", str(NUM_STEPS), "--export", "none"]
            argv += ["--wandb", "disabled", "--base-from", str(study_folder / "runs")]
            argv += ["--output-dir", str(folder / method / "run")]
            process = start_run(slot, argv, folder / method)
            while process.exitcode is None:
                process.join(0.2)
                if should_stop.is_set():
                    process.kill()
                    return None
            if process.exitcode:
                reason = f"{method} failed: {failure_reason(folder / method / 'log', process.exitcode)}"
                break
            run = read_folder(folder / method / "run")
            step_seconds[method].append(np.diff(run.steps["time"][NUM_WARMUP_STEPS:]).tolist())
            peaks[method] = max(peaks[method], run.summary["peak_memory_bytes"])
            machine = run.get("hardware.gpu") or f"{run.get('hardware.cores')} cores of {run.get('hardware.cpu')}"
        timing = Timing(step_seconds=step_seconds, peak_memory_bytes=peaks, machine=machine, reason=reason)
        write_atomically(study_folder / TIMING_FILE, timing.model_dump_json(indent=1) + "\n")
        for method in METHODS:
            shutil.rmtree(folder / method, ignore_errors=True)
        return timing
    finally:
        lock.release()


def read_timing(study_folder: Path) -> Timing | None:
    """The timing that was taken before; None where there is none, or the file is damaged: it is taken again then."""
    path = study_folder / TIMING_FILE
    if not path.is_file():  # a named pipe would be waited for
        return None
    try:
        timing = Timing.model_validate_json(path.read_bytes())
        timing.describe()
        return timing
    except (OSError, ValueError, LookupError, ArithmeticError, TypeError):
        return None
