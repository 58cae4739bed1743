"""What a study will take, before its first trial: its length, its cost, and what a budget has time for."""

import bisect
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import UserError
from trainer.report.formats import format_duration
from trainer.tools.study.finalist_timing import MIN_ROUNDS, NUM_STEPS
from trainer.tools.study.rule import METHODS, MIN_ANSWER_SEEDS, MIN_RUNG_STEPS, MIN_UNITS, PRIMARY, Rule, plan_rungs
from trainer.tools.study.search import TrialSpec, study_state
from trainer.tools.study.worker import DEFAULT_ARGV, Slot, last_log_line, start_run

CALIBRATION_STEPS = (8, 24)  # of two runs whose difference is the time of a step, the rest that of a start
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

RunFn = Callable[[Sequence[str]], str]


@dataclass(frozen=True, kw_only=True)
class TrialCost:
    """Measured time of a run of one method."""

    start_seconds: float  #: everything but its steps and its export
    step_seconds: float
    export_seconds: float = 0.0  #: with its check, and the test records; runs of a search have neither

    def seconds(self, num_steps: int, *, is_exported: bool = False) -> float:
        """Of a run of so many steps."""
        return self.start_seconds + num_steps * self.step_seconds + self.export_seconds * is_exported


def run_train(slot: Slot, argv: Sequence[str]) -> str:
    """The output of launch/train.py, run as a trial is; UserError with its last line where it refuses."""
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        log = Path(folder, "log")
        process = start_run(slot, argv, log)
        process.join()
        if process.exitcode:
            raise UserError(last_log_line(log, process.exitcode))
        return log.read_text(encoding="utf-8", errors="replace")


def resolve_run(methods: Sequence[str], train_argv: Sequence[str], run: RunFn) -> tuple[int, str]:
    """(optimizer steps of a whole run, fingerprint of its data), asked of `train.py --dry-run` for every method.

    UserError where a method cannot be loaded, a flag is wrong or the test is too small: before the first trial.
    """

    def dry_run(method: str) -> tuple[int, str]:
        with tempfile.TemporaryDirectory(prefix="study-") as folder:
            argv = [*METHODS[method], *DEFAULT_ARGV, *train_argv, "--output-dir", f"{folder}/run", "--dry-run"]
            plan = run(argv)
        steps = re.search(r"^steps\s.*?([\d,]+) in all", plan, re.MULTILINE)
        data = re.search(r"^data\s.*fingerprint ([0-9a-f]+)$", plan, re.MULTILINE)
        assert steps, "the plan says how many steps a run has"
        assert data, "and on which data"
        test = re.search(r"^test\s+([\d,]+) (\w+)(?: of ([\d,]+) (groups))?", plan, re.MULTILINE)
        num_units, unit = (test[3] or test[1], test[4] or test[2]) if test else ("0", "records")
        if int(num_units.replace(",", "")) < MIN_UNITS:
            raise UserError(
                f"--test-fraction: {num_units} test {unit}; expected {MIN_UNITS} or more: raise it, give --test-data "
                "or a smaller --block-size"
            )
        return int(steps[1].replace(",", "")), data[1]

    runs = {dry_run(methods[0])}  # the data is prepared once, by the first
    with ThreadPoolExecutor(2) as pool:
        runs |= set(pool.map(dry_run, methods[1:]))
    assert len(runs) == 1, "the data decides, not the method"
    return runs.pop()


def measure_costs(
    methods: Sequence[str],
    train_argv: Sequence[str],
    runs: Sequence[RunFn],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, TrialCost]:
    """What a start, a step and an export of each method take here, from three short runs of each.

    `runs`: one for each worker; they run side by side, as a study's trials do, and take from each other.
    """

    def measure(method: str, num_steps: int, export: str) -> float:
        argv = [*METHODS[method], *DEFAULT_ARGV, *train_argv, "--max-steps", str(num_steps)]
        argv += ["--export", export, "--wandb", "disabled", "--output-dir"]
        with tempfile.TemporaryDirectory(prefix="study-") as folder, ThreadPoolExecutor(len(runs)) as pool:
            start_time = clock()
            list(pool.map(lambda item: item[1]([*argv, f"{folder}/{item[0]}"]), enumerate(runs)))
            return clock() - start_time

    costs = {}
    for method in methods:
        exported = measure(method, CALIBRATION_STEPS[0], "last")
        short, long = (measure(method, num_steps, "none") for num_steps in CALIBRATION_STEPS)
        step_seconds = max(0.0, (long - short) / (CALIBRATION_STEPS[1] - CALIBRATION_STEPS[0]))
        costs[method] = TrialCost(
            start_seconds=max(0.0, short - CALIBRATION_STEPS[0] * step_seconds),
            step_seconds=step_seconds,
            export_seconds=max(0.0, exported - short),
        )
    return costs


def expected_trials(rule: Rule) -> list[TrialSpec]:
    """All trials of a study where nothing fails and the best rates lie in the middle of the grids."""
    results: dict[str, float] = {}
    specs: list[TrialSpec] = []
    while needed := study_state(rule, results).needed:
        for spec in needed:
            middle = -4.0 if spec.candidate.method == "full" else -3.0
            results[spec.name] = abs(math.log10(spec.candidate.lr) - middle)
        specs += needed
    return specs


def expected_seconds(rule: Rule, costs: Mapping[str, TrialCost], num_workers: int) -> float:
    """What these trials take on so many workers, and the finalists' timing on one."""
    seconds = 0.0
    for spec in expected_trials(rule):
        num_whole_steps = spec.num_steps // (4 if spec.phase == "quarter" else 1)
        seconds += costs[spec.candidate.method].seconds(num_whole_steps, is_exported=spec.phase != "search")
    return seconds / num_workers + MIN_ROUNDS * sum(costs[method].seconds(NUM_STEPS) for method in PRIMARY)


def describe_plan(rule: Rule, costs: Mapping[str, TrialCost] | None, num_workers: int) -> list[str]:
    """For people; the time where costs were measured."""
    lines = []
    for method in rule.methods:
        num_steps = [spec.num_steps for spec in expected_trials(rule) if spec.candidate.method == method]
        lines.append(f"{method}: {len(num_steps)} trials, {sum(num_steps):,} steps")
    if costs is not None:
        lines.append(f"about {format_duration(expected_seconds(rule, costs, num_workers))} in all")
    return lines + [f"left out: {line}" for line in rule.left_out]


def fit_to_budget(rule: Rule, budget_seconds: float, costs: Mapping[str, TrialCost], num_workers: int) -> Rule:
    """The largest study that fits: first fewer methods beside the primary ones, then seeds, then shorter runs go.

    The rule says what was left out. UserError where not even the smallest one fits.
    """

    def seconds(candidate: Rule) -> float:
        return expected_seconds(candidate, costs, num_workers)

    rules = _smaller_rules(rule)
    for candidate in rules:
        if seconds(candidate) <= budget_seconds:
            return candidate
    lengths = range(min(2 * MIN_RUNG_STEPS, rule.total_steps), rule.total_steps)
    num_fitting = bisect.bisect(lengths, budget_seconds, key=lambda steps: seconds(_shorter(rules[-1], steps)))
    if num_fitting:
        return _shorter(rules[-1], lengths[num_fitting - 1])
    smallest = _shorter(rules[-1], lengths[0]) if lengths else rules[-1]
    raise UserError(
        f"--budget: {format_duration(budget_seconds)} are left of it, and the smallest study here takes "
        f"{format_duration(seconds(smallest))}; give it more time, more --workers, or a shorter --max-steps"
    )


def cut_like(stored: Rule, rule: Rule) -> Rule:
    """The rule, cut as a budget cut the `stored` one of a study that goes on."""
    rules = _smaller_rules(rule)
    if len(stored.left_out) < len(rules):
        return rules[len(stored.left_out)]
    return _shorter(rules[-1], stored.total_steps)


def _shorter(rule: Rule, total_steps: int) -> Rule:
    left_out = f"runs of {rule.total_steps:,} steps, these have {total_steps:,}"
    return dataclasses.replace(
        rule, total_steps=total_steps, rungs=plan_rungs(total_steps), left_out=(*rule.left_out, left_out)
    )


def _smaller_rules(rule: Rule) -> list[Rule]:
    """The rule, and ever smaller ones with runs of the same length."""
    rules = [rule]

    def add(left_out: str, **changes: object) -> None:
        last = rules[-1]
        rules.append(dataclasses.replace(last, left_out=(*last.left_out, left_out), **changes))  # type: ignore[arg-type]

    if rule.quarter_batch is not None:
        add("a quarter of the batch", quarter_batch=None)
    for method in reversed([method for method in rule.methods if method not in PRIMARY]):
        add(f"method {method}", methods=tuple(m for m in rules[-1].methods if m != method))
    if len(rule.lora_ranks) > 1:
        add(f"ranks {', '.join(map(str, rule.lora_ranks[1:]))}", lora_ranks=rule.lora_ranks[:1])
    for count in range(len(rule.answer_seeds) - 1, MIN_ANSWER_SEEDS - 1, -1):
        looks = min(rule.looks, count - MIN_ANSWER_SEEDS + 1)
        add(f"seed {rule.answer_seeds[count]}", answer_seeds=rule.answer_seeds[:count], looks=looks)
    return rules


def parse_duration(flag: str, text: str) -> float:
    """Seconds of 90s, 45m, 2h, 1.5h or 1d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{flag} {text}: expected a time such as 45m, 2h or 1d")
    return float(match[1]) * _UNITS[match[2]]
