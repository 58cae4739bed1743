"""Studies of the demo, trained for real: what the search costs and finds, and how often equals are called different.

Campaigns of many short runs on blocks of 64 tokens: `pytest -m sweep -n 0 -s tests/distributed/test_study_campaign.py`.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.study_rules import make_candidate, make_trial
from helpers.study_rules import make_rule as make_study_rule

from trainer.report.interval import paired_interval
from trainer.tools.processes import make_slots, start_run
from trainer.tools.study.rule import Rule
from trainer.tools.study.search import MethodSearch, TrialSpec
from trainer.tools.study.trials import run_outcome, trial_argv
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(7200)]
TRAIN_ARGV = ("--block-size", "64", "--wandb", "disabled")


make_rule = partial(make_study_rule, search_seeds=(1, 2, 3), train_argv=TRAIN_ARGV, data="")


def measure(folder: Path, rule: Rule, specs: list[TrialSpec]) -> dict[str, float]:
    """The final validation loss of each trial, infinity where it failed; two run side by side."""
    slots = make_slots(2, 0)

    def train(number: int, spec: TrialSpec) -> None:
        argv = trial_argv(rule, spec, folder / spec.name)
        start_run(slots[number % 2], argv, folder / "trials" / spec.name).join()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, range(len(specs)), specs))
    losses = {spec.name: run_outcome(folder / spec.name)[0] for spec in specs}
    return {name: math.inf if loss is None else loss for name, loss in losses.items()}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_search_on_the_demo_is_within_a_standard_error_of_the_full_grid(method, tmp_path):
    rule = make_rule(48)
    results: dict[str, float] = {}
    while missing := MethodSearch(rule, method, results).missing:
        results |= measure(tmp_path, rule, missing)
    search = MethodSearch(rule, method, results)
    grid = [spec for candidate in search.grid for spec in search.specs_at(candidate, -1)]
    results |= measure(tmp_path, rule, [spec for spec in grid if spec.name not in results])
    by_rate = {candidate: [results[s.name] for s in search.specs_at(candidate, -1)] for candidate in search.grid}
    best = min(by_rate, key=lambda candidate: np.mean(by_rate[candidate]))
    error = np.std(by_rate[best], ddof=1) / math.sqrt(len(by_rate[best]))
    share = search.num_steps / sum(spec.num_steps for spec in grid)
    print(
        f"{method}: {search.winner.lr:g} with {search.loss:.4f}; full grid {best.lr:g} with "
        f"{np.mean(by_rate[best]):.4f} +- {error:.4f}; {100 * share:.1f} % of its steps"
    )
    assert search.loss <= np.mean(by_rate[best]) + error
    assert share <= 0.4


def test_studies_of_the_demo_against_itself_seldom_call_a_difference(tmp_path):
    """Three pairs a study, LoRA against LoRA under other seeds. Studies: 20, or DEMO_STUDIES."""
    num_studies, num_seeds = int(os.environ.get("DEMO_STUDIES", 20)), 3
    rule = make_rule(16, train_argv=(*TRAIN_ARGV, "--test-fraction", "0", "--val-fraction", "0.1"))
    specs = [make_trial(make_candidate("lora", -8), seed=seed) for seed in range(2 * num_seeds * num_studies)]
    losses = measure(tmp_path, rule, specs)
    assert all(map(math.isfinite, losses.values()))
    tables = [read_evaluations(tmp_path / spec.name / EVAL_RECORDS_FOLDER) for spec in specs]
    last = [table[table["step"] == 16] for table in tables]
    nll = np.stack([table["nll"] for table in last])
    targets = last[0]["targets"].to_numpy(np.float64)
    halves = nll.reshape(num_studies, 2, num_seeds, -1)
    called = sum(paired_interval(a - b, targets).excludes_zero for a, b in halves)
    print(f"{called} of {num_studies} studies of the demo against itself call a difference")
    assert called <= math.ceil(0.15 * num_studies)
