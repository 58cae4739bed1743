"""The trials of a study: who runs which, with which flags and GPUs, and what came of it.

The queue is the folders. A trial's run is `runs/NAME`; `trials/NAME` has its output (`log`), its state (`trial.json`)
and the lock that a worker holds while it runs the trial. A lock is free when its process is gone, on this machine or
another, so whoever finds it free takes the trial up where it was.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.distributed.launch_environment import without_launcher
from trainer.tools.study.rule import METHODS, Rule
from trainer.tools.study.search import Candidate, TrialSpec
from trainer.tools.study.trial_process import start_training
from trainer.tools.worker_processes import failure_reason
from trainer.tracking.records import EvalRecord, EventRecord, read_records
from trainer.tracking.run_lock import FolderInUseError, RunLock
from trainer.tracking.wandb_logger import RUN_VARIABLES

LAUNCH_FOLDER = Path(__file__).parents[3] / "launch"
TRIAL_FILE = "trial.json"
#: What a run of a study has unless the flags that are passed on say otherwise.
DEFAULT_ARGV = ("--num-samples", "0", "--save-every", "never", "--eval-every", "never", "--test-fraction", "0.1")
MAX_FAILURES = 3  # a trial that failed so often, or whose workers died, is not tried again
STOP_SECONDS = 60.0  # that runs get to save where they stand
STOP_EXIT_CODES = {code for number in (signal.SIGINT, signal.SIGTERM) for code in (-number, 128 + number)}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one worker of this machine may use."""

    gpus: tuple[str, ...]  #: as CUDA_VISIBLE_DEVICES has them; () on a CPU
    num_threads: int


def make_slots(num_workers: int, gpus_per_trial: int | None) -> list[Slot]:
    """Each worker's own GPUs, `gpus_per_trial` of them (None: one where there are any); UserError for too many."""
    gpus = visible_gpus()
    per_trial = gpus_per_trial if gpus_per_trial is not None else min(1, len(gpus))
    if num_workers * per_trial > len(gpus):
        raise UserError(
            f"--workers {num_workers} x --gpus-per-trial {per_trial}: needs {num_workers * per_trial} GPUs, there are "
            f"{len(gpus)}; lower one of them"
        )
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
    return [
        Slot(gpus=tuple(gpus[n * per_trial : (n + 1) * per_trial]), num_threads=num_threads) for n in range(num_workers)
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
    lora_rank = ["--lora-rank", str(candidate.lora_rank)] if candidate.lora_rank is not None else []
    return [*METHODS[candidate.method], *DEFAULT_ARGV, *rule.train_argv, *lora_rank, "--lr", f"{candidate.lr:g}"]


def trial_argv(rule: Rule, spec: TrialSpec, folder: Path) -> list[str]:
    """The flags of launch/train.py for a trial whose run folder is `folder`."""
    argv = [*method_argv(rule, spec.candidate), "--max-steps", str(spec.num_steps), "--seed", str(spec.seed)]
    if spec.phase == "search":  # its validation loss is all that is needed, and it never sees the test records
        argv += ["--export", "none"]
    return [*argv, "--output-dir", str(folder), "--run-name", spec.name]


def execution_argv(rule: Rule, slot: Slot) -> list[str]:
    """One execution for all runs of a study, unless its flags name one: eager where a method has no CUDA graphs.

    Methods that were executed differently would differ in more than what is studied.
    """
    if not slot.gpus or "--execution" in rule.train_argv:
        return []
    is_blocked = "--activation-checkpointing" in rule.train_argv or any("--quant" in METHODS[m] for m in rule.methods)
    return ["--execution", "eager"] if is_blocked else []


def train_environ(slot: Slot, group: str = "") -> dict[str, str]:
    """All variables of a run that uses a slot, in this group on W&B."""
    inherited = {name: value for name, value in without_launcher(os.environ).items() if name not in RUN_VARIABLES}
    env = {"OMP_NUM_THREADS": str(slot.num_threads), **inherited}
    env.setdefault("WANDB_X_SAVE_REQUIREMENTS", "false")  # run.json has the versions; listing them takes 0.8 s a trial
    return env | {"WANDB_RUN_GROUP": group, "CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)}


def start_run(slot: Slot, argv: Sequence[str], folder: Path, *, group: str = "") -> ForkServerProcess:
    """launch/train.py with what a slot may use; its output goes to `folder`/log."""
    folder.mkdir(parents=True, exist_ok=True)
    return start_training(LAUNCH_FOLDER / "train.py", argv, env=train_environ(slot, group), folder=folder)


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
        """Whether it has a result, of which a failure is one."""
        return self.loss is not None or self.failure is not None

    @property
    def result(self) -> float:
        """The loss, infinity where it diverged, NaN where it failed otherwise."""
        if self.loss is not None:
            return self.loss
        return math.inf if self.has_diverged else math.nan


def read_trial(study_folder: Path, name: str) -> Trial | None:
    """The state of a trial; None where none was written, or it is damaged: its run folder says how far it came."""
    try:
        return Trial.model_validate_json((study_folder / "trials" / name / TRIAL_FILE).read_bytes())
    except (OSError, ValueError):
        return None


def read_trials(study_folder: Path) -> dict[str, Trial]:
    """{name: state} of all trials that were begun."""
    names = sorted(path.parent.name for path in (study_folder / "trials").glob(f"*/{TRIAL_FILE}"))
    return {name: trial for name in names if (trial := read_trial(study_folder, name)) is not None}


def read_results(study_folder: Path) -> dict[str, float]:
    """{name: `Trial.result`} of the finished trials."""
    return {name: trial.result for name, trial in read_trials(study_folder).items() if trial.is_finished}


def run_folder(study_folder: Path, spec: TrialSpec) -> Path:
    """Where the run of a trial lies."""
    return study_folder / "runs" / spec.name


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A trial that a worker of this process holds; the lock is let go by `finish_trial`."""

    spec: TrialSpec
    trial: Trial
    lock: RunLock
    process: ForkServerProcess | None  #: None where nothing was left to run
    start_time: float


def start_trial(study_folder: Path, rule: Rule, slot: Slot, specs: Sequence[TrialSpec]) -> RunningTrial | None:
    """Begin, or go on with, the first of these trials that nobody runs and that has no result; None without one.

    `specs`: none that this process runs already, whose locks it would be given again.
    """
    for spec in specs:
        folder, run = study_folder / "trials" / spec.name, run_folder(study_folder, spec)
        lock = RunLock(folder)
        try:
            lock.acquire()
        except FolderInUseError:
            continue
        if not lock.is_held:
            raise UserError(f"{folder}: this file system has no locks; put the study on another one (--output-dir)")
        trial = read_trial(study_folder, spec.name) or Trial(rule_sha256=rule.sha256)
        if trial.is_finished:  # by another worker, meanwhile
            lock.release()
            continue
        process = None
        if run_outcome(run)[0] is None and trial.num_failures < MAX_FAILURES:
            trial.num_failures += 1
            _write_trial(folder, trial)
            argv = [*trial_argv(rule, spec, run), *execution_argv(rule, slot)]
            argv += ["--resume"] if (run / "run.json").exists() else []
            process = start_run(slot, argv, folder, group=f"study-{study_folder.name}-{rule.sha256[:12]}")
        return RunningTrial(spec=spec, trial=trial, lock=lock, process=process, start_time=time.monotonic())
    return None


def finish_trial(study_folder: Path, rule: Rule, running: RunningTrial, *, is_stopping: bool) -> str:
    """Write the result of a trial whose run has ended and let it go; one line about it.

    UserError where it cannot run here: something is wrong with this machine or its data, not with the trial.
    """
    spec, trial, folder = running.spec, running.trial, study_folder / "trials" / running.spec.name
    run, exit_code = run_folder(study_folder, spec), (running.process.exitcode or 0) if running.process else 0
    (loss, has_diverged), user_error = run_outcome(run), _data_problem(run, rule)
    text = "cut off; the same command goes on with it"
    if user_error:
        shutil.rmtree(run)
    elif exit_code == 0 and loss is not None:
        trial.loss, text = loss, f"validation loss {loss:.4f} ({time.monotonic() - running.start_time:.0f} s)"
    elif not running.process:
        trial.failure = text = f"failed, or its worker died, {MAX_FAILURES} times"
    elif not is_stopping and exit_code not in STOP_EXIT_CODES:
        failure = failure_reason(folder / "log", exit_code)
        trial.has_diverged = has_diverged
        if exit_code == UserError.exit_code or (exit_code > 0 and not (run / "run.json").exists()):
            user_error = failure
        elif trial.has_diverged or trial.num_failures >= MAX_FAILURES:
            trial.failure, text = failure, f"failed: {failure}"
        else:  # out of memory, or killed by somebody
            text = f"failed, and is tried again: {failure}"
    if running.process and not (trial.is_finished or text.startswith("failed")):
        trial.num_failures -= 1
    _write_trial(folder, trial)
    running.lock.release()
    if user_error:
        raise UserError(f"{spec.name}: {user_error}")
    if trial.is_finished and spec.phase == "search":  # its losses are all that is needed of it
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return f"{spec.name}: {text}"


def _write_trial(folder: Path, trial: Trial) -> None:
    write_atomically(folder / TRIAL_FILE, trial.model_dump_json() + "\n")


def _data_problem(run: Path, rule: Rule) -> str:
    """What is wrong with the data that a run was trained on, "" where they are the study's."""
    try:
        fingerprint = json.loads((run / "run.json").read_bytes())["data"]["fingerprint"]
    except (OSError, ValueError):  # it did not come so far
        return ""
    if fingerprint.startswith(rule.data):
        return ""
    return (
        f"its data have the fingerprint {fingerprint[:12]}, those that the study began with {rule.data}; restore them, "
        "and the same command goes on"
    )


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
