"""The trials of a study: who runs which, with which flags and GPUs, what came of it, and what a step takes.

The queue is the folders. A trial's run is `runs/NAME`; `trials/NAME` has its output (`log`), its state (`trial.json`)
and the lock that a worker holds while it runs the trial. A lock is free when its process is gone, on this machine or
another, so whoever finds it free takes the trial up where it was.
"""

import contextlib
import math
import shutil
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from trainer.config.errors import UserError
from trainer.config.files import read_json_object, write_atomically
from trainer.report.judge import CostRatio
from trainer.report.run_data import read_folder
from trainer.tools.processes import Slot, acquire_when_free, failure_reason, start_run
from trainer.tools.study.rule import METHODS, Rule
from trainer.tools.study.search import Candidate, TrialSpec
from trainer.tracking.records import EvalRecord, EventRecord, read_records
from trainer.tracking.run_lock import FolderInUseError, RunLock

TRIAL_FILE = "trial.json"
#: What a run of a study has unless the flags that are passed on say otherwise.
DEFAULT_ARGV = ("--num-samples", "0", "--save-every", "never", "--eval-every", "never", "--test-fraction", "0.1")
ADAPTER_FLAGS = ("--peft-config", "--adapter", "--quant", "--quant-double", "--modules-to-save")
TIMING_FILE = "timing.json"
NUM_ROUNDS = 4
MAX_SPREAD = 1.1  # of the ratios without one of the rounds, most over least
NUM_STEPS, NUM_WARMUP_STEPS = 16, 6
MAX_FAILURES = 3  # a trial that failed so often, or whose workers died, is not tried again
STOP_EXIT_CODES = {code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)}


def run_argv(method: str, train_argv: Sequence[str]) -> list[str]:
    """The flags of launch/train.py for a run of a method; full has none that are about adapters."""
    words = [word for word in train_argv if method != "full" or word.partition("=")[0] not in ADAPTER_FLAGS]
    return ["--mode", method, *DEFAULT_ARGV, *words]


def method_argv(rule: Rule, candidate: Candidate) -> list[str]:
    """The flags of launch/train.py that every run of a candidate has."""
    has_own_rank = any(word.startswith("--peft-config") for word in rule.train_argv)
    is_ranked = candidate.lora_rank is not None and not has_own_rank
    lora_rank = ["--lora-rank", str(candidate.lora_rank)] if is_ranked else []
    return [*run_argv(candidate.method, rule.train_argv), *lora_rank, "--lr", f"{candidate.lr:g}"]


def trial_argv(rule: Rule, spec: TrialSpec, folder: Path) -> list[str]:
    argv = [*method_argv(rule, spec.candidate), "--max-steps", str(spec.num_steps), "--seed", str(spec.seed)]
    if spec.phase == "search":  # its validation loss is all that is needed, and it never sees the test records
        argv += ["--export", "none"]
    return [*argv, "--base-from", str(folder.parent), "--output-dir", str(folder), "--run-name", spec.name]


class Trial(BaseModel):
    """The state of a trial: the content of trial.json."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    rule_sha256: str
    num_failures: int = 0  #: attempts that failed or whose worker died; the one that runs now counts until it ends
    loss: float | None = None  #: final validation loss
    failure: str | None = None  #: why there is none
    has_diverged: bool = False  #: a failure that says something about its settings

    @property
    def is_finished(self) -> bool:
        return self.loss is not None or self.failure is not None

    @property
    def result(self) -> float:
        """The loss, infinity where it diverged, NaN where it failed otherwise."""
        if self.loss is not None:
            return self.loss
        return math.inf if self.has_diverged else math.nan


def read_trials(study_folder: Path, name: str = "*") -> dict[str, Trial]:
    """{name: state} of the trials that were begun; of one that is damaged the run folder says how far it came."""
    trials = {}
    for path in sorted((study_folder / "trials").glob(f"{name}/{TRIAL_FILE}")):
        with contextlib.suppress(OSError, ValueError):
            if path.is_file():  # a named pipe would be waited for
                trials[path.parent.name] = Trial.model_validate_json(path.read_bytes())
    return trials


def read_results(study_folder: Path) -> dict[str, float]:
    """{name: `Trial.result`} of the finished trials."""
    return {name: trial.result for name, trial in read_trials(study_folder).items() if trial.is_finished}


def run_folder(study_folder: Path, spec: TrialSpec) -> Path:
    return study_folder / "runs" / spec.name


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A trial that a worker of this process holds; the lock is let go by `finish_trial`."""

    spec: TrialSpec
    trial: Trial
    lock: RunLock
    process: BaseProcess | None  #: None where nothing was left to run
    start_time: float


def start_trial(study_folder: Path, rule: Rule, slot: Slot, specs: Sequence[TrialSpec]) -> RunningTrial | None:
    """Begin, or go on with, the first of these trials that nobody runs and that has no result; None without one.
    `specs`: none that this process runs already, whose locks it would be given again."""
    for spec in specs:
        folder, run = study_folder / "trials" / spec.name, run_folder(study_folder, spec)
        lock = RunLock(folder)
        try:
            lock.acquire()
        except FolderInUseError:
            continue
        if not lock.is_held:
            raise UserError(f"{folder}: this file system has no locks; put the study on another one (--output-dir)")
        trial = read_trials(study_folder, spec.name).get(spec.name) or Trial(rule_sha256=rule.sha256)
        if trial.is_finished:  # by another worker, meanwhile
            lock.release()
            continue
        process = None
        if run_outcome(run)[0] is None and trial.num_failures < MAX_FAILURES:
            trial.num_failures += 1
            write_atomically(folder / TRIAL_FILE, trial.model_dump_json() + "\n")
            # Whether there is a run to go on with is decided by the run, once that of a dead worker has ended.
            argv = [*trial_argv(rule, spec, run), "--resume", "auto"]
            process = start_run(slot, argv, folder, group=f"study-{study_folder.name}-{rule.sha256[:12]}")
        return RunningTrial(spec=spec, trial=trial, lock=lock, process=process, start_time=time.monotonic())
    return None


def finish_trial(study_folder: Path, rule: Rule, running: RunningTrial, *, is_stopping: bool) -> tuple[str, str]:
    """Write the result of a trial whose run has ended and let it go. (One line about it; why no trial can run here, ""
    where they can: something is wrong with this machine or its data, not with the trial.)"""
    spec, trial, folder = running.spec, running.trial, study_folder / "trials" / running.spec.name
    run, exit_code = run_folder(study_folder, spec), (running.process.exitcode or 0) if running.process else 0
    (loss, has_diverged), problem = run_outcome(run), ""
    text = "cut off; the same command goes on with it"
    is_failure = False
    with contextlib.suppress(UserError, LookupError, TypeError):  # it may not have come so far, or the file is damaged
        data = str(read_json_object(run / "run.json")["data"]["fingerprint"])
        if not data.startswith(rule.data):
            problem = (
                f"its data have the fingerprint {data[:12]}, those that the study began with {rule.data}; restore "
                "them, and the same command goes on"
            )
    if problem:
        shutil.rmtree(run)
    elif exit_code == 0 and loss is not None:
        trial.loss, text = loss, f"validation loss {loss:.4f} ({time.monotonic() - running.start_time:.0f} s)"
    elif not running.process:
        trial.failure = text = f"failed, or its worker died, {MAX_FAILURES} times"
    elif not is_stopping and exit_code not in STOP_EXIT_CODES:
        reason = failure_reason(folder / "log", exit_code)
        if exit_code == UserError.exit_code or (exit_code > 0 and not (run / "run.json").exists()):
            problem = reason
        elif has_diverged or trial.num_failures >= MAX_FAILURES:
            trial.failure, trial.has_diverged, text = reason, has_diverged, f"failed: {reason}"
        else:  # out of memory, or killed by somebody
            is_failure, text = True, f"failed, and is tried again: {reason}"
    if running.process and not (trial.failure or is_failure):
        trial.num_failures -= 1
    write_atomically(folder / TRIAL_FILE, trial.model_dump_json() + "\n")
    running.lock.release()
    if trial.is_finished and spec.phase == "search":  # its losses are all that is needed of it
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return f"{spec.name}: {text}", f"{spec.name}: {problem}" if problem else ""


def run_outcome(run: Path) -> tuple[float | None, bool]:
    """(the last validation loss of a run that came to its end, None for any other; whether it diverged)."""
    try:
        records = list(read_records(run / "metrics.jsonl", with_steps=False))
    except (OSError, ValueError):
        return None, False
    events = {record.event for record in records if isinstance(record, EventRecord)}
    losses = [record.loss for record in records if isinstance(record, EvalRecord)]
    has_loss = "finished" in events and losses and math.isfinite(losses[-1])
    return losses[-1] if has_loss else None, "not_finite" in events


# --- what a step of each finalist takes: short runs in alternation on one machine, after all trials are done ---


class Timing(BaseModel):
    """Seconds of each step of each primary method, a list a round, and its peak memory: the content of timing.json."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    step_seconds: dict[str, list[list[float]]] = {}
    peak_memory_bytes: dict[str, int] = {}
    machine: str = ""
    reason: str = ""  #: why there are none

    def _mean_seconds(self, method: str, left_out: int | None = None) -> float:
        """Of a step: of each the least over the rounds but one (other work only makes one longer), then the mean."""
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
            return CostRatio(ratio=None, reason=self.reason, full=None, lora=None)
        (full, lora), (low, *_, high) = map(self._mean_seconds, METHODS), self.ratios
        reason = ""
        if high > MAX_SPREAD * low:
            reason = f"the machine was busy: LoRA's steps took {low:.2f}x to {high:.2f}x full's, by which round is "
            reason += f"left out; without {TIMING_FILE} they are timed again"
        ratio = None if reason else lora / full
        return CostRatio(ratio=ratio, reason=reason, full=full, lora=lora)

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
