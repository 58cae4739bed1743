"""What a study will take, before its first trial: its length, its data, and its time by two timed steps."""

import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.config.errors import UserError
from trainer.report.run_data import read_folder
from trainer.tools.study.rule import METHODS, MIN_TEST_RECORDS, Rule
from trainer.tools.study.search import expected_trials
from trainer.tools.study.trial_process import Slot, start_run
from trainer.tools.study.trials import DEFAULT_ARGV
from trainer.tools.worker_processes import failure_reason

NUM_STEPS, NUM_TIMED_STEPS = 4, 2  # of the run by which a dry run estimates the time; the first steps are slower


@contextlib.contextmanager
def try_run(method: str, argv: Sequence[str], slot: Slot) -> Iterator[Path]:
    """A folder with the `log` and the `run` of launch/train.py, as a trial runs it; UserError where it fails."""
    with tempfile.TemporaryDirectory(prefix="study-") as temp:
        folder = Path(temp)
        argv = [*METHODS[method], *DEFAULT_ARGV, *argv, "--output-dir", str(folder / "run")]
        process = start_run(slot, argv, folder)
        process.join()
        if process.exitcode:
            raise UserError(failure_reason(folder / "log", process.exitcode))
        yield folder


def resolve_run(methods: Sequence[str], train_argv: Sequence[str], slot: Slot) -> tuple[int, str]:
    """(optimizer steps of a whole run, fingerprint of its data), from `train.py --dry-run` of every method.

    UserError where a method cannot be loaded, a flag is wrong or the test split is too small: before the first trial.
    """
    runs = set()
    for method in methods:
        with try_run(method, [*train_argv, "--dry-run"], slot) as folder:
            plan = (folder / "log").read_text(encoding="utf-8", errors="replace")
        steps = re.search(r"^steps\s.*?([\d,]+) in all", plan, re.MULTILINE)
        data = re.search(r"^data\s.*fingerprint ([0-9a-f]+)$", plan, re.MULTILINE)
        assert steps, "the plan says how many steps a run has"
        assert data, "and on which data"
        test = re.search(r"^test\s+([\d,]+) (\w+)(?: of ([\d,]+) (groups))?", plan, re.MULTILINE)
        count, unit = (test[3] or test[1], test[4] or test[2]) if test else ("0", "records")
        if int(count.replace(",", "")) < MIN_TEST_RECORDS:
            raise UserError(
                f"--test-fraction: {count} test {unit}; expected {MIN_TEST_RECORDS} or more: raise it, give "
                "--test-data or a smaller --block-size"
            )
        runs.add((int(steps[1].replace(",", "")), data[1]))
    assert len(runs) == 1, "the data decides, not the method"
    return runs.pop()


def estimate_minutes(rule: Rule, slots: Sequence[Slot]) -> float:
    """What all trials take on these slots, by a run of a few steps of each method on the first one.

    Trials side by side are taken to be as fast as one alone, and exports and the timing at the end to take nothing.
    """
    seconds = 0.0
    for method in rule.methods:
        start_time = time.monotonic()
        argv = [*rule.train_argv, "--max-steps", str(NUM_STEPS), "--export", "none", "--wandb", "disabled"]
        with try_run(method, argv, slots[0]) as folder:
            run_seconds = time.monotonic() - start_time
            step_seconds = float(np.mean(np.diff(read_folder(folder / "run").steps["time"])[-NUM_TIMED_STEPS:]))
        start_seconds = max(0.0, run_seconds - NUM_STEPS * step_seconds)
        trials = [spec for spec in expected_trials(rule) if spec.candidate.method == method]
        seconds += sum(start_seconds + spec.num_steps * step_seconds for spec in trials)
    return seconds / len(slots) / 60
