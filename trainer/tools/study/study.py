"""A study from its rule to its last trial: workers that claim, run and note trials until none is needed."""

import contextlib
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import UserError
from trainer.tools.study.answer import is_decided
from trainer.tools.study.planning import plan_study
from trainer.tools.study.rule import Rule, read_rule
from trainer.tools.study.search import StudyState, study_state, with_quarter_batch
from trainer.tools.study.trial_queue import QueuedTrial, TrialQueue
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
        rule, results = self.rule, queue.results()
        last_look = len(rule.seeds_by_look) - 1
        for look in range(last_look + 1):
            state = study_state(rule, results, look)
            if state.needed or state.refusal or look == last_look or is_decided(self.folder, rule, state.answers):
                break
        if rule.quarter_batch is not None and not (state.needed or state.refusal):
            return with_quarter_batch(state, results)
        return state

    def trials(self) -> dict[str, QueuedTrial]:
        """All trials so far."""
        return TrialQueue(self.folder, "reader").trials()

    def run(self, *, num_workers: int, gpus_per_trial: int | None, should_stop: threading.Event, log: LogFn) -> None:
        """Work on the study with so many workers until nothing is needed, or until it is to stop."""
        slots = make_slots(num_workers, gpus_per_trial)
        errors: list[BaseException] = []
        threads = [threading.Thread(target=self._guard, args=(slot, should_stop, log, errors)) for slot in slots]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # a bounded join lets signals through
                thread.join(0.5)
        if errors and isinstance(errors[0], OSError):
            raise UserError(
                f"{self.folder}: cannot be written ({errors[0].strerror}); make room, and the same command goes on"
            ) from errors[0]
        if errors:
            raise errors[0]

    def _guard(self, slot: Slot, should_stop: threading.Event, log: LogFn, errors: list[BaseException]) -> None:
        try:
            self._work(slot, should_stop, log)
        except BaseException as error:
            errors.append(error)
            should_stop.set()

    def _work(self, slot: Slot, should_stop: threading.Event, log: LogFn) -> None:
        """One worker: the decisions are pure functions of the results, so each worker takes them for itself."""
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
            log(f"{spec.name}: " + _describe(runner.run(claim, spec)))


def _describe(result: TrialResult) -> str:
    if result.loss is not None:
        return f"validation loss {result.loss:.4f} ({result.elapsed_seconds:.0f} s)"
    if result.failure is not None:
        return f"failed{', and is tried again' if result.is_tried_again else ''}: {result.failure}"
    return "cut off; the same command goes on with it"


def show_while_running(study: Study, is_over: threading.Event, interval_seconds: float = 2.0) -> None:
    """A live table of the study on a terminal, until it is over."""
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(study_table(study), refresh_per_second=2) as live:
        while not is_over.wait(interval_seconds):
            live.update(study_table(study))
        live.update(study_table(study))


def study_table(study: Study):  # type: ignore[no-untyped-def]  # a rich table, imported where it is drawn
    """Each method's trials: how many are done, run now or failed, its best rate, and below them what runs now."""
    from rich.table import Table

    trials, planned = study.trials(), plan_study(study.rule).num_trials
    running = [trial.name for trial in trials.values() if trial.worker is not None]
    table = Table(caption=f"running: {', '.join(running)}" if running else None, caption_justify="left")
    for heading in ("method", "done", "running", "failed", "best rate", "validation loss"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method in study.rule.methods:
        method_trials = {
            n: t for n, t in trials.items() if n.split("-", 1)[1].startswith((f"{method}-r", f"{method}-lr"))
        }
        finished = {name: trial for name, trial in method_trials.items() if trial.is_finished}
        longest = max((int(name.rsplit("-t", 1)[1].split("-")[0]) for name in finished), default=0)
        best = min(
            (trial for name, trial in finished.items() if f"-t{longest}-" in name and math.isfinite(trial.loss)),
            key=lambda trial: trial.loss, default=None,
        )  # fmt: skip
        num_running = sum(trial.worker is not None for trial in method_trials.values())
        table.add_row(
            method, f"{len(finished)} of {max(planned[method], len(method_trials))}", str(num_running),
            str(sum(trial.failure is not None for trial in method_trials.values())),
            best.name.split("-lr")[1].split("-t")[0] if best else "", f"{best.loss:.4f}" if best else "",
        )  # fmt: skip
    return table
