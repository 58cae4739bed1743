"""The verdict: its intervals by hand, no number where there may be none, and every answer it can give."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.fake_runs import write_eval_records
from helpers.fake_studies import TARGETS, MakeRun, judge_runs, make_study

from trainer.report.interval import paired_interval
from trainer.report.judge import parse_margin
from trainer.report.run_data import read_folder
from trainer.report.sentence import describe_numbers, to_answer
from trainer.tracking.eval_records import read_evaluations


def test_the_interval_of_the_verdict_is_that_of_the_records_paired_by_seed(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    pair = judge_runs(*reversed(runs)).primary

    def losses_of(mode: str, step: int) -> np.ndarray:
        paths = [run.eval_records_path for run in runs if run.mode == mode]
        frames = [read_evaluations(path).query(f"step == {step}").sort_values("id") for path in paths if path]
        return np.stack([frame["nll"] for frame in frames])

    targets, full, lora, base = (
        TARGETS.astype(float),
        losses_of("full", 30),
        losses_of("lora", 30),
        losses_of("full", 0),
    )
    assert pair.excess == paired_interval(lora - full, targets)
    assert pair.contrast == paired_interval(lora - full - 0.02 * (base - full), targets)
    answer = json.loads(json.dumps(to_answer(judge_runs(*runs))))  # for machines
    (comparison,) = answer["comparisons"]
    assert (answer["answer"], comparison["seeds"], comparison["lora"]["lr"]) == ("worse", [0, 1, 2], 0.005)
    assert comparison["excess"]["low"] == pair.excess.low > 0
    assert [number["label"] for number in answer["numbers"]] == ["Loss", "Time", "Memory"]


def with_records(**options: Any) -> dict[str, Any]:
    """Arguments of a study of three seeds whose LoRA is worse by 0.2, with these records."""
    return {"num_seeds": 3, "excess": 0.2, "record_options": options}


LORA, FULL = "LoRA (lr 0.005) is", "full (lr 0.0005)"
FEW = {"num_seeds": 3, "unit_sd": 0.02}
BY_SEEDS = {"num_seeds": 3, "excess": 0.05, "unit_sd": 0.01, "seed_sd": 0.06}
BY_RECORDS = {"num_seeds": 3, "excess": 0.01, "unit_sd": 0.6, "seed_sd": 0.0}
RECORDS = "on 120 validation blocks, seeds 0, 1 and 2, 30 steps"
CLUSTERS = {"groups": [f"meaning{i // 4}" for i in range(len(TARGETS))]}
BYTES = with_records(bytes_per_target=3)
SHARED = "records also stand in the training data, over 5%"


@pytest.mark.parametrize(
    ("study", "margin", "answer", "start", "said"),
    [
        ({**FEW, "excess": 0.2}, "2%", "worse", "LoRA (lr 0.005) is worse than full (lr 0.0005) by 0.2", RECORDS),
        ({**FEW, "excess": -0.2}, "2%", "better", "LoRA (lr 0.005) is better than full (lr 0.0005) by 0.", RECORDS),
        ({**FEW, "excess": 0.01}, "2%", "good enough", f"{LORA} good enough beside {FULL}: worse by 0.0", RECORDS),
        ({**FEW, "excess": 0.01}, "2%", "good enough", LORA, "within the margin of 2 % of what full gained (0.0"),
        (BY_SEEDS, "2%", "cannot tell", "Cannot tell yet whether LoRA (lr 0.005) is good enough", "seeds are needed"),
        (
            BY_RECORDS,
            "1e-4nats",
            "cannot tell",
            "Cannot",
            "validation blocks no number of seeds resolves less than ±0.",
        ),
        ({"num_seeds": 1, "excess": 0.2}, "2%", "worse", f"Of these two models, {LORA}", "says nothing of the methods"),
        ({"num_seeds": 2, "excess": 0.2}, "2%", "worse", "Provisionally, with 2 seeds, ", "seeds 0 and 1"),
        # targets of 3 bytes: 0.5 nats a token are 0.5 / (3 ln 2) = 0.24 bits per byte
        (BYTES, "0.5nats", "good enough", LORA, "within the margin of 0.5 nats per token"),
        (BYTES, "0.1nats", "worse", LORA, "more than the margin of 0.1 nats per token"),
        (BYTES, "0.24bpb", "good enough", LORA, "within the margin of 0.24 bits per byte"),
        (BYTES, "0.048bpb", "worse", LORA, "more than the margin of 0.048 bits per byte"),
        (with_records(bytes_per_target=0), "0.24bpb", "worse", LORA, "the bytes of these records are not known"),
        (with_records(**CLUSTERS), "2%", "worse", LORA, "on 30 clusters of validation records"),
        (with_records(num_in_train=4), "2%", "worse", LORA, "on 116 validation blocks"),
        (with_records(num_in_train=4), "2%", "worse", LORA, "4 records that equal a training record are left out"),
        (with_records(num_in_train=6), "2%", "worse", LORA, "6 records that equal a training record are left out"),
        (with_records(num_in_train=7), "2%", "not ranked", "LoRA", f"not ranked: 7 of 120 validation {SHARED}"),
    ],
)
def test_the_sentence_and_what_follows_it_say_the_answer_and_what_it_rests_on(
    make_run: MakeRun, study: dict[str, Any], margin: str, answer: str, start: str, said: str
) -> None:
    verdict = judge_runs(*make_study(make_run, **study), margin=parse_margin(margin))
    assert verdict.primary.answer == answer
    assert verdict.sentence.startswith(start)
    assert said in "\n".join([verdict.sentence, *verdict.details])
    if answer == "not ranked":
        assert verdict.headlines[0].value == "-"
    else:
        interval = verdict.primary.excess
        assert f"nats per token [{interval.low:+.4f}, {interval.high:+.4f}]" in verdict.sentence
        assert verdict.sentence.endswith("; one rate each was tried.")


def test_blocks_of_one_source_are_said_to_be_taken_for_independent(make_run: MakeRun) -> None:
    verdict = judge_runs(*make_study(make_run, num_seeds=3, excess=0.2))
    assert not any("may stand in several blocks" in line for line in verdict.details)
    for run in verdict.primary.full.runs:
        run.metadata["data"]["split_by"] = "mr"
    lines = describe_numbers(verdict.primary)
    assert "records of one mr may stand in several blocks, which the interval takes for independent" in lines[-1]


def test_test_records_are_judged_where_all_runs_have_them(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    for run in runs:
        folder = Path(run.source)
        loss = 3.0 if run.mode == "full" else 2.5
        write_eval_records(folder, {30: [loss] * len(TARGETS)}, targets=TARGETS, split="test")
    verdict = judge_runs(*(read_folder(Path(run.source)) for run in runs))
    assert "LoRA (lr 0.005) is better than full (lr 0.0005) by 0.5000" in verdict.sentence
    assert "on 120 test blocks" in verdict.sentence
    assert any("the base's losses of these records are not there" in line for line in verdict.details)


def test_other_records_or_damaged_ones_give_no_interval_of_records(make_run: MakeRun) -> None:
    full, lora = make_study(make_run, num_seeds=1, excess=0.2)
    ids = [f"other{i}" for i in range(len(TARGETS))]
    shutil.rmtree(Path(lora.source) / "eval_records")
    write_eval_records(Path(lora.source), {30: [2.0] * len(TARGETS)}, targets=TARGETS, ids=ids)
    verdict = judge_runs(full, read_folder(Path(lora.source)))
    reason = "other evaluation records (240 are not in both runs), and there is one seed"
    assert f"without an interval ({reason})" in verdict.sentence
    (Path(lora.source) / "eval_records/step-000030-val.parquet").write_bytes(b"PAR1 torn")
    verdict = judge_runs(full, read_folder(Path(lora.source)))
    assert "step-000030-val.parquet: not whole records of an evaluation" in verdict.sentence


def test_without_records_the_interval_is_over_seeds_and_says_so(make_run: MakeRun) -> None:
    runs = [
        make_run(mode, [4.0, loss], seed=seed)
        for mode, values in (("full", (2.00, 2.02, 2.04)), ("lora", (2.51, 2.53, 2.56)))
        for seed, loss in enumerate(values)
    ]
    verdict = judge_runs(*runs)
    # differences 0.51, 0.51, 0.52: mean 0.5133, sd 0.00577, t(2) = 4.303
    assert "is worse than full (lr 0.0005) by 0.5133 nats per token [+0.4990, +0.5277], on this" in verdict.sentence
    assert "on this validation set alone" in verdict.sentence
    assert any("an interval over seeds alone holds for this validation set only" in line for line in verdict.details)


def test_the_same_seed_twice_is_not_a_second_sample(make_run: MakeRun) -> None:
    fulls = [make_run("full", [4.0, 2.0], run_id=f"full{n}") for n in range(2)]
    loras = [make_run("lora", [4.0, 2.5], run_id=f"lora{n}") for n in range(2)]
    verdict = judge_runs(*fulls, *loras)
    assert len(verdict.primary.pairs) == 1
    assert verdict.sentence.startswith("Cannot tell whether")


# --- what may not be ranked ---


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"model__fingerprint": "ff"}, "other base weights (ff against e1e1e1e1e1e1e1e1)"),
        ({"model__name": "gpt2"}, "other base model (gpt2 against demo-base)"),
        ({"settings__model__init": "random"}, "other init (random against pretrained)"),
        ({"resolved__global_batch": 16}, "other batch (16 against 8)"),
        ({"settings__data__shuffle": False}, "other data order (as in the data against seed 42)"),
        ({"settings__data__packing": True}, "other data order (seed 42, packed against seed 42)"),
        ({"seed": 43}, "other data order (seeds 43 against 42)"),
        ({"losses": [4.0, 3.0, 2.5]}, "other tokens seen (122,880 against 61,440)"),
    ],
)
def test_runs_that_started_or_saw_something_else_are_not_ranked(
    make_run: MakeRun, overrides: dict[str, Any], reason: str
) -> None:
    verdict = judge_runs(make_run("full", [4.0, 2.0]), make_run("lora", **{"losses": [4.0, 2.5], **overrides}))
    assert verdict.sentence.startswith("LoRA (lr 0.005) and full (lr 0.0005) are not ranked: ")
    assert reason in verdict.sentence
    assert to_answer(verdict)["comparisons"][0]["excess"] is None
    assert "2.5" not in verdict.sentence


def test_base_weights_that_a_run_does_not_tell_are_no_agreement(make_run: MakeRun) -> None:
    full, lora = make_run("full", [4.0, 2.0]), make_run("lora", [4.0, 2.5])
    model = {**lora.metadata["model"], "fingerprint": None}
    verdict = judge_runs(full, dataclasses.replace(lora, metadata={**lora.metadata, "model": model}))
    assert "are not ranked: base weights unknown" in verdict.sentence


def test_each_lora_setting_is_compared_with_the_best_full_one_it_may_be_ranked_with(make_run: MakeRun) -> None:
    longer = make_run("full", [4.0, 3.0, 1.5], resolved__lr=1e-4)
    verdict = judge_runs(longer, make_run("full", [4.0, 2.0]), make_run("lora", [4.0, 2.5]))
    assert verdict.primary.full.lr == 5e-4
    assert verdict.primary.blockers == ()


def test_the_best_of_several_settings_is_named_and_is_exploratory(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    runs += [make_run("lora", [4.0, 3.5], seed=seed, resolved__lr=1e-3) for seed in range(3)]
    verdict = judge_runs(*runs)
    assert verdict.sentence.startswith("The best of 2 LoRA settings (lr 0.005) is worse than full (lr 0.0005)")
    assert verdict.sentence.endswith(
        "; exploratory, for the settings were chosen on these records; one rate of full was tried; LoRA's best rate is "
        "the largest of 2, so a better one may lie beyond."
    )
    assert [comparison.lora.lr for comparison in verdict.comparisons] == [0.005, 0.001]


def test_the_verdict_gives_no_number_for_incomparable_runs(make_run: MakeRun) -> None:
    verdict = judge_runs(make_run("full", [4.0, 2.0]), make_run("lora", [5.0, 2.5], data__fingerprint="other"))
    assert verdict.sentence == (
        "LoRA and full are not comparable with one another (other data): "
        "full improved on its base (4.0000 -> 2.0000 at best); "
        "LoRA improved on its base (5.0000 -> 2.5000 at best)."
    )
    assert (verdict.comparisons, verdict.headlines) == ((), ())


def test_the_verdict_says_that_only_one_mode_was_run(make_run: MakeRun) -> None:
    assert judge_runs(make_run("lora", [4.0, 2.5])).sentence == (
        "LoRA improved on its base (4.0000 -> 2.5000 at best); there is no finished full run to compare with."
    )
    assert "did not improve on its base" in judge_runs(make_run("lora", [4.0, 4.5])).sentence


def test_two_data_sets_are_two_verdicts(make_run: MakeRun) -> None:
    runs = [
        make_run(mode, losses, **other)
        for mode, losses in (("full", [4.0, 2.0]), ("lora", [4.0, 2.5]))
        for other in ({}, {"data__source": "e2e.csv", "data__fingerprint": "e2e", "run_id": f"{mode}e2e"})
    ]
    verdict = judge_runs(*runs, with_card=True)
    assert "LoRA (acled-demo, lr 0.005) is as good as full (acled-demo, lr 0.0005)" in verdict.sentence
    assert "LoRA (e2e.csv, lr 0.005) is as good as full (e2e.csv, lr 0.0005)" in verdict.sentence
    assert [(pair.full.label, pair.lora.label) for pair in verdict.comparisons] == [
        ("full (acled-demo)", "LoRA (acled-demo)"),
        ("full (e2e.csv)", "LoRA (e2e.csv)"),
    ], "a number across the gap"


def test_unfinished_runs_are_left_out_of_the_verdict(make_run: MakeRun) -> None:
    going = make_run("lora", [4.0, 3.0, 2.5], how={"finished": False})
    assert judge_runs(going).sentence == "No run is finished and evaluated, so there is nothing to compare yet."
    assert judge_runs(make_run("full", [4.0, 2.0]), going).sentence.endswith(
        " 1 run without an end or an evaluation not counted."
    )


def test_the_verdict_compares_with_the_reference_only_where_comparable(make_run: MakeRun) -> None:
    full = make_run("full", [4.0, 1.2, 1.0, 0.93], like_card=True)
    verdict = judge_runs(full, make_run("lora", [4.0, 1.3, 1.1, 1.0], like_card=True), with_card=True)
    assert "full ended 0.0114 below the card's 0.9414 at epoch 3." in verdict.details
    assert "LoRA ended 0.0586 above the card's 0.9414 at epoch 3." in verdict.details
    assert not any("card" in line for line in judge_runs(full).details)
