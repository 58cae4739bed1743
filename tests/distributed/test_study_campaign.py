"""What the search costs and finds on the demo, trained for real: many short runs on blocks of 64 tokens.

`pytest -m sweep -n 0 -s tests/distributed/test_study_campaign.py`.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.study_rules import make_rule

from trainer.tools.processes import make_slots, start_run
from trainer.tools.study.rule import Rule
from trainer.tools.study.search import MethodSearch, TrialSpec
from trainer.tools.study.trials import run_outcome, trial_argv

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(7200)]


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
    argv = ("--block-size", "64", "--wandb", "disabled")
    rule = make_rule(48, search_seeds=(1, 2, 3), train_argv=argv, data="")
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
