"""The interval of the excess loss: by hand, against textbooks, and by simulated studies whose truth is known. The fast
sample runs with the others; the full one (3,000 studies a case) under `-m sweep -s`, which prints its rates."""

import dataclasses
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from trainer.report import interval as interval_module
from trainer.report.interval import (
    VarianceComponents,
    holm,
    mcnemar_p,
    paired_interval,
    plan_sample_size,
    predict_half_width,
    score_interval,
    sum_by_unit,
)
from trainer.report.judge import Margin, question_units

FAST_STUDIES, SWEEP_STUDIES = 500, 3000
MIN_COVERAGE, MAX_SIZE, MAX_FALSE_DIFFERENCES = 0.93, 0.065, 0.06
#: standard deviations (nats a token) of seed, unit and rest
CASES = [(0.01, 0.1, 0.05), (0.0, 0.1, 0.05), (0.03, 0.1, 0.05), (0.01, 0.0, 0.2), (0.002, 0.05, 0.1)]
NUM_UNITS = 200
each_size = pytest.mark.parametrize("num_studies", [FAST_STUDIES, pytest.param(SWEEP_STUDIES, marks=pytest.mark.sweep)])
Study = tuple[np.ndarray, np.ndarray]  # differences (seeds, units) and targets (units,)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def student_t(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_t(3, shape) / np.sqrt(3)  # variance 1


def simulate(
    rng: np.random.Generator,
    draw: Callable[..., np.ndarray],
    case: tuple[float, float, float],
    *,
    num_seeds: int,
    num_units: int = NUM_UNITS,
    excess: float = 0.0,
) -> Study:
    """One study whose true excess is `excess`."""
    seed_sd, unit_sd, rest_sd = case
    targets = rng.integers(5, 61, num_units).astype(float)
    per_token = excess + seed_sd * draw(rng, num_seeds, 1) + unit_sd * draw(rng, 1, num_units)
    per_token = per_token + rest_sd * draw(rng, num_seeds, num_units)
    return per_token * targets, targets


# --- by hand ---


def test_one_seed_is_the_textbook_interval_of_paired_differences():
    differences = np.array([[0.55, -0.05, 0.15, 0.75]])
    expected = stats.ttest_1samp(differences[0], 0.0)
    low, high = expected.confidence_interval(0.95)
    interval = paired_interval(differences, np.ones(4))
    assert (interval.estimate, interval.low, interval.high) == pytest.approx((0.35, low, high))
    assert interval.p_value == pytest.approx(expected.pvalue)
    assert interval.upper == pytest.approx(0.35 + stats.t.ppf(0.95, 3) * differences.std(ddof=1) / 2)


def test_mcnemars_test_is_the_sign_test_of_the_records_that_differ():
    for num_worse, num_better in ((3, 9), (12, 1), (5, 5)):
        expected = stats.binomtest(num_worse, num_worse + num_better).pvalue
        assert mcnemar_p(num_worse, num_better) == pytest.approx(expected)
    assert mcnemar_p(0, 0) == 1


def test_crossed_seeds_and_units_are_the_two_way_analysis_of_variance_by_hand():
    # rows are seeds; grand mean 3, seed means 2 and 4, unit means 1.5, 3, 4.5; residuals 0.5, 0, -0.5 and -0.5, 0, 0.5
    interval = paired_interval(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]), np.ones(3))
    ms_seed, ms_unit, ms_rest = 3 * 2.0, 2 * 2.25, 1.0 / 2  # N var(seed means), S var(unit means), sum of squares / 2
    total = ms_seed + ms_unit - ms_rest
    freedom = max(1.0, total**2 / (ms_seed**2 / 1 + ms_unit**2 / 2 + ms_rest**2 / 2))
    width = max(stats.t.ppf(0.975, freedom) * np.sqrt(total / 6), stats.t.ppf(0.975, 1) * np.sqrt(ms_seed / 6))
    assert interval.estimate == 3.0
    assert interval.high - interval.estimate == pytest.approx(width)
    assert interval.components == VarianceComponents(seed=5.5 / 3, unit=2.0, rest=0.5)


def test_the_estimate_weighs_units_by_their_targets_and_equal_models_differ_by_nothing():
    assert paired_interval(np.array([[1.0, 9.0]]), np.array([10.0, 30.0])).estimate == pytest.approx(10 / 40)
    same = paired_interval(np.zeros((3, 5)), np.ones(5))
    assert (same.low, same.high, same.p_value, same.excludes_zero) == (0.0, 0.0, 1.0, False)
    sums = sum_by_unit(np.array([[1.0, 2.0, 4.0, 8.0]]), ["b", "a", "b", "a"])  # records of one group are one unit
    np.testing.assert_array_equal(sums, [[10.0, 5.0]])


def test_the_interval_is_never_narrower_than_that_of_the_seeds_means_and_p_is_the_level_at_which_it_reaches_zero(
    monkeypatch,
):
    rng = np.random.default_rng(5)
    for case in CASES:
        differences, targets = simulate(rng, normal, case, num_seeds=3, excess=0.02)
        interval = paired_interval(differences, targets)
        seed_means = ((differences - interval.estimate * targets) / targets.mean()).mean(axis=1)
        alone = stats.t.ppf(0.975, 2) * seed_means.std(ddof=1) / np.sqrt(3)
        assert interval.high - interval.estimate >= alone * (1 - 1e-12)
        with monkeypatch.context() as patch:
            patch.setattr(interval_module, "TWO_SIDED", 1 - interval.p_value / 2)
            at_level = paired_interval(differences, targets)
        assert min(abs(at_level.low), abs(at_level.high)) == pytest.approx(0, abs=1e-9)


def test_the_margin_contrast_is_zero_where_lora_loses_exactly_that_share_of_the_gain():
    base, full = np.full((1, 4), 4.0), np.full((1, 4), 2.0)
    losses = SimpleNamespace(lora=full + 0.02 * (base - full), full=full, base=base, weights=np.ones(4))
    np.testing.assert_allclose(Margin().contrast(losses), 0, atol=1e-12)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


# --- simulated studies ---


def print_share(label: str, outcomes: Iterable[bool]) -> float:
    share = float(np.mean(list(outcomes)))
    print(f"{label} {share:.3f}")
    return share


def covers(differences: np.ndarray, targets: np.ndarray, truth: float = 0.02) -> bool:
    interval = paired_interval(differences, targets)
    return interval.low <= truth <= interval.high


@each_size
@pytest.mark.parametrize("draw", [normal, student_t])
def test_the_interval_covers_the_truth(num_studies, draw):
    rng = np.random.default_rng(20261125)
    for case in CASES:
        studies = (simulate(rng, draw, case, num_seeds=3, excess=0.02) for _ in range(num_studies))
        covered = (covers(*study) for study in studies)
        share = print_share(f"{draw.__name__}, {case}: coverage", covered)
        # the rest is where a method against itself, the same studies without their excess, is called different
        assert share >= (1 - MAX_FALSE_DIFFERENCES if draw is normal else MIN_COVERAGE)


@each_size
def test_lora_at_the_margin_is_called_good_enough_no_oftener_than_the_level(num_studies):
    """Base 1 nat above full, so a margin of 2 % is 0.02; base's own spread over units makes the margin an estimate."""
    for case in CASES:
        rng, called = np.random.default_rng(7), []
        for _ in range(num_studies):
            excess, targets = simulate(rng, normal, case, num_seeds=3, excess=0.02)
            gain = targets * (1 + 0.3 * normal(rng, NUM_UNITS)) + 0.1 * targets * normal(rng, 3, NUM_UNITS)
            losses = SimpleNamespace(lora=excess, full=np.zeros_like(excess), base=gain, weights=targets)
            called.append(paired_interval(Margin().contrast(losses), targets).upper < 0)
        assert print_share(f"{case}: good enough at the margin", called) <= MAX_SIZE


@each_size
def test_groups_of_records_are_covered_as_units(num_studies):
    """Five references of one meaning: taken for five records they would cover 69 % (facts of the design)."""
    rng, covered = np.random.default_rng(8), []
    units = np.repeat(np.arange(60).astype(str), 5)
    for _ in range(num_studies):
        targets = rng.integers(5, 61, len(units)).astype(float)
        shared = np.repeat(0.1 * rng.standard_normal(60), 5)
        differences = targets * (0.02 + shared + 0.02 * rng.standard_normal((3, len(units))))
        covered.append(covers(sum_by_unit(differences, units), sum_by_unit(targets, units)))
    assert print_share("groups: coverage", covered) >= MIN_COVERAGE


def simulate_shape(rng: np.random.Generator, shape: str, num_seeds: int, num_units: int) -> tuple[np.ndarray, ...]:
    """Differences, targets and the true excess of a study whose records are unequal, or of which a few decide."""
    targets, spread, truth = rng.integers(5, 61, num_units).astype(float), 0.1 * normal(rng, num_units), 0.0
    lengths = normal(rng, num_units)
    if shape == "skewed":
        spread = 0.1 * (np.exp(normal(rng, num_units)) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
    elif shape == "few carry the excess":
        spread, truth = 0.58 * (rng.random(num_units) < 0.03) + 0.2 * spread, 0.03 * 0.58
    elif shape == "one is a third":
        targets[0] = targets[1:].sum() / 2
    elif shape != "equal":  # lognormal lengths; an excess that grows with them has the mean 0.06, weighed by length
        targets = np.maximum(1.0, np.round(20 * np.exp(1.2 * lengths)))
        if shape == "grows with length":
            spread, truth = 0.05 * np.log(targets / 20) / 1.2 + 0.5 * spread, 0.06
    noise = 0.01 * normal(rng, num_seeds, 1) + 0.05 * normal(rng, num_seeds, num_units)
    return (spread + noise) * targets, targets, truth


@pytest.mark.parametrize(
    ("num_studies", "num_seeds", "num_units"),
    [
        *((200, 3, num_units) for num_units in (50, 200)),
        *(pytest.param(3000, s, n, marks=pytest.mark.sweep) for s in (3, 5) for n in (20, 50, 100, 200)),
    ],
)
@pytest.mark.parametrize(
    "shape", ["equal", "skewed", "few carry the excess", "lognormal lengths", "grows with length", "one is a third"]
)
def test_unequal_records_do_not_make_lora_good_enough(shape, num_studies, num_seeds, num_units):
    """At the margin exactly, with 20 to 200 records. Of 50 records a fifth of the samples holds none of the 3 % that
    carry the excess: there nothing but more records helps, and the bounds are those of such samples."""
    rng, covered, called = np.random.default_rng([num_seeds, num_units]), [], []
    for _ in range(num_studies):
        differences, targets, truth = simulate_shape(rng, shape, num_seeds, num_units)
        margin = Margin(kind="nats", value=truth)
        units = {"units": np.arange(num_units).astype(str), "unit_name": "records"}
        losses = SimpleNamespace(
            lora=differences, full=np.zeros_like(differences), weights=targets, measure="loss", **units
        )
        beyond = margin.contrast(losses)
        contrast = paired_interval(beyond, targets)
        covered.append(covers(differences, targets, truth))
        called.append(contrast.upper < 0 and not question_units(losses, beyond, contrast, "good enough"))
    is_rare, slack = shape == "few carry the excess" and num_units < 100, 0.0 if num_studies == 3000 else 0.03
    label = f"{shape}, {num_seeds} seeds, {num_units} records"
    assert print_share(f"{label}: coverage", covered) >= (0.82 if is_rare else 0.92) - slack
    assert print_share(f"{label}: good enough at the margin", called) <= (0.18 if is_rare else 0.08) + slack


@pytest.mark.parametrize(
    ("num_studies", "num_seeds", "num_units"),
    [
        *((300, s, 200) for s in (1, 3)),
        *(pytest.param(3000, s, n, marks=pytest.mark.sweep) for s in (1, 3, 5) for n in (20, 50, 200, 1000)),
    ],
)
@pytest.mark.parametrize(("differing", "excess"), [(0.0, 0.0), (0.02, 0.02), (0.1, 0.02), (0.3, 0.05)])
def test_scores_of_right_and_wrong_keep_the_interval(differing, excess, num_studies, num_seeds, num_units):
    """Of each record a mode's chance to be right is drawn once (the records are a sample), its answers for each seed.
    `differing`: the records on which the modes' chances differ, `excess` by which share LoRA is wrong on more of
    them."""
    rng, covered, called, truth = np.random.default_rng([9, num_seeds, num_units]), [], [], 100 * excess
    for _ in range(num_studies):
        chance = rng.beta(0.4, 0.2, num_units)  # most records are easy or hard
        side = rng.choice([0, 1, 2], num_units, p=[1 - differing, (differing + excess) / 2, (differing - excess) / 2])
        chances = [np.choose(side, [chance, 1.0, 0.0]), np.choose(side, [chance, 0.0, 1.0])]
        full, lora = (100.0 * (rng.random((num_seeds, num_units)) < chances_of_mode) for chances_of_mode in chances)
        if not differing:  # the very same model
            lora = full
        interval, counts = score_interval(full - lora, np.ones(num_units)), np.ones(num_units)
        beyond = score_interval(full - lora - max(truth, 2.0) * counts, counts)
        covered.append(interval.low <= truth <= interval.high)
        called.append(beyond.upper < 0 and truth >= 2.0)
    label = f"{differing:.0%} differ, {num_seeds} seeds, {num_units} records"
    slack = 0.0 if num_studies == 3000 else 0.03
    assert print_share(f"{label}: coverage", covered) >= MIN_COVERAGE - slack
    assert print_share(f"{label}: good enough at the margin", called) <= MAX_SIZE + slack


@pytest.mark.parametrize("num_studies", [1000, pytest.param(SWEEP_STUDIES, marks=pytest.mark.sweep)])
@pytest.mark.parametrize(
    ("num_pilot_units", "num_seeds", "num_units"),
    [(200, 6, 400), (64, 3, 136)],
)
def test_predicted_half_widths_are_those_of_later_studies_on_average(
    num_studies, num_pilot_units, num_seeds, num_units
):
    """Predicted from three seeds; the later study has its own draws. The last: a study's, from its search."""
    ratios = []
    for case in CASES:
        rng, predicted, later = np.random.default_rng([10, num_seeds]), [], []
        for _ in range(num_studies // 4):
            pilot = paired_interval(*simulate(rng, normal, case, num_seeds=3, num_units=num_pilot_units))
            predicted.append(predict_half_width(pilot.components, num_seeds, num_units))
            interval = paired_interval(*simulate(rng, normal, case, num_seeds=num_seeds, num_units=num_units))
            later.append(interval.high - interval.estimate)
        ratios.append(np.mean(predicted) / np.mean(later))
    print(f"{num_seeds} seeds, {num_units} units: predicted over later half widths {np.round(ratios, 3)}")
    assert ratios == pytest.approx([1.0] * len(CASES), abs=0.15 if num_pilot_units == 200 else 0.2)


def test_plan_sample_size_counts_the_seeds_or_says_that_records_are_the_floor():
    rng = np.random.default_rng(11)
    by_seeds = paired_interval(*simulate(rng, normal, (0.05, 0.01, 0.01), num_seeds=3))
    by_seeds = dataclasses.replace(by_seeds, estimate=0.03)
    advice = plan_sample_size(by_seeds)
    assert advice.floor < 0.03
    assert predict_half_width(by_seeds.components, advice.num_seeds, NUM_UNITS) < 0.03
    assert predict_half_width(by_seeds.components, advice.num_seeds - 1, NUM_UNITS) >= 0.03
    by_records = paired_interval(*simulate(rng, normal, (0.0, 0.5, 0.05), num_seeds=5))
    advice = plan_sample_size(dataclasses.replace(by_records, estimate=0.02))
    assert (advice.floor >= 0.02, advice.num_seeds) == (True, None)
    assert predict_half_width(by_records.components, 5, advice.num_units) < 0.02
