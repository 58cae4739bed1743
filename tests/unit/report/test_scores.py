"""The answer by right answers instead of a loss, and what was forgotten beside it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_runs import write_eval_records
from helpers.fake_studies import MakeRun, judge_runs, make_study

from trainer.config.errors import UserError
from trainer.report.answer_file import to_answer
from trainer.report.interval import paired_interval
from trainer.report.judge import parse_margin
from trainer.report.run_data import RunData, read_folder


def make_scored(make_run: MakeRun, num_seeds: int, full: float, lora: float, of: float = 1.0) -> list[RunData]:
    """Runs whose first `full` and `lora` of 400 test records are right, or have the score `of`; 40 others by seed."""
    runs = make_study(make_run, num_seeds=num_seeds, excess=0.0)
    for run in runs:
        rng = np.random.default_rng([run.get("settings.train.seed"), run.mode == "lora"])
        right = (np.arange(400) < 400 * (full if run.mode == "full" else lora)).astype(float) * of
        right[rng.choice(400, 40, replace=False)] = rng.integers(0, 2, 40) * of
        records = {"targets": [9] * 401, "split": "test", "scores": {"exact": [*right, None]}}
        write_eval_records(Path(run.source), {30: [2.0] * 401}, **records)
    return [read_folder(Path(run.source)) for run in runs]


@pytest.mark.parametrize(
    ("study", "answer", "said"),
    [
        ({"num_seeds": 3, "full": 0.72, "lora": 0.71}, "good enough", ": good enough by your margin of 5 points, on"),
        ({"num_seeds": 3, "full": 0.5, "lora": 0.72}, "better", " more): better, on 400 test blocks, seeds 0, 1 and 2"),
        ({"num_seeds": 1, "full": 0.7, "lora": 0.5}, "worse", "; McNemar's exact test: p = "),
        ({"num_seeds": 3, "full": 0.72, "lora": 0.5, "of": 0.5}, "worse", "points lower than full (lr 0.0005) by"),
        ({"num_seeds": 3, "full": 0.0, "lora": 0.0, "of": 0.0}, "cannot tell", "both score under 5 points"),
    ],
)
def test_right_answers_are_judged_in_points_by_the_same_interval(
    make_run: MakeRun, study: dict[str, Any], answer: str, said: str
) -> None:
    runs = make_scored(make_run, **study)
    verdict = judge_runs(*runs, margin=parse_margin("5pt", "score:exact"))
    pair = verdict.primary
    assert (pair.answer, said in verdict.sentence) == (answer, True), verdict.sentence
    full, lora = pair.judged.score("full"), pair.judged.score("lora")
    assert pair.excess.estimate == pytest.approx(full - lora)
    assert ("neither mode learnt" in verdict.next_step) == (max(full, lora) < 5)
    if "of" not in study:
        low, high = sorted(abs(end) for end in (pair.excess.low, pair.excess.high))
        assert f"({lora:.1f} % against {full:.1f} %; 95 % interval {low:.1f} " in verdict.sentence
        assert f" to {high:.1f} {'fewer' if full > lora else 'more'}): " in verdict.sentence
    assert to_answer(verdict)["lora"]["score"] == lora
    with pytest.raises(UserError, match="--decide-by score:f1: the test records of full-s0 have scores exact"):
        judge_runs(*runs, margin=parse_margin(None, "score:f1"))
    default = judge_runs(*runs, margin=parse_margin(None, "score:exact"))
    assert "your margin" not in default.sentence, "nobody gave it"


def test_forgetting_is_in_points_where_a_score_decides_and_retained_records_have_it(make_run: MakeRun) -> None:
    runs = make_scored(make_run, 3, full=0.7, lora=0.7)
    for run in runs:
        right = np.arange(200) < (110 if run.mode == "full" else 140) + run.get("settings.train.seed")
        records = {"targets": [9] * 200, "split": "retain", "scores": {"exact": right.astype(float)}}
        write_eval_records(Path(run.source), {30: [2.0] * 200}, **records)
    verdict = judge_runs(*(read_folder(Path(run.source)) for run in runs), margin=parse_margin("5pt", "score:exact"))
    points = verdict.primary.forgetting_points
    assert points.estimate == pytest.approx(-15)
    assert f"and forgets 15.0 [{-points.high:.1f}, {-points.low:.1f}] points less" in verdict.sentence
    assert to_answer(verdict)["forgetting_points"]["estimate"] == points.estimate


def test_forgetting_has_the_same_interval_and_is_in_the_sentence(make_run: MakeRun) -> None:
    runs, rng = make_study(make_run, num_seeds=3, excess=0.2), np.random.default_rng(6)
    retained = {}
    for run in runs:
        losses = {0: np.full(50, 3.0), 30: 3.0 + (0.5 if run.mode == "full" else 0.1) + 0.1 * rng.standard_normal(50)}
        retained[run.name] = losses[30]
        write_eval_records(Path(run.source), losses, targets=[9] * 50, split="retain")
    verdict = judge_runs(*(read_folder(Path(run.source)) for run in runs))
    difference = np.stack([retained[f"lora-s{n}"] - retained[f"full-s{n}"] for n in range(3)]) * 9
    expected, pair = paired_interval(difference, np.full(50, 9.0)), verdict.primary
    assert (pair.forgetting.low, pair.forgetting.high) == pytest.approx((expected.low, expected.high))
    clause = f"forgets {-expected.estimate:.4f} [{-expected.high:+.4f}, {-expected.low:+.4f}] nats per token less"
    assert clause in verdict.sentence
    assert (pair.forgetting_points, to_answer(verdict)["forgetting_points"]) == (None, None), "a loss decides"
    assert pair.tradeoffs["full"].forgetting.estimate == pytest.approx(0.5, abs=0.05)
    assert pair.tradeoffs["lora"].gain.estimate == pytest.approx(1.8, abs=0.05)
