"""What LoRA cost beside full, withheld where it was not measured under one condition, and the margin."""

from pathlib import Path
from typing import Any

import pytest
from helpers.fake_runs import make_metadata
from helpers.fake_studies import GPU, MakeRun, judge_runs, make_study

from trainer.config.errors import UserError
from trainer.report.comparable import group_by_seed
from trainer.report.judge import CostRatio, Margin, StudyContext, parse_margin
from trainer.report.run_data import read_folder
from trainer.report.sentence import build_verdict


def test_time_is_divided_only_where_it_was_taken_in_alternation(make_run: MakeRun) -> None:
    """Of the very same runs 0.98 and 1.14 were said by their own clocks."""
    full = make_run("full", [4.0, 2.0], how={"wall_seconds": 200.0, "peak_memory_bytes": 1000}, **GPU)
    lora = make_run("lora", [4.0, 2.5], how={"wall_seconds": 8.0, "peak_memory_bytes": 430}, **GPU)
    own_clocks = judge_runs(full, lora)
    assert (own_clocks.primary.time.ratio, own_clocks.primary.memory.ratio) == (None, 0.43)
    assert own_clocks.primary.parameters == 0.0095  # 19,000 / 2,000,000
    time = own_clocks.headlines[1]
    assert (time.value, time.note) == (
        "-",
        "not compared: not timed in alternation on one machine (8.0 s against 3.3 min)",
    )
    step_time = CostRatio(ratio=0.5, reason="", full=0.8, lora=0.4, is_of_a_step=True)
    study = StudyContext(choice="", lines=(), rate_curves=(), views=(), step_time=step_time, rule={}, facts={})
    timed = build_verdict(group_by_seed([full, lora]), False, Margin(), study).headlines[1]
    assert (timed.value, timed.note) == ("0.50x", "0.4 s a step against 0.8 s, in alternation")


def test_forgetting_and_equal_budgets_are_said_beside_the_answer(make_run: MakeRun) -> None:
    """LoRA does two thirds of full's work a step and ends worse by 0.1: at equal FLOPs it is ahead."""
    runs = [
        make_run(mode, losses, seed=seed, model__step_flops=flops, how={"retained": retained})
        for mode, losses, flops, retained in (
            ("full", [4.0, 3.0, 2.5, 2.0], 3_000, (1.0, 1.5)),
            ("lora", [4.0, 3.1, 2.6, 2.1], 1_500, (1.0, 1.1)),
        )
        for seed in (0, 1)
    ]
    verdict = judge_runs(*runs)
    assert any("LoRA is ahead at equal FLOPs (1.35e+05): LoRA 2.1000, full 2." in line for line in verdict.details)
    front = next(line for line in verdict.details if line.startswith("Gain for forgetting"))
    assert "full (lr 0.0005) 2.0000 for +0.5000; LoRA (lr 0.005) 1.9000 for +0.1000" in front
    assert any("at equal forgetting (at most +0.1000) LoRA gains 1.9000, no full setting" in x for x in verdict.details)


def test_runs_whose_counts_say_that_records_were_trained_on_are_refused(make_run: MakeRun) -> None:
    counted = [make_run(mode, [4.0, 2.0], data__equal_to_train={"val": 90}) for mode in ("full", "lora")]
    assert "records also stand in the training data" in judge_runs(*counted).sentence


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_records_of_one_meaning_alone_give_no_interval_over_records(make_run: MakeRun, num_seeds: int) -> None:
    """A single record, block or group: three seeds still have an interval over seeds."""
    options = {"groups": ["one meaning"] * 120}
    verdict = judge_runs(*make_study(make_run, num_seeds=num_seeds, excess=0.2, record_options=options))
    assert "the validation records are one, or share one meaning" in verdict.primary.no_losses
    assert (verdict.primary.excess is None) == (num_seeds == 1)


RESUMED = {"settings": make_metadata("lora")["settings"], "changed": {}}


@pytest.mark.parametrize(
    ("overrides", "said", "is_withheld"),
    [
        ({"hardware__gpu": "H100"}, "time and memory not compared (other hardware)", True),
        ({"resolved__ranks": 2}, "time and memory not compared (other number of ranks)", True),
        # the recorded peak is the last process's: 1.23x was said where 0.52x was true
        ({"resumed": RESUMED}, "time and memory not compared (lora-s42 was resumed and measured in parts)", True),
        ({"resolved__ds_config": "zero2"}, "measured with different settings: ZeRO file zero2 against zero0", False),
        ({"resolved__threads_per_rank": 1}, "different settings: threads per rank 1 against 2", False),
    ],
)
def test_costs_that_were_not_measured_alike_are_withheld_and_what_they_depend_on_is_said(
    make_run: MakeRun, overrides: dict[str, Any], said: str, is_withheld: bool
) -> None:
    verdict = judge_runs(make_run("full"), make_run("lora", **overrides))
    assert any(said in line for line in verdict.details)
    assert verdict.primary.time.ratio is None
    assert (verdict.primary.memory.ratio is None) == is_withheld


def test_a_run_killed_after_its_last_evaluation_counts_and_has_no_cost(make_run: MakeRun) -> None:
    full, lora = make_study(make_run, num_seeds=1, excess=0.2)
    path = Path(lora.source) / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"finished"' not in line))
    ended = read_folder(Path(lora.source))
    assert ended.is_finished
    assert "evaluated to its end but not closed: its time and memory are unknown" in ended.notes
    verdict = judge_runs(full, ended)
    assert verdict.primary.answer == "worse"
    assert verdict.primary.memory.reason == "not measured"


# --- the margin ---


def test_a_margin_is_a_number_with_its_unit() -> None:
    assert parse_margin("2%") == Margin()
    assert parse_margin("1e-2nats") == Margin(kind="nats", value=0.01)
    assert parse_margin(".005 bpb") == Margin(kind="bits_per_byte", value=0.005)
    for text in ("0%", "-1nats", "100%", "a", "%", "nannats", "0.01", "2"):
        with pytest.raises(UserError, match=r"--margin .*: expected a number above 0 and its unit"):
            parse_margin(text)
