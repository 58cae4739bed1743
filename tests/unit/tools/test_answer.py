"""The verdict on simulated test losses, read back from the records that runs leave."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from helpers.fake_runs import make_metadata

from trainer.config.errors import UserError
from trainer.data.row_info import RowInfo
from trainer.report.margin import Margin
from trainer.tools.study.answer import (
    AnswerRefusedError,
    UnitLosses,
    check_one_execution,
    judge,
    judge_study,
    read_test_losses,
    write_answer,
)
from trainer.tools.study.rule import Rule
from trainer.tools.study.search import Candidate, SearchOutcome, StudyState, TrialSpec
from trainer.tools.study.worker import run_folder
from trainer.tracking.eval_records import EVAL_RECORDS_FILE, append_evaluation, evaluation_table

NUM_UNITS, SEEDS = 200, (101, 102, 103)


def make_rule(margin: Margin | None = None) -> Rule:
    return Rule(
        methods=("full", "lora"), lora_ranks=(8,), total_steps=10, rungs=(10,), search_seeds=(1,), answer_seeds=SEEDS,
        margin=margin or Margin(kind="nats", value=0.02), level=0.95, looks=1, train_argv=(),
    )  # fmt: skip


def simulate(excess: float, *, noise: float = 0.01, num_seeds: int = 3, num_units: int = NUM_UNITS):
    """(LoRA, full) losses a unit: full gains 1 nat a token over the base, LoRA is `excess` worse."""
    rng = np.random.default_rng(5)
    targets = rng.integers(5, 60, num_units).astype(float)
    level = 2 + rng.normal(0, 0.3, num_units)
    losses = [
        UnitLosses(
            nll=targets * (level + shift + rng.normal(0, noise, (num_seeds, num_units))), targets=targets,
            base_nll=np.tile(targets * (level + 1), (num_seeds, 1)), num_bytes=4 * targets, num_left_out=0,
        )
        for shift in (excess, 0.0)
    ]  # fmt: skip
    return losses[0], losses[1]


@pytest.mark.parametrize(
    ("excess", "noise", "margin", "verdict", "fragment"),
    [
        (-0.05, 0.01, Margin(kind="nats", value=0.02), "better", "lora is better than full"),
        (0.0, 0.01, Margin(kind="nats", value=0.02), "good enough", "lora is good enough: "),
        (0.01, 0.01, Margin(kind="nats", value=0.02), "good enough", "lora is good enough, worse by 0.00"),
        (0.05, 0.01, Margin(kind="nats", value=0.02), "worse", "lora is worse than full: +0.04"),
        (0.018, 0.9, Margin(kind="nats", value=0.02), "cannot tell yet", "cannot tell yet whether lora is good enough"),
        (0.01, 0.01, Margin(), "good enough", "margin 2 % of what full gained"),
        (0.05, 0.01, Margin(), "worse", "lora is worse than full"),
        (0.01, 0.01, Margin(kind="bits_per_byte", value=0.005), "good enough", "margin 0.005 bits per byte"),
        (0.03, 0.01, Margin(kind="bits_per_byte", value=0.005), "worse", "margin 0.005 bits per byte"),
    ],
)
def test_the_verdict_is_one_of_four_by_the_rules_margin(excess, noise, margin, verdict, fragment):
    answer = judge("lora", *simulate(excess, noise=noise), make_rule(margin), level=0.95)
    assert answer.verdict == verdict
    assert fragment in answer.sentence


def test_with_one_seed_the_sentence_speaks_of_the_models_not_of_the_method():
    answer = judge("lora", *simulate(0.05, num_seeds=1), make_rule(), level=0.95)
    assert answer.sentence.startswith("this lora model is worse than full")


def test_where_it_cannot_tell_it_says_how_many_seeds_would():
    answer = judge("lora", *simulate(0.0, noise=0.6), make_rule(), level=0.95)
    assert answer.verdict == "cannot tell yet"
    assert re.search(r"; \d+ seeds would tell$", answer.sentence), answer.sentence


def test_where_the_test_records_are_the_floor_it_says_how_many_of_them_would_tell():
    lora, full = simulate(0.0, noise=0.001, num_units=40)
    by_unit = np.random.default_rng(1).normal(0, 0.2, 40) * full.targets  # the same with any seed
    lora = dataclasses.replace(lora, nll=lora.nll + by_unit)
    answer = judge("lora", lora, full, make_rule(), level=0.95)
    assert answer.verdict == "cannot tell yet"
    assert re.search(r"allow no less than ±0\.0\d+, whatever the number of seeds: \d+ of them would", answer.sentence)


def make_rows(num_rows: int, *, num_shared: int = 0, group_size: int = 1) -> RowInfo:
    return RowInfo(
        ids=[f"{n:016x}" for n in range(num_rows)], targets=[10] * num_rows, num_bytes=[40] * num_rows,
        groups=[f"g{n // group_size:04d}" if group_size > 1 else None for n in range(num_rows)],
        in_train=[n < num_shared for n in range(num_rows)],
    )  # fmt: skip


def write_run(folder, rows: RowInfo, *, loss: float, seed: int, base: bool = True, **overrides) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(make_metadata(**overrides)))
    rng = np.random.default_rng(seed)
    for step, level in ((0, 3.0), (10, loss))[0 if base else 1 :]:
        nll = [t * (level + rng.normal(0, 0.01)) for t in rows.targets]
        append_evaluation(folder / EVAL_RECORDS_FILE, evaluation_table(rows, step=step, split="test", nll=nll))
        append_evaluation(folder / EVAL_RECORDS_FILE, evaluation_table(rows, step=step, split="val", nll=nll))


def make_answers() -> tuple[list[TrialSpec], dict[str, SearchOutcome]]:
    winners = {
        "full": Candidate(method="full", lora_rank=None, rate_index=-16, rates_per_decade=4),
        "lora": Candidate(method="lora", lora_rank=8, rate_index=-12, rates_per_decade=4),
    }
    outcomes = {
        method: SearchOutcome(method=method, winner=winner, loss=2.0, edge=None, num_trials=25, num_steps=900)
        for method, winner in winners.items()
    }
    specs = [
        TrialSpec(phase="answer", candidate=winner, num_steps=10, seed=seed)
        for seed in SEEDS
        for winner in winners.values()
    ]
    return specs, outcomes


def test_the_answer_is_drawn_from_the_runs_and_names_what_it_is_conditional_on(tmp_path):
    specs, outcomes = make_answers()
    rows = make_rows(60, num_shared=2)
    for spec in specs:
        excess = 0.05 if spec.candidate.method == "lora" else 0.0
        write_run(run_folder(tmp_path, spec), rows, loss=2.0 + excess, seed=spec.seed + (excess > 0))
    outcomes["dora"] = SearchOutcome(
        method="dora", winner=None, loss=math.inf, edge=None, num_trials=17, num_steps=170
    )  # every trial failed
    state = StudyState(needed=(), outcomes=outcomes, answers=tuple(specs))
    (answer,) = judge_study(tmp_path, make_rule(), state)
    write_answer(tmp_path, make_rule(), state, [answer], {"beside": ["a line"]})
    assert answer.verdict == "worse"
    assert answer.excess.num_units == 58, "records that equal a training record are left out"
    content = json.loads((tmp_path / "answer.json").read_text())
    assert content["left_out_equal_to_train"] == 2
    assert content["rule_sha256"] == make_rule().sha256
    assert "full at 0.0001 of 25 trials; lora at 0.001, rank 8 of 25 trials" in content["sentence"]
    assert "tested with 3 fresh seeds of 10 steps" in content["sentence"]
    assert content["answers"][0]["excess"]["estimate"] == pytest.approx(0.05, abs=0.01)
    assert content["answers"][0]["exploratory"] is False
    assert content["searches"]["dora"]["problem"] == "dora: every trial failed"
    assert content["searches"]["dora"]["loss"] is None
    assert content["looks"] == {"taken": 1, "planned": 1, "level_of_each": 0.95}
    assert content["beside"] == ["a line"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"resolved__precision": "bf16"}, "ran in fp32 on 1 x some cpu, eager steps, "),
        ({"hardware__gpu": "H100"}, "in fp32 on 1 x H100, eager steps"),
        ({"execution": [{"path": "eager"}, {"path": "eager", "cuda_graphs": True}]}, "eager steps from CUDA graphs"),
        ({"resolved__ranks": 2}, "in fp32 on 2 x some cpu"),
    ],
)
def test_runs_that_did_not_compute_alike_are_refused(tmp_path, overrides, message):
    for name, changes in (("a", {}), ("b", overrides)):
        write_run(tmp_path / name, make_rows(20), loss=2.0, seed=1, **{"execution": [{"path": "eager"}], **changes})
    check_one_execution({"full": [tmp_path / "a"], "lora": [tmp_path / "a"]})
    with pytest.raises(AnswerRefusedError, match="not to be compared") as caught:
        check_one_execution({"full": [tmp_path / "a"], "lora": [tmp_path / "b"]})
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_margin_under_the_floor_of_the_test_records_is_refused():
    lora, full = simulate(0.0, noise=0.001, num_units=40)
    by_unit = np.random.default_rng(1).normal(0, 0.2, 40) * full.targets  # the same with any seed
    lora = dataclasses.replace(lora, nll=lora.nll + by_unit)
    assert judge("lora", lora, full, make_rule(), level=0.95).is_margin_under_floor
    assert not judge("lora", *simulate(0.0, noise=0.6), make_rule(), level=0.95).is_margin_under_floor


def test_records_of_one_group_are_one_unit(tmp_path):
    folders = [tmp_path / str(seed) for seed in SEEDS]
    for folder, seed in zip(folders, SEEDS, strict=True):
        write_run(folder, make_rows(150, group_size=5), loss=2.0, seed=seed)
    losses = read_test_losses(folders)
    assert losses.nll.shape == (3, 30)
    assert set(losses.targets) == {50}
    assert math.fsum(losses.base_nll[0]) == pytest.approx(3.0 * 1500, rel=0.01)


def test_too_few_test_records_other_records_or_none_are_refused_in_one_line(tmp_path):
    for name, rows in (("few", make_rows(19)), ("many", make_rows(40)), ("more", make_rows(41))):
        write_run(tmp_path / name, rows, loss=2.0, seed=1)
    write_run(tmp_path / "untested", make_rows(40), loss=2.0, seed=1, base=False)
    with pytest.raises(UserError, match="19 test records that can be told apart: expected 20 or more; raise --test"):
        read_test_losses([tmp_path / "few"])
    with pytest.raises(UserError, match="were not tested on the same records"):
        read_test_losses([tmp_path / "many", tmp_path / "more"])
    with pytest.raises(UserError, match="no test losses before and after training"):
        read_test_losses([tmp_path / "untested"])
