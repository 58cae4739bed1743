"""A study from its rule to its last trial: the workers of this machine run trials until none is needed."""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from trainer.config.errors import UserError
from trainer.report.compare_cli import REFUSED_EXIT_CODE, print_verdict
from trainer.report.page import Comparison, write_report
from trainer.report.wandb_report import save_report
from trainer.tools.processes import Slot, make_slots
from trainer.tools.study import answer
from trainer.tools.study.power import describe_power, read_search_losses
from trainer.tools.study.rule import METHODS, Rule, read_rule
from trainer.tools.study.search import expected_trials, study_state
from trainer.tools.study.timing import time_finalists
from trainer.tools.study.trials import RunningTrial, finish_trial, read_results, read_trials, start_trial

POLL_SECONDS = 1.0  # between two looks at what other machines have done
STOP_SECONDS = 60.0  # that runs get to save where they stand


def open_study(folder: Path) -> tuple[Path, Rule]:
    """The folder and the rule of a study. This process goes to where it was started, which its runs are relative to.

    UserError where there is none, or where its trials were run by another rule.
    """
    rule, working_dir = read_rule(folder)
    folder = folder.absolute()
    try:
        os.chdir(working_dir)
    except (OSError, ValueError) as error:  # a name that holds a null byte, or what is no character
        raise UserError(
            f"{folder}: was started in {working_dir}, which cannot be entered here; join it from a machine that "
            "has the same folders"
        ) from error
    for name, trial in read_trials(folder).items():
        if trial.rule_sha256 != rule.sha256:
            raise UserError(
                f"{folder}: {name} was run by the rule {trial.rule_sha256[:12]}, rule.json is {rule.sha256[:12]}: "
                "it was changed after the study began; restore it, or start another study"
            )
    return folder, rule


def run_trials(
    folder: Path, rule: Rule, slots: Sequence[Slot], should_stop: threading.Event, log: Callable[[str], None]
) -> None:
    """Run trials, one in each slot, until none is needed, or until it is to stop; then the runs save and end.

    What comes next is a function of the results, so the processes of all workers decide it alike. UserError where no
    trial can run here.
    """
    running: dict[int, RunningTrial] = {}  # by slot
    problems: list[str] = []
    num_expected, has_said_power = len(expected_trials(rule)), False

    def finish_ended(*, is_stopping: bool) -> None:
        for number, trial in list(running.items()):
            if trial.process is None or trial.process.exitcode is not None:
                del running[number]
                line, problem = finish_trial(folder, rule, trial, is_stopping=is_stopping)
                problems.extend(filter(None, [problem]))
                num_finished = len(read_results(folder))
                log(f"{num_finished} of {max(num_finished, num_expected)} trials: {line}")

    try:
        while not (should_stop.is_set() or problems):
            state = study_state(rule, read_results(folder))
            if not (state.needed or running):
                break
            if state.answers and not has_said_power:  # before the answer's runs
                has_said_power, known = True, read_search_losses(folder, list(state.outcomes.values())[:2])
                if known is not None:
                    log(f"searched: {describe_power(rule, known[1], known[0])}")
            for number in set(range(len(slots))) - set(running):
                own = {trial.spec for trial in running.values()}
                specs = [spec for spec in state.needed if spec not in own]
                if (trial := start_trial(folder, rule, slots[number], specs)) is not None:
                    running[number] = trial
            processes = [trial.process for trial in running.values() if trial.process is not None]
            if len(processes) == len(running):
                wait([process.sentinel for process in processes], POLL_SECONDS)
            finish_ended(is_stopping=should_stop.is_set())
    finally:
        processes = [trial.process for trial in running.values() if trial.process is not None]
        for process in processes:
            process.terminate()  # it saves where it stands
        deadline = time.monotonic() + STOP_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        finish_ended(is_stopping=True)
    if problems:
        raise UserError(problems[0])


def answer_study(folder: Path, rule: Rule, slot: Slot, should_stop: threading.Event) -> Comparison | None:
    """The answer of a study whose trials are done, after its finalists are timed; None where it is to stop."""
    results = read_results(folder)
    state = study_state(rule, results)
    if state.needed or should_stop.is_set():
        return None
    for outcome in state.outcomes.values():
        if not outcome.problem or outcome.problem != state.refusal:
            print(outcome.describe())
    failures = [f"{name}: {trial.failure}" for name, trial in read_trials(folder).items() if trial.failure]
    if failures:
        print(f"{len(failures)} trials failed, the first was {failures[0]}")
    if state.refusal is not None:
        raise answer.AnswerRefusedError(f"refused to rank: {state.refusal}")
    answer.judge(answer.read_groups(folder, state.answers), rule)  # refused before anything is timed
    winners = [outcome.winner for outcome in state.outcomes.values() if outcome.winner is not None]
    print("timing the finalists in alternation", flush=True)
    timing = time_finalists(folder, rule, dict(zip(METHODS, winners, strict=False)), slot, should_stop)
    return None if timing is None else answer.compare_study(folder, rule, state, results, timing)


def run_study(args: argparse.Namespace) -> int:
    """Work on the study of launch/study.py's flags, then answer; returns the exit code."""
    folder, rule = open_study(args.join or args.output_dir)
    slots, should_stop = make_slots(args.workers, args.gpus_per_trial), threading.Event()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, lambda *_: should_stop.set())
    try:
        run_trials(folder, rule, slots, should_stop, partial(print, flush=True))
        comparison = answer_study(folder, rule, slots[0], should_stop)
        if comparison is None:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130
        paths = write_report(comparison, folder)
    except OSError as error:
        message = f"{folder}: cannot be written ({error.strerror}); make room, and the same command goes on"
        raise UserError(message) from error
    verdict = comparison.verdict
    print()
    print_verdict(verdict, [f"a page to send: {paths[0]} (for machines: answer.json beside it)"])
    if args.wandb_report is not None:
        entity, project = args.wandb_report
        print(f"W&B Report: {save_report(comparison, entity, project)}")
    return REFUSED_EXIT_CODE if verdict.comparisons[0].is_margin_under_floor else 0
