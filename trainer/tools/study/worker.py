"""One trial: launch/train.py in a process of its own, with its own GPUs, while its lease is renewed."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO

from trainer.config.errors import UserError
from trainer.distributed.launch_environment import without_launcher
from trainer.tools.study.rule import METHODS, Rule
from trainer.tools.study.search import Candidate, TrialSpec
from trainer.tools.study.trial_process import start_training
from trainer.tools.study.trial_queue import LEASE_SECONDS, Claim, TrialQueue, worker_name
from trainer.tracking.records import EvalRecord, EventRecord, Record, read_records
from trainer.tracking.wandb_environment import RUN_VARIABLES

LAUNCH_FOLDER = Path(__file__).parents[3] / "launch"
#: What a run of a study has unless the flags that are passed on say otherwise.
DEFAULT_ARGV = ("--num-samples", "0", "--save-every", "never", "--eval-every", "never", "--test-fraction", "0.1")
RESERVED_FLAGS = (
    "--mode",
    "--adapter",
    "--quant",
    "--seed",
    "--lr",
    "--lora-rank",
    "--output-dir",
    "--run-name",
    "--resume",
    "--dry-run",
    "--find-lr",
    "--find-batch",
    "--export",
)
RENEW_SECONDS = LEASE_SECONDS / 4
MAX_ATTEMPTS = 3  # a trial that was killed so often, or whose workers were, is taken for what killed them
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one worker of this machine may use."""

    name: str  #: of the worker: machine, process and number
    gpus: tuple[str, ...]  #: as CUDA_VISIBLE_DEVICES has them; () on a CPU
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a run ended; with neither it was cut off and goes on later."""

    loss: float | None = None  #: its final validation loss
    failure: str | None = None
    has_diverged: bool = False  #: a failure that says something of its settings
    is_tried_again: bool = False  #: it failed, and not for the last time

    @property
    def is_final(self) -> bool:
        """Whether the trial is over."""
        return self.loss is not None or (self.failure is not None and not self.is_tried_again)


def make_slots(num_workers: int, gpus_per_trial: int | None) -> list[Slot]:
    """Each worker's own GPUs, `gpus_per_trial` of them (left out: one where there is any); UserError for too many."""
    gpus = visible_gpus()
    per_trial = gpus_per_trial if gpus_per_trial is not None else min(1, len(gpus))
    if num_workers * per_trial > len(gpus):
        raise UserError(
            f"--workers {num_workers} x --gpus-per-trial {per_trial}: needs {num_workers * per_trial} GPUs, here are "
            f"{len(gpus)}; lower one of them"
        )
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
    return [
        Slot(name=worker_name(n), gpus=tuple(gpus[n * per_trial : (n + 1) * per_trial]), num_threads=num_threads)
        for n in range(num_workers)
    ]


def visible_gpus() -> list[str]:
    """The GPUs of this machine that this process may use, without asking torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip()]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
        return [str(n) for n, line in enumerate(listing.stdout.splitlines()) if line.startswith("GPU ")]
    return []


def method_argv(rule: Rule, candidate: Candidate) -> list[str]:
    """The flags of launch/train.py that every run of a candidate has."""
    rank = ["--lora-rank", str(candidate.lora_rank)] if candidate.lora_rank is not None else []
    return [*METHODS[candidate.method], *DEFAULT_ARGV, *rule.train_argv, *rank, "--lr", f"{candidate.lr:g}"]


def trial_argv(rule: Rule, spec: TrialSpec, folder: Path) -> list[str]:
    """The flags of launch/train.py for a trial whose run folder is `folder`."""
    argv = [*method_argv(rule, spec.candidate), "--max-steps", str(spec.num_steps), "--seed", str(spec.seed)]
    if spec.phase == "search":  # its validation loss is all that is needed, and it never sees the test records
        argv += ["--export", "none"]
    if spec.phase == "quarter":
        argv += ["--global-batch", str(rule.quarter_batch)]
    return [*argv, "--output-dir", str(folder), "--run-name", spec.name]


def train_environ(slot: Slot, group: str = "") -> dict[str, str]:
    """All variables of a run that has what a slot may use, and is one of this group on W&B."""
    inherited = {name: value for name, value in without_launcher(os.environ).items() if name not in RUN_VARIABLES}
    env = {"OMP_NUM_THREADS": str(slot.num_threads), **inherited}
    env.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")  # run.json has the versions; to list them takes 0.8 s a trial
    return env | {"WANDB_RUN_GROUP": group, "CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}


def start_run(
    slot: Slot, argv: Sequence[str], log: Path, *, group: str = "", lock: IO[str] | None = None
) -> ForkServerProcess:
    """launch/train.py with what a slot may use."""
    return start_training(LAUNCH_FOLDER / "train.py", argv, env=train_environ(slot, group), log=log, lock=lock)


def execution_argv(rule: Rule, slot: Slot) -> list[str]:
    """One way to run steps for all runs of a study, unless its flags name one: eager where a method has no CUDA graphs.

    Else runs would differ in more than what is studied.
    """
    if not slot.gpus or "--execution" in rule.train_argv:
        return []
    is_blocked = "--activation-checkpointing" in rule.train_argv or any("--quant" in METHODS[m] for m in rule.methods)
    return ["--execution", "eager"] if is_blocked else []


def run_folder(study_folder: Path, spec: TrialSpec) -> Path:
    """Where the run of a trial lies."""
    return study_folder / "runs" / spec.name


@dataclass(frozen=True, kw_only=True)
class TrialRunner:
    """Runs the trials that one worker has claimed."""

    rule: Rule
    study_folder: Path
    slot: Slot
    queue: TrialQueue
    should_stop: threading.Event

    def run(self, claim: Claim, spec: TrialSpec) -> TrialResult:
        """Run a trial to its end and write its result; a run that was cut off is gone on with.

        UserError where it cannot run here: what is wrong is this machine or its data, and no result of the trial.
        """
        if claim.num_failures >= MAX_ATTEMPTS:
            result = TrialResult(failure=f"its worker died {MAX_ATTEMPTS} times while it ran")
        else:
            try:
                result = self._run_process(claim, spec)
            except UserError:
                self.queue.release(claim)
                raise
        if not result.is_final:
            self.queue.release(claim, has_failed=result.is_tried_again)
            return result
        self.queue.finish(claim, loss=result.loss, failure=result.failure, has_diverged=result.has_diverged)
        if spec.phase == "search":  # its losses are all that is needed of it
            shutil.rmtree(run_folder(self.study_folder, spec) / "checkpoints", ignore_errors=True)
        return result

    def _run_process(self, claim: Claim, spec: TrialSpec) -> TrialResult:
        folder = run_folder(self.study_folder, spec)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log_path = folder.with_name(f"{folder.name}.log")
        with open(folder.with_name(f"{folder.name}.lock"), "w", encoding="utf-8") as lock:
            if not self._wait_for_lock(lock, claim):  # what a dead worker started may still be writing there
                return TrialResult()
            if (loss := final_loss(folder)) is not None:  # its worker died between its end and the note of it
                return TrialResult(loss=loss)
            argv = [
                *trial_argv(self.rule, spec, folder),
                *execution_argv(self.rule, self.slot),
                *(["--resume"] if (folder / "run.json").exists() else []),
            ]
            group = f"study-{self.study_folder.name}-{self.rule.sha256[:12]}"
            exit_code = self._watch(start_run(self.slot, argv, log_path, group=group, lock=lock), claim)
        self._check_data(folder)
        loss = final_loss(folder)
        if exit_code == 0 and loss is not None:
            return TrialResult(loss=loss)
        if self.should_stop.is_set() or exit_code in {code for s in STOP_SIGNALS for code in (-s, 128 + s)}:
            return TrialResult()
        failure, has_diverged = last_log_line(log_path, exit_code), "not_finite" in run_events(folder)
        if exit_code == UserError.exit_code or (exit_code > 0 and not (folder / "run.json").exists()):
            raise UserError(f"{spec.name}: {failure}")
        if not has_diverged and claim.num_failures + 1 < MAX_ATTEMPTS:  # out of memory, or killed by somebody
            return TrialResult(failure=failure, is_tried_again=True)
        return TrialResult(failure=failure, has_diverged=has_diverged)

    def _check_data(self, folder: Path) -> None:
        """UserError, and the run is removed, where it was trained on other data than the study began with."""
        try:
            data = json.loads((folder / "run.json").read_bytes())["data"]["fingerprint"]
        except (OSError, ValueError):  # it did not come so far
            return
        if not data.startswith(self.rule.data):
            shutil.rmtree(folder)
            raise UserError(
                f"{folder.name}: its data have the fingerprint {data[:12]}, those that the study began with "
                f"{self.rule.data}; put them back, and the same command goes on"
            )

    def _watch(self, process: ForkServerProcess, claim: Claim) -> int:
        """Wait for the end; the run is ended where the study stops, or where another worker has taken the trial."""
        next_renewal = time.monotonic() + RENEW_SECONDS
        while True:
            process.join(0.2)
            if process.exitcode is not None:
                return process.exitcode
            if time.monotonic() > next_renewal:
                next_renewal = time.monotonic() + RENEW_SECONDS
                if not self.queue.renew(claim):
                    process.kill()
            if self.should_stop.is_set():
                process.terminate()  # it saves where it stands
                process.join(60)
                process.kill()

    def _wait_for_lock(self, lock: IO[str], claim: Claim) -> bool:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            if self.should_stop.wait(1.0) or not self.queue.renew(claim):
                return False


def final_loss(folder: Path) -> float | None:
    """The last validation loss of a run that came to its end; None for any other."""
    losses = [record.loss for record in _records(folder) if isinstance(record, EvalRecord)]
    return losses[-1] if "finished" in run_events(folder) and losses and math.isfinite(losses[-1]) else None


def run_events(folder: Path) -> set[str]:
    """The kinds of events that a run has recorded."""
    return {record.event for record in _records(folder) if isinstance(record, EventRecord)}


def _records(folder: Path) -> list[Record]:
    try:
        return list(read_records(folder / "metrics.jsonl", with_steps=False))
    except (OSError, ValueError):
        return []


def last_log_line(log_path: Path, exit_code: int) -> str:
    """What a failed run said last."""
    lines = [line.strip() for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    reason = (errors or [line for line in lines if line] or [""])[-1].removeprefix("error: ")[:300]
    if exit_code < 0:
        return f"killed by signal {-exit_code}" + (f" after: {reason}" if reason else "")
    return reason or f"exit code {exit_code}"
