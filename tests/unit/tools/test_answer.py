"""The answer of a study, drawn from made-up runs of its fresh seeds: what it says, writes and refuses."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_runs import make_metadata, make_run_folder, write_eval_records
from helpers.study_rules import make_candidate
from helpers.study_rules import make_rule as make_study_rule

from trainer.config.errors import UserError
from trainer.report.judge import Margin
from trainer.report.page import write_report
from trainer.tools.study.answer import compare_study, describe_power, judge, read_groups, read_search_losses
from trainer.tools.study.rule import write_rule
from trainer.tools.study.search import TrialSpec, study_state
from trainer.tools.study.trials import Timing, run_folder

SEEDS = (101, 102, 103)
TARGETS = np.random.default_rng(1).integers(5, 60, 60).tolist()
WINNERS = {"full": make_candidate("full", -16), "lora": make_candidate("lora", -12)}
ANSWERS = [TrialSpec(phase="answer", candidate=w, num_steps=30, seed=seed) for seed in SEEDS for w in WINNERS.values()]
make_rule = partial(make_study_rule, 30, rungs=(30,), margin=Margin(kind="nats", value=0.02))


def test_the_answer_is_drawn_from_the_runs_and_names_the_smallest_rank_that_is_good_enough(tmp_path):
    """All that one study writes. Rank 4 has an excess of a fourth of the margin, and is shown to be within it after
    Holm too; what the answer is conditional on is in its sentence."""
    rule = make_study_rule(30, rungs=(6, 30), lora_ranks=(1, 4, 16), margin=Margin(kind="nats", value=0.02))
    write_rule(tmp_path, rule, working_dir=".")
    excesses, results = {None: 0.0, 1: 0.1, 4: 0.005, 16: 0.004}, dict[str, float]()

    def write(spec: TrialSpec) -> None:
        rank, is_short = spec.candidate.lora_rank, spec.num_steps < 30
        is_answer = spec.phase == "answer"
        settings = {"settings__lora__rank": rank or 8, "settings__lora__adapter": "dora" if rank else "lora"}
        write_run(
            tmp_path,
            spec,
            excess=excesses[rank] - 0.05 * (is_short and rank is not None),
            splits=("val", "test") if is_answer else ("val",),
            num_seen=2 * is_answer,
            data__test={"units": 40},
            **settings,
        )

    while (state := study_state(rule, results)).needed:
        for spec in state.needed:
            best = -16 if spec.candidate.lora_rank is None else -12
            results[spec.name] = 2 + excesses[spec.candidate.lora_rank] + abs(spec.candidate.rate_index - best)
            write(spec)
    seconds = {"full": [[0.4], [0.4]], "lora": [[0.22], [0.22]]}
    timing = Timing(step_seconds=seconds, machine="a machine", peak_memory_bytes={"full": 4, "lora": 3})
    comparison = compare_study(tmp_path, rule, state, results, timing)
    details, sentence = "\n".join(comparison.verdict.details), comparison.verdict.sentence
    assert sentence.startswith("LoRA (dora, rank 16, lr 0.001) is good enough")
    assert sentence.endswith(
        "on 58 test blocks, seeds 101, 102 and 103, 30 steps; rates chosen by validation loss (20 trials of full, 20 "
        "of LoRA; choosing again would move the loss by about 0), fresh seeds."
    )
    assert re.search(r"rank 1 \+0\.09.* \(p = 1\), rank 4 \+0\.00.* \(p = 0\.00\d+\), rank 16 \+0\.00", details)
    assert (
        "; the smallest rank that is good enough is 4 (one-sided against the margin, after Holm over 3 ranks)"
        in details
    )
    assert "LoRA's excess by length of training, on validation records, each at its own best rates: 6 steps " in details
    assert "They show that the excess grows from 6 to 30 steps, and that rank 16 is better than rank 1." in details
    assert "LoRA's time of a step: 0.55x full's (0.55 to 0.55 without one round" in details
    assert "2 records that are not new (see the plan) are left out" in details
    losses, num_records = read_search_losses(tmp_path, list(state.outcomes.values())[:2])
    assert (losses.split, losses.lora.shape, num_records) == ("val", (3, 60), 40)
    assert describe_power(rule, num_records, losses).startswith(
        "3 seeds and 40 test records can show about 0.0052 nats per token (by the search's validation records), or "
    )
    write_report(comparison, tmp_path)
    page, answer = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "answer.json").read_text())
    assert all(f"<figcaption>LoRA&#39;s excess by {x}</figcaption>" in page for x in ("LoRA rank", "steps of a run"))
    assert (answer["sentence"], answer["answer"]) == (sentence, "good enough")
    assert answer["comparisons"][0]["excess"]["estimate"] == pytest.approx(0.004, abs=0.01)
    assert answer["study"]["rule_sha256"] == rule.sha256
    assert answer["study"]["searches"]["lora-r16"]["problem"] is None
    assert answer["smallest_good_enough_rank"] == 4
    assert [rank["is_good_enough"] for rank in answer["lora_ranks"]] == [False, True, True]
    assert len(comparison.verdict.study.rate_curves[0].losses) > 3


def test_what_a_study_can_show_before_its_search_is_by_stated_assumptions():
    """The issue's example: 3 seeds and 136 records show 0.03 nats or 6 points, and 2 points need 900 records."""
    line = describe_power(make_rule(margin=Margin()), 136)
    assert (
        "3 seeds and 136 test records can show about 0.028 nats per token (assumed: differences vary by 0.16 na" in line
    )
    assert line.endswith(
        "or 6 points of a score (assumed: 1 record of 8 is right with one method only); a margin of 0.02 "
        "nats needs about 200 records"
    )
    assert describe_power(make_rule(margin=Margin(kind="nats", value=0.1)), 136).endswith("0.1 nats is within reach")
    line = describe_power(make_rule(margin=Margin(kind="bits_per_byte", value=0.005), answer_seeds=(9,)), 5000)
    assert line.startswith("1 seed and 5,000 test records")
    assert "; a token has 4 bytes), or 1 point of a score (" in line
    assert line.endswith("a margin of 0.014 nats is within reach")


def write_run(
    folder: Path,
    spec: TrialSpec,
    *,
    excess: float = 0.05,
    noise: float = 0.01,
    by_unit: float = 0.0,
    splits: tuple[str, ...] = ("val", "test"),
    targets: list[int] = TARGETS,
    num_seen: int = 0,
    **overrides: Any,
) -> None:
    """A run of one epoch, base 3 nats and full 2."""
    method = spec.candidate.method
    mode = "full" if method == "full" else "lora"
    metadata = make_metadata(mode, seed=spec.seed, resolved__lr=spec.candidate.lr, name=spec.name, **overrides)
    metadata["resolved"]["total_steps"] = 30
    rng = np.random.default_rng([spec.seed, *map(ord, method)])
    loss = 2 + excess * (mode == "lora")
    run = make_run_folder(run_folder(folder, spec), metadata=metadata, losses={0: 3.0, 1: loss}, every=500, epochs=1)
    shared = by_unit * np.random.default_rng(2).standard_normal(len(targets)) * (mode == "lora")
    for split in splits:
        trained = loss + shared + noise * rng.standard_normal(len(targets))
        if split == "val":  # the run's row is their mean
            trained += loss - np.average(trained, weights=targets)
        losses = {0: [3.0] * len(targets), 30: trained}
        write_eval_records(run, losses, targets=targets, split=split, num_seen=num_seen)


@pytest.mark.parametrize(
    ("options", "margin", "answer"),
    [
        ({"excess": -0.05}, Margin(), "better"),
        ({"excess": 0.01}, Margin(kind="nats", value=0.02), "good enough"),
        ({"excess": 0.03}, Margin(kind="bits_per_byte", value=0.005), "worse"),
        ({"excess": 0.021, "noise": 0.005}, Margin(kind="nats", value=0.02), "cannot tell"),  # worse, by the margin
        ({"by_unit": 0.2, "excess": 0.0, "noise": 0.005}, Margin(kind="nats", value=0.02), "cannot tell"),
    ],
)
def test_the_answer_is_one_of_four_by_the_rules_margin(tmp_path, options, margin, answer):
    """The last: what differs by record and is the same with any seed; no number of seeds tells less than its error."""
    for spec in ANSWERS:
        write_run(tmp_path, spec, **options)
    pair = judge(read_groups(tmp_path, ANSWERS), make_rule(margin=margin))
    assert pair.answer == answer
    assert pair.is_margin_under_floor == ("by_unit" in options)


@pytest.mark.parametrize(
    ("options", "last_options", "message"),
    [
        ({"targets": TARGETS[:19]}, {}, "19 test records that can be told apart: expected 20 or more; raise --test"),
        ({}, {"targets": TARGETS[:59]}, "refused to rank: other evaluation records"),
        ({}, {"splits": ("val",)}, "refused to rank: not every run has losses of test records"),
        (
            {"data__num_seen": {"test": 4}, "data__test": {"records": 60}},
            {},
            "refused to rank: 4 of 60 test records are not new, over 5%",
        ),
        ({}, {"resolved__precision": "bf16"}, "in bf16 on 1 x some cpu, execution eager.*: these cannot be compared"),
        ({}, {"resolved__ranks": 2}, "in fp32 on 2 x some cpu.*: these cannot be compared"),
    ],
)
def test_too_few_test_records_and_runs_that_are_not_alike_are_refused_in_one_line(
    tmp_path, options, last_options, message
):
    for spec in ANSWERS:
        write_run(tmp_path, spec, **{**options, **(last_options if spec == ANSWERS[-1] else {})})
    with pytest.raises(UserError, match=message) as caught:
        judge(read_groups(tmp_path, ANSWERS), make_rule())
    assert caught.value.exit_code == (2 if "expected" in message else 3)
