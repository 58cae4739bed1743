"""The search on simulated objectives: it finds planted optima, extends grids, or refuses to rank."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.study_rules import make_rule

from trainer.tools.study.answer import choice_noise
from trainer.tools.study.rule import Rule
from trainer.tools.study.search import MethodSearch, StudyState, TrialSpec, study_state
from trainer.tools.study.trials import trial_argv

Objective = Callable[[TrialSpec], float]


def bowl(full: float = -4.0, lora: float = -3.0, noise: float = 0.0, shift_of_short_runs: float = 0.0) -> Objective:
    """A loss with its optimum at these powers of ten; far too high rates diverge, short runs want higher ones."""

    def objective(spec: TrialSpec) -> float:
        optimum = full if spec.candidate.method == "full" else lora
        optimum += shift_of_short_runs * math.log(160 / spec.num_steps, 16)
        distance = math.log10(spec.candidate.lr) - optimum
        if distance > 2.5:
            return math.inf
        rng = random.Random(spec.name)
        rank_term = 0.02 * abs(math.log2((spec.candidate.lora_rank or 8) / 16))
        return 2 + 0.3 * distance**2 + 20 / spec.num_steps + rank_term + rng.gauss(0, noise)

    return objective


def run_study(rule: Rule, objective: Objective) -> tuple[StudyState, dict[str, float]]:
    """Every needed trial; none is asked for twice."""
    results: dict[str, float] = {}
    while True:
        state = study_state(rule, results)
        if not state.needed:
            return state, results
        for spec in state.needed:
            assert spec.name not in results
            results[spec.name] = objective(spec)


@pytest.mark.parametrize(("full", "lora"), [(-5.3, -4.3), (-4.0, -3.0), (-1.2, -0.2)])
def test_the_search_finds_a_planted_optimum_of_either_method_outside_the_grid_too(full, lora):
    state, results = run_study(make_rule(), bowl(full=full, lora=lora))
    assert state.refusal is None
    for method, optimum in (("full", full), ("lora", lora)):
        winner = state.outcomes[method].winner
        assert math.log10(winner.lr) == pytest.approx(optimum, abs=1 / 8 + 0.01)
        for index in (winner.rate_index - 1, winner.rate_index + 1):
            names = {f"search-{winner.at(index).label}-t160-s{seed}" for seed in (1, 2, 3)}
            assert names <= set(results), "both neighbours were tried, with as many seeds"


def test_the_noise_of_the_choice_is_about_what_choosing_again_changes():
    """Of 60 studies on the same curves: 0.8 to 2 times as much, for it must not promise too little."""
    truth, rule, noise, lrs, said = bowl(full=-4.1, lora=-3.1), make_rule(), 0.03, [], []
    for number in range(60):
        state, results = run_study(rule, lambda spec, n=number: bowl(-4.1, -3.1)(spec) + noise * gauss(n, spec))
        searches = [state.outcomes[method] for method in ("full", "lora")]
        lrs.append([truth(search.answer_specs()[0]) for search in searches])
        said.append(choice_noise(searches, results))
    moved = np.diff(lrs, axis=1)
    ratio = np.sqrt(np.mean(np.square(said)) / np.mean(np.square(moved)))
    assert 0.8 < ratio < 2


def gauss(number: int, spec: TrialSpec) -> float:
    return random.Random(f"{number} {spec.name}").gauss(0, 1)


def cliff(*, decades_a_rung: float, at: float) -> Objective:
    """Better towards a cliff, which lies lower by so much with each longer rung."""

    def objective(spec: TrialSpec) -> float:
        distance = math.log10(spec.candidate.lr) - at - (spec.candidate.method == "lora")
        distance += decades_a_rung * math.log(spec.num_steps / 10, 4)
        return math.inf if distance > 0 else 2 - 0.1 * distance

    return objective


@pytest.mark.parametrize("decades_a_rung", [0.3, 1.0])
def test_where_the_leader_and_its_neighbours_diverge_at_full_length_the_search_walks_down(decades_a_rung):
    state, _ = run_study(make_rule(), cliff(decades_a_rung=decades_a_rung, at=-3))
    for method, at in (("full", -3), ("lora", -2)):
        exponent = math.log10(state.outcomes[method].winner.lr)
        assert at - 2 * decades_a_rung - 0.26 < exponent <= at - 2 * decades_a_rung + 1e-3


def test_a_highest_rate_that_the_user_gives_is_no_edge_of_the_search():
    rule = make_rule(max_lrs={"lora": 5.6e-4})
    state, _ = run_study(rule, bowl())
    lora = state.outcomes["lora"]
    assert (state.refusal, lora.winner.lr) == (None, 5.62e-4)
    assert "best rate 0.000562, the highest that --max-lr allows (" in lora.describe()
    assert max(spec.candidate.lr for spec in lora.trials) == 5.62e-4


def valley(method: str, exponent_of_best: float) -> Objective:
    """Of this method the best rate lies there, of the others in the middle of their grids."""
    return lambda spec: (
        2 + abs(math.log10(spec.candidate.lr) - (exponent_of_best if spec.candidate.method == method else -3))
    )


def failing(name: str, loss: float) -> Objective:
    """One trial, or all of a method, ends with this."""
    return lambda spec: loss if name in (spec.name, spec.candidate.method) else bowl()(spec)


ANSWER = "answer-full-lr0.0001-t160-s102"
NEIGHBOUR = "search-lora-r8-lr0.00178-t160-s1"


@pytest.mark.parametrize(
    ("objective", "refusal"),
    [
        (valley("full", 3), "full is under-tuned: its best rate 1 is the highest that the study may try, and a better"),
        (valley("lora", -9), "lora is under-tuned: its best rate 1e-07 is the lowest that the study may try, and a"),
        (failing("lora", math.inf), "lora: every trial failed"),
        (failing(NEIGHBOUR, math.nan), f"lora: {NEIGHBOUR} failed without diverging, and stands beside the best rate"),
        (failing(ANSWER, math.nan), f"{ANSWER} failed, and each pair of seeds is needed"),
        (
            failing(ANSWER, math.inf),
            "full at 0.0001 diverged in 1 of 3 seeds; run the study at 5.62e-05 (--max-lr full=5.62e-05, another --out",
        ),
    ],
)
def test_a_study_that_cannot_be_answered_is_refused_and_names_the_method_or_the_trial(objective, refusal):
    state, results = run_study(make_rule(), objective)
    assert (state.refusal or "").startswith(refusal)
    assert bool(state.answers) == (not refusal)
    assert any(name.startswith("answer") for name in results) == (not refusal or "seeds" in refusal)


def test_grids_are_absolute_and_full_and_each_lora_rank_get_the_same_budget():
    for method, low, high in (("full", 1e-6, 1e-2), ("lora", 1e-5, 1e-1)):
        rates = [candidate.lr for candidate in MethodSearch(make_rule(), method, {}).grid]
        assert (rates[0], rates[-1], len(rates)) == (low, high, 17)
    state, _ = run_study(make_rule(lora_ranks=(2, 8, 32)), bowl())
    assert list(state.outcomes) == ["full", "lora-r8", "lora-r2", "lora-r32"], "the best rank is judged first"
    steps = [outcome.num_steps for outcome in state.outcomes.values()]
    assert max(steps) / min(steps) < 1.3, steps
    assert [spec.candidate.lora_rank for spec in state.answers[:4]] == [None, 8, 2, 32]


@pytest.mark.parametrize("seed", range(5))
def test_the_winner_is_as_good_as_the_full_grids_best_at_a_part_of_its_steps(seed):
    """At most 40 %, and six runs or nine for the choice between the best rate and its neighbours."""
    rng = random.Random(seed)
    noise = 0.005
    optima = {"full": rng.uniform(-5.5, -2.5), "lora": rng.uniform(-4.5, -1.5)}
    truth = bowl(**optima, shift_of_short_runs=0.5)  # a place of the grid from rung to rung
    objective = bowl(**optima, noise=noise, shift_of_short_runs=0.5)
    rule = make_rule()
    state, _ = run_study(rule, objective)
    for method in rule.methods:
        search, outcome = MethodSearch(rule, method, {}), state.outcomes[method]
        full_grid = [truth(spec) for candidate in search.grid for spec in search.specs_at(candidate, 2)]
        assert truth(outcome.answer_specs()[0]) <= min(full_grid) + 2 * noise
        share = outcome.num_steps / (len(search.grid) * rule.total_steps)
        num_choice = len([s for s in outcome.trials if s.seed in rule.choice_seeds])
        assert share - num_choice / len(search.grid) <= 0.4, method
        assert share <= 0.95, method


def test_the_answers_runs_have_fresh_seeds_in_pairs_and_full_length_and_they_alone_see_the_test_records():
    rule = make_rule()
    state, results = run_study(rule, bowl())
    assert [spec.seed for spec in state.answers] == [101, 101, 102, 102, 103, 103]
    assert {spec.num_steps for spec in state.answers} == {160}
    assert {spec.candidate for spec in state.answers} == {outcome.winner for outcome in state.outcomes.values()}
    for specs, is_exported in ((state.answers, True), (MethodSearch(rule, "lora", results).trials, False)):
        argvs = [" ".join(trial_argv(rule, spec, Path("run"))) for spec in specs]
        assert argvs
        assert all(("--export none" in argv) != is_exported for argv in argvs)
