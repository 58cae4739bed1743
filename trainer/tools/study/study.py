"""A study from its plan to its answer: the workers of this machine run trials until none is needed."""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from trainer.config.argument_parser import ArgumentParser
from trainer.config.cli import parse_args, to_own_flags
from trainer.config.errors import UserError, report_error
from trainer.report.compare_cli import REFUSED_EXIT_CODE, print_verdict
from trainer.report.interval import MIN_UNITS
from trainer.report.judge import parse_margin
from trainer.report.page import Comparison, write_report
from trainer.report.run_data import read_folder
from trainer.report.wandb_report import save_report
from trainer.tools.processes import Slot, failure_reason, make_slots, run_environ, start_process, start_run
from trainer.tools.study import answer
from trainer.tools.study.answer import describe_power, read_search_losses
from trainer.tools.study.rule import METHODS, RULE_FILE, Rule, plan_rungs, read_rule, write_rule
from trainer.tools.study.search import expected_trials, study_state
from trainer.tools.study.trials import (
    RunningTrial,
    finish_trial,
    read_results,
    read_trials,
    run_argv,
    start_trial,
    time_finalists,
)
from trainer.tracking.eval_records import score_name

POLL_SECONDS = 1.0  # between two looks at what other machines have done
STOP_SECONDS = 60.0  # that runs get to save where they stand
NUM_STEPS, NUM_TIMED_STEPS = 4, 2  # of the run by which a dry run estimates the time; the first steps are slower
#: Flags of launch/train.py that the study sets for each of its runs, and what there is in their place.
OWN_FLAGS = {"--mode": "none: both modes are run", "--lora-rank": "--lora-ranks", "--seed": "--seeds"}
OWN_FLAGS |= {"--lr": "--max-lr METHOD=LR, or none: it is searched"} | dict.fromkeys(
    ("--output-dir", "--run-name", "--export", "--resume", "--dry-run", "--find-batch", "--base-from"),
    "other flags of launch/train.py",
)


def plan_study(args: argparse.Namespace, train_argv: list[str], parser: ArgumentParser) -> None:
    """Print the plan; write the rule of the study, or check that it is that of the one that goes on. `args`: the flags
    of launch/study.py, `train_argv`: those of launch/train.py. UserError."""
    slots = make_slots(args.workers, args.gpus_per_trial)
    train_argv = to_own_flags(train_argv, num_ranks=len(slots[0].gpus) or 1)
    names = [flag.partition("=")[0] for flag in train_argv]
    for name, argument in zip(names, train_argv, strict=True):
        if name in OWN_FLAGS:
            raise UserError(f"{argument}: the study sets it for each of its runs; expected {OWN_FLAGS[name]}")
    train_argv = [*(["--test-fraction", "0"] if "--test-data" in names else []), *train_argv]
    argv = run_argv("lora", train_argv)
    settings = parse_args(argv, companion=parser, num_ranks=len(slots[0].gpus) or 1).settings
    if settings.train.warmup_steps:
        raise UserError(
            f"--warmup-steps {settings.train.warmup_steps}: the short runs of a search might end before it; give "
            "--warmup-ratio, which is the same for all"
        )
    margin = parse_margin(args.margin, args.decide_by)
    scorer = margin.measure.partition(":")[2]
    if scorer and score_name(scorer) not in map(score_name, settings.output.score):
        raise UserError(f"--decide-by {margin.measure}: the runs do not have it; add --score {scorer}")
    own_argv = [word for word in train_argv if not word.startswith("--max-steps=")]  # each run has its own
    # One execution for all runs: methods that were executed differently would differ in more than what is studied.
    if "--execution" not in names and {"--quant", "--activation-checkpointing"} & set(names):  # without CUDA graphs
        own_argv += ["--execution", "eager"]
    if settings.lora.peft_config:  # its content, which no trial may find changed
        own_argv.append(f"--peft-config={settings.lora.peft_config}")
        if len(args.lora_ranks) > 1:
            raise UserError("--peft-config: takes LoRA's place; expected no --lora-ranks")
    max_lrs: dict[str, float] = {}
    for text in args.max_lr:
        method, _, rate = text.partition("=")
        try:
            max_lrs[method] = float(rate)
        except ValueError:
            raise UserError(f"--max-lr {text}: expected METHOD=LR, such as lora=5.6e-3") from None
    rule = Rule(  # without what the data decide: a mistake is found before they are read
        lora_ranks=args.lora_ranks,
        total_steps=1,
        rungs=(1,),
        answer_seeds=args.seeds,
        max_lrs=max_lrs,
        margin=margin,
        train_argv=tuple(own_argv),
        data="",
    )
    print("reading the data and loading full, lora", flush=True)
    for method in METHODS:  # each is loaded: what cannot be is found before the first trial
        with tempfile.TemporaryDirectory(prefix="study-") as temp:
            argv = [*run_argv(method, train_argv), "--output-dir", f"{temp}/run"]
            plan_args, env = (slots[0], argv, Path(temp, "plan.json")), run_environ(slots[0])
            _join(start_process(write_plan, plan_args, Path(temp), env, bool(slots[0].gpus)), Path(temp))
            total_steps, data, num_units, warning = json.loads(Path(temp, "plan.json").read_bytes())
    if num_units < MIN_UNITS:
        raise UserError(
            f"--test-fraction: {num_units} test records, or groups of them; expected {MIN_UNITS} or more: raise "
            "it, give --test-data or a smaller --block-size"
        )
    rule = rule.model_copy(update={"total_steps": total_steps, "rungs": plan_rungs(total_steps), "data": data})
    if warning:
        print(f"warning: {warning}", flush=True)
    seconds = 0.0
    for method in METHODS:
        num_steps = [spec.num_steps for spec in expected_trials(rule) if spec.candidate.method == method]
        print(f"{method}: {len(num_steps)} trials, {sum(num_steps):,} steps", flush=True)
        if args.dry_run:
            start_seconds, step_seconds = time_method(method, rule, slots[0])
            seconds += len(num_steps) * start_seconds + sum(num_steps) * step_seconds
    if args.dry_run:  # trials side by side are taken to be as fast as one alone, and what comes after to take nothing
        minutes = seconds / len(slots) / 60
        print(f"about {minutes:,.0f} minutes: an estimate from {NUM_TIMED_STEPS} timed steps of each method")
        known = None
        if (args.output_dir / RULE_FILE).exists():
            write_rule(args.output_dir, rule, working_dir="")  # which it refuses where it is another one
            state = study_state(rule, read_results(args.output_dir))
            known = read_search_losses(args.output_dir, list(state.outcomes.values())[:2]) if state.answers else None
        print(describe_power(rule, num_units, known[0] if known else None))
    else:
        write_rule(args.output_dir, rule, working_dir=str(Path.cwd()))
        print(f"rule {rule.sha256[:12]} in {args.output_dir / RULE_FILE}", flush=True)


def write_plan(slot: Slot, argv: Sequence[str], path: Path) -> None:
    """In a process of its own: (steps of a whole run, first digits of its data's fingerprint, test records or groups
    of them, what to say of the base) into a file; UserError's line and exit code for what train.py would refuse."""
    from trainer.distributed.process_group import simulated_context  # which needs torch
    from trainer.model.model_files import describe_bf16_ties
    from trainer.tools.trial_engine import plan_run

    ranks = len(slot.gpus) or 1
    try:
        plan, data = plan_run(parse_args(argv, num_ranks=ranks).settings, simulated_context(ranks))
    except UserError as error:
        sys.exit(report_error(error))
    num_units = data.metadata["test"].get("units", 0)
    ties = describe_bf16_ties(plan.model_info.get("bf16_ties", 0.0))
    facts = [plan.schedule.total_steps, data.metadata["fingerprint"][:12], num_units, ties]
    path.write_text(json.dumps(facts), encoding="utf-8")


def time_method(method: str, rule: Rule, slot: Slot) -> tuple[float, float]:
    """Seconds that a run of a method takes beside its steps, and for each step, by a run of a few."""
    with tempfile.TemporaryDirectory(prefix="study-") as temp:
        argv = [*run_argv(method, rule.train_argv), "--max-steps", str(NUM_STEPS), "--export", "none"]
        start_time = time.monotonic()
        argv += ["--wandb", "disabled", "--output-dir", f"{temp}/run"]
        _join(start_run(slot, argv, Path(temp)), Path(temp))
        run_seconds = time.monotonic() - start_time
        run = read_folder(Path(temp, "run"))
    step_seconds = float(np.mean(np.diff(run.steps["time"])[-NUM_TIMED_STEPS:]))
    base_seconds = float(run.evals["time"][0])  # of its evaluation, which only the first trial does
    return max(0.0, run_seconds - base_seconds - NUM_STEPS * step_seconds), step_seconds


def _join(process: BaseProcess, folder: Path) -> None:
    process.join()
    if process.exitcode:
        raise UserError(failure_reason(folder / "log", process.exitcode))


def open_study(folder: Path) -> tuple[Path, Rule]:
    """The folder and the rule of a study. This process goes to where it was started, which its runs are relative to.
    UserError where there is none, or where its trials were run by another rule."""
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
    """Run trials, one in each slot, until none is needed, or until it is to stop; then the runs save and end. What
    comes next is a function of the results, so the processes of all workers decide it alike. UserError where no trial
    can run here."""
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
