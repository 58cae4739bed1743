"""What a study will take, before its first trial: its length, its cost, and what a budget has time for."""

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.config.errors import UserError
from trainer.report.formats import format_duration
from trainer.tools.study.rule import METHODS, MIN_ANSWER_SEEDS, MIN_RUNG_STEPS, MIN_UNITS, Rule, plan_rungs
from trainer.tools.study.search import TrialSpec, study_state, with_quarter_batch
from trainer.tools.study.trial_process import start_training
from trainer.tools.study.worker import DEFAULT_ARGV, Slot, last_log_line, train_command

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


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study comes to where nothing fails and no grid is extended."""

    num_trials: dict[str, int]  #: of each method, the answer's among them
    num_steps: dict[str, int]
    seconds: float | None  #: on the workers that were asked for; None where nothing was measured

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{method}: {self.num_trials[method]} trials, {self.num_steps[method]:,} steps"
            for method in self.num_trials
        ]
        return [*lines, *([f"about {format_duration(self.seconds)} in all"] if self.seconds is not None else [])]


def run_train(slot: Slot, argv: Sequence[str]) -> str:
    """The output of launch/train.py, run as a trial is; UserError with its last line where it refuses."""
    with tempfile.TemporaryDirectory(prefix="study-") as folder:
        log = Path(folder, "log")
        with open(Path(folder, "lock"), "w", encoding="utf-8") as lock:
            process = start_training(train_command(slot, argv, log), lock)
            process.join()
        if process.exitcode:
            raise UserError(last_log_line(log, process.exitcode))
        return log.read_text(encoding="utf-8", errors="replace")


def resolve_total_steps(methods: Sequence[str], train_argv: Sequence[str], run: RunFn) -> int:
    """The optimizer steps of a whole run, asked of `train.py --dry-run` for every method.

    UserError where a method cannot be loaded, a flag is wrong or the test is too small: before the first trial.
    """

    def dry_run(method: str) -> int:
        with tempfile.TemporaryDirectory(prefix="study-") as folder:
            argv = [*METHODS[method], *DEFAULT_ARGV, *train_argv, "--output-dir", f"{folder}/run", "--dry-run"]
            plan = run(argv)
        steps, test_rows = (
            int(match[1].replace(",", "")) if (match := re.search(pattern, plan, re.MULTILINE)) else 0
            for pattern in (r"^steps\s.*?([\d,]+) in all", r"^test\s+([\d,]+) ")
        )
        assert steps, "the plan says how many steps a run has"
        if test_rows < MIN_UNITS:
            raise UserError(
                f"--test-fraction: {test_rows} test records, blocks where texts are packed; expected {MIN_UNITS} or "
                "more: raise it, give --test-data or a smaller --block-size"
            )
        return steps

    steps = {dry_run(methods[0])}  # the data is prepared once, by the first
    with ThreadPoolExecutor(2) as pool:
        steps |= set(pool.map(dry_run, methods[1:]))
    assert len(steps) == 1, "the data decides, not the method"
    return steps.pop()


def measure_costs(
    methods: Sequence[str], train_argv: Sequence[str], run: RunFn, clock: Callable[[], float] = time.monotonic
) -> dict[str, TrialCost]:
    """What a start, a step and an export of each method take here, from three short runs of each, one at a time."""
    costs = {}
    for method in methods:
        seconds = []
        for num_steps, export in ((CALIBRATION_STEPS[0], "last"), *((steps, "none") for steps in CALIBRATION_STEPS)):
            with tempfile.TemporaryDirectory(prefix="study-") as folder:
                argv = [*METHODS[method], *DEFAULT_ARGV, *train_argv, "--max-steps", str(num_steps)]
                start_time = clock()
                run([*argv, "--export", export, "--output-dir", f"{folder}/run", "--wandb", "disabled"])
                seconds.append(clock() - start_time)
        exported, short, long = seconds
        step_seconds = max(0.0, (long - short) / (CALIBRATION_STEPS[1] - CALIBRATION_STEPS[0]))
        costs[method] = TrialCost(
            start_seconds=max(0.0, short - CALIBRATION_STEPS[0] * step_seconds), step_seconds=step_seconds,
            export_seconds=max(0.0, exported - short),
        )  # fmt: skip
    return costs


def plan_study(rule: Rule, costs: dict[str, TrialCost] | None = None, num_workers: int = 1) -> StudyPlan:
    """Walk through a study whose best rates lie in the middle of the grids, and add up."""
    results: dict[str, float] = {}
    specs: list[TrialSpec] = []
    while needed := study_state(rule, results).needed:
        for spec in needed:
            middle = -4.0 if spec.candidate.method == "full" else -3.0
            results[spec.name] = abs(math.log10(spec.candidate.lr) - middle)
        specs += needed
    if rule.quarter_batch is not None:
        specs += with_quarter_batch(study_state(rule, results), results).quarter
    specs_by_method = {method: [spec for spec in specs if spec.candidate.method == method] for method in rule.methods}
    seconds = None
    if costs is not None:
        shares = {"quarter": 4}  # of a step's examples
        seconds = sum(
            costs[spec.candidate.method].seconds(
                spec.num_steps // shares.get(spec.phase, 1), is_exported=spec.phase != "search"
            )
            for spec in specs
        )
        seconds /= num_workers
    return StudyPlan(
        num_trials={method: len(method_specs) for method, method_specs in specs_by_method.items()},
        num_steps={
            method: sum(spec.num_steps for spec in method_specs) for method, method_specs in specs_by_method.items()
        },
        seconds=seconds,
    )


def fit_to_budget(rule: Rule, budget_seconds: float, costs: dict[str, TrialCost], num_workers: int) -> Rule:
    """The largest study that fits: first fewer methods beside the primary ones, then seeds, then shorter runs go.

    The rule says what was left out. UserError where not even the smallest one fits.
    """
    smallest = rule
    for candidate in _smaller_rules(rule):
        if (plan_study(candidate, costs, num_workers).seconds or 0) <= budget_seconds:
            return candidate
        smallest = candidate
    needed_seconds = plan_study(smallest, costs, num_workers).seconds or 0
    raise UserError(
        f"--budget {format_duration(budget_seconds)}: the smallest study here takes {format_duration(needed_seconds)}; "
        "give it more time, more --workers, or a shorter --max-steps"
    )


def _smaller_rules(rule: Rule) -> list[Rule]:
    """The rule, and ever smaller ones."""
    rules = [rule]

    def add(left_out: str, **changes: object) -> None:
        last = rules[-1]
        rules.append(dataclasses.replace(last, left_out=(*last.left_out, left_out), **changes))  # type: ignore[arg-type]

    if rule.quarter_batch is not None:
        add("a quarter of the batch", quarter_batch=None)
    for method in rule.methods[:1:-1]:
        if method not in ("full", "lora"):
            add(f"method {method}", methods=tuple(m for m in rules[-1].methods if m != method))
    if len(rule.lora_ranks) > 1:
        add(f"ranks {', '.join(map(str, rule.lora_ranks[1:]))}", lora_ranks=rule.lora_ranks[:1])
    for count in range(len(rule.answer_seeds) - 1, MIN_ANSWER_SEEDS - 1, -1):
        looks = min(rule.looks, count - MIN_ANSWER_SEEDS + 1)
        add(f"seed {rule.answer_seeds[count]}", answer_seeds=rule.answer_seeds[:count], looks=looks)
    steps = rule.total_steps // 2
    while steps >= 2 * MIN_RUNG_STEPS:
        add(f"runs of {steps} steps in place of {steps * 2}", total_steps=steps, rungs=plan_rungs(steps))
        steps //= 2
    return rules


def parse_duration(flag: str, text: str) -> float:
    """Seconds of 90s, 45m, 2h, 1.5h or 1d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{flag} {text}: expected a time such as 45m, 2h or 1d")
    return float(match[1]) * _UNITS[match[2]]
