"""What a study will cost, and what a budget has time for."""

import dataclasses
import threading

import pytest
from helpers.study_rules import make_rule

from trainer.config.errors import UserError
from trainer.report.margin import Margin
from trainer.tools.study import planning
from trainer.tools.study.planning import TrialCost, cut_like, expected_seconds, fit_to_budget, parse_duration


def test_a_budget_leaves_out_methods_then_seeds_then_length_and_says_so():
    rule = make_rule(methods=("full", "lora", "dora"), answer_seeds=(101, 102, 103, 104))
    costs = {method: TrialCost(start_seconds=1.0, step_seconds=0.5) for method in rule.methods}
    whole = expected_seconds(rule, costs, 1)
    assert fit_to_budget(rule, whole + 1, costs, 1) == rule
    smaller = fit_to_budget(rule, whole - 1, costs, 1)
    assert (smaller.methods, smaller.left_out) == (("full", "lora"), ("method dora",))
    least = fit_to_budget(rule, whole / 4, costs, 1)
    assert least.left_out == ("method dora", "seed 104", f"runs of 160 steps, these have {least.total_steps}")
    assert 0.97 * whole / 4 < expected_seconds(least, costs, 1) <= whole / 4
    assert len(least.answer_seeds) == 3
    timing = 6 * costs["full"].seconds(16)
    assert cut_like(least, rule) == least, "the same command goes on"
    other_margin = dataclasses.replace(rule, margin=Margin(value=0.05))
    assert dataclasses.replace(cut_like(least, other_margin), margin=Margin()) == least, "and shows what else changed"
    assert fit_to_budget(rule, (whole + timing) / 2 + 1, costs, 2) == rule, "two workers take half, but for the timing"
    with pytest.raises(UserError, match=r"--budget: 10 s are left of it, and the smallest study here takes [\d.]+ min"):
        fit_to_budget(rule, 10, costs, 1)
    assert [parse_duration("--budget", text) for text in ("90s", "45m", "1.5h", "1d")] == [90, 2700, 5400, 86400]


def test_costs_are_measured_from_three_short_runs_of_each_method():
    now = [0.0]

    def run(argv) -> str:
        now[0] += 7 + 0.25 * int(argv[argv.index("--max-steps") + 1]) + 5 * (argv[argv.index("--export") + 1] == "last")
        return ""

    costs = planning.measure_costs(("full", "lora"), (), [run], lambda: now[0])
    assert costs["lora"].start_seconds == pytest.approx(7)
    assert costs["lora"].step_seconds == pytest.approx(0.25)
    assert costs["lora"].export_seconds == pytest.approx(5)
    assert costs["lora"].seconds(40, is_exported=True) == pytest.approx(22)


def test_workers_share_the_machine_while_costs_are_measured_as_they_do_in_the_study():
    both_run = threading.Barrier(2, timeout=20)
    folders = set()

    def run(argv) -> str:
        both_run.wait()
        folders.add(argv[argv.index("--output-dir") + 1])
        return ""

    planning.measure_costs(("full",), (), [run, run])
    assert len(folders) == 6
