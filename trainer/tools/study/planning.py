"""What a study will take, before its first trial: its length, its data, and its time by two timed steps."""

import argparse
import contextlib
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trainer.config.argument_parser import ArgumentParser
from trainer.config.cli import parse_args
from trainer.config.errors import UserError
from trainer.report.judge import parse_margin
from trainer.report.run_data import read_folder
from trainer.tools.study.rule import (
    METHODS,
    MIN_TEST_RECORDS,
    RULE_FILE,
    Rule,
    plan_rungs,
    write_rule,
)
from trainer.tools.study.search import expected_trials
from trainer.tools.study.trial_process import Slot, make_slots, start_run
from trainer.tools.study.trials import DEFAULT_ARGV
from trainer.tools.worker_processes import failure_reason

NUM_STEPS, NUM_TIMED_STEPS = 4, 2  # of the run by which a dry run estimates the time; the first steps are slower
#: Flags of launch/train.py that the study sets for each of its runs.
RESERVED_FLAGS = (
    *("--mode", "--adapter", "--quant", "--seed", "--lr", "--lora-rank", "--output-dir", "--run-name", "--export"),
    *("--resume", "--dry-run", "--find-lr", "--find-batch"),
)


def plan_study(args: argparse.Namespace, train_argv: list[str], parser: ArgumentParser) -> None:
    """Print the plan; write the rule of the study, or check that it is that of the one that goes on.

    `args`: the flags of launch/study.py, `train_argv`: those of launch/train.py. UserError.
    """
    slots, names = make_slots(args.workers, args.gpus_per_trial), [flag.partition("=")[0] for flag in train_argv]
    for name, argument in zip(names, train_argv, strict=True):
        if name in RESERVED_FLAGS:
            raise UserError(
                f"{argument}: the study sets it for each of its runs; expected other flags of launch/train.py"
            )
    train_argv = [*(["--test-fraction", "0"] if "--test-data" in names else []), *train_argv]
    settings = parse_args(["--mode", "full", *DEFAULT_ARGV, *train_argv], companion=parser).settings
    if settings.train.warmup_steps:
        raise UserError(
            f"--warmup-steps {settings.train.warmup_steps}: the short runs of a search might end before it; give "
            "--warmup-ratio, which is the same for all"
        )
    max_steps_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    max_steps_parser.add_argument("--max-steps")
    rule = Rule(  # without what the data decide: a mistake is found before they are read
        methods=tuple(args.methods.split(",")),
        lora_ranks=args.ranks,
        total_steps=1,
        rungs=(1,),
        search_seeds=args.search_seeds,
        answer_seeds=args.seeds,
        margin=parse_margin(args.margin),
        train_argv=tuple(max_steps_parser.parse_known_args(train_argv)[1]),  # each run has its own --max-steps
        data="",
    )
    print(f"reading the data and loading {', '.join(rule.methods)}", flush=True)
    total_steps, data = resolve_run(rule.methods, train_argv, slots[0])
    rule = rule.model_copy(update={"total_steps": total_steps, "rungs": plan_rungs(total_steps), "data": data})
    for method in rule.methods:
        num_steps = [spec.num_steps for spec in expected_trials(rule) if spec.candidate.method == method]
        print(f"{method}: {len(num_steps)} trials, {sum(num_steps):,} steps", flush=True)
    if args.dry_run:
        minutes = estimate_minutes(rule, slots)
        print(f"about {minutes:,.0f} minutes: an estimate from {NUM_TIMED_STEPS} timed steps of each method")
    else:
        write_rule(args.output_dir, rule, working_dir=str(Path.cwd()))
        print(f"rule {rule.sha256[:12]} in {args.output_dir / RULE_FILE}", flush=True)


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
