"""A study from its rule to its last trial: workers that claim, run and note trials until none is needed."""

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.tools.study.answer import judge, read_groups
from trainer.tools.study.planning import expected_trials
from trainer.tools.study.rule import Rule, read_rule
from trainer.tools.study.search import StudyState, TrialSpec, study_state
from trainer.tools.study.trial_queue import TrialQueue
from trainer.tools.study.worker import Slot, TrialResult, TrialRunner, make_slots

POLL_SECONDS = 2.0  # between two looks for a trial, while others run what is needed

LogFn = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """The study of a folder."""

    folder: Path
    rule: Rule

    @classmethod
    def open(cls, folder: Path) -> "Study":
        """The study that `folder` holds; runs relative to where it was started from. UserError where there is none."""
        rule, working_dir = read_rule(folder)
        folder = folder.absolute()
        try:
            os.chdir(working_dir)
        except OSError as error:
            raise UserError(
                f"{folder}: the study was started in {working_dir}, which is not here ({error.strerror}); join it from "
                "a machine that has the same folders"
            ) from error
        TrialQueue(folder, "open").bind(rule.sha256)
        return cls(folder=folder, rule=rule)

    def state(self, queue: TrialQueue) -> StudyState:
        """Where it stands: a later look's seeds are needed only where the one before could not tell."""

        def is_decided(answers: Sequence[TrialSpec]) -> bool:
            return judge(read_groups(self.folder, answers), self.rule).answer != "cannot tell"

        return study_state(self.rule, queue.results(), is_decided)

    def run(self, *, num_workers: int, gpus_per_trial: int | None, should_stop: threading.Event, log: LogFn) -> None:
        """Work on the study with so many workers until nothing is needed, or until it is to stop."""
        slots = make_slots(num_workers, gpus_per_trial)
        try:
            with ThreadPoolExecutor(num_workers) as pool:
                for worker in [pool.submit(self._work, slot, should_stop, log) for slot in slots]:
                    worker.result()
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); make room, and the same command goes on"
            ) from error

    def _work(self, slot: Slot, should_stop: threading.Event, log: LogFn) -> None:
        """One worker; where it fails, the others stop too."""
        try:
            self._run_trials(slot, should_stop, log)
        except BaseException:
            should_stop.set()
            raise

    def _run_trials(self, slot: Slot, should_stop: threading.Event, log: LogFn) -> None:
        """The decisions are pure functions of the results, so each worker takes them for itself."""
        queue = TrialQueue(self.folder, slot.name)
        runner = TrialRunner(rule=self.rule, study_folder=self.folder, slot=slot, queue=queue, should_stop=should_stop)
        while not should_stop.is_set():
            needed = self.state(queue).needed
            if not needed:
                return
            queue.enqueue(needed)
            claimed_trial = queue.claim(needed)
            if claimed_trial is None:
                should_stop.wait(POLL_SECONDS)
                continue
            claim, spec = claimed_trial
            start_time = time.monotonic()
            result = runner.run(claim, spec)
            log(f"{spec.name}: {_describe(result, time.monotonic() - start_time)}")


def _describe(result: TrialResult, elapsed_seconds: float) -> str:
    if result.loss is not None:
        return f"validation loss {result.loss:.4f} ({elapsed_seconds:.0f} s)"
    if result.failure is not None:
        return f"failed{', and is tried again' if result.is_tried_again else ''}: {result.failure}"
    return "cut off; the same command goes on with it"


def live_table(study: Study) -> Any:
    """A context in which a terminal shows the study's table."""
    from rich.live import Live

    return Live(get_renderable=partial(study_table, study), refresh_per_second=0.5)


def study_table(study: Study) -> Any:
    """Each method's trials: how many are done, run now or failed, its best rate, and below them what runs now."""
    from rich.table import Table

    trials = TrialQueue(study.folder, "reader").trials()
    num_expected = Counter(spec.candidate.method for spec in expected_trials(study.rule))
    running = [trial.name for trial in trials.values() if trial.worker is not None]
    table = Table(caption=f"running: {', '.join(running)}" if running else None, caption_justify="left")
    for heading in ("method", "done", "running", "failed", "best rate", "validation loss"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in study.rule.methods:
        named = (f"{method}-r", f"{method}-lr")
        method_trials = [trial for name, trial in trials.items() if name.partition("-")[2].startswith(named)]
        finished = [trial for trial in method_trials if trial.is_finished]
        num_steps = {trial.name: int(trial.name.rsplit("-t", 1)[1].split("-")[0]) for trial in finished}
        longest = max(num_steps.values(), default=0)
        last_rung = [t for t in finished if num_steps[t.name] == longest and math.isfinite(t.loss)]
        best = min(last_rung, key=lambda trial: trial.loss, default=None)
        table.add_row(
            method,
            f"{len(finished)} of {max(num_expected[method], len(method_trials))}",
            str(sum(trial.worker is not None for trial in method_trials)),
            str(sum(trial.failure is not None for trial in method_trials)),
            best.name.split("-lr")[1].split("-t")[0] if best else "",
            f"{best.loss:.4f}" if best else "",
        )
    return table
