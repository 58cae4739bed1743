"""What may be held against what, and the verdict: its interval, its words, no number where there may be none."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.fake_runs import write_eval_records
from helpers.fake_studies import TARGETS, MakeRun, judge_runs, make_study

from trainer.config.errors import UserError
from trainer.report.answer_file import to_answer
from trainer.report.comparable import group_by_seed
from trainer.report.interval import paired_interval
from trainer.report.judge import Margin, parse_margin
from trainer.report.run_data import read_folder
from trainer.report.tables import build_epoch_table
from trainer.tracking.eval_records import read_evaluations
from trainer.tracking.records import EventRecord, to_line

GPU = {"resolved__device": "cuda", "hardware__gpu": "H100", "hardware__gpus": 1}
OTHER_DATA = {"data__source": "e2e.csv", "data__fingerprint": "ff"}


# --- the answer ---


def test_the_interval_of_the_verdict_is_that_of_the_records_paired_by_seed(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    pair = judge_runs(*reversed(runs)).primary

    def losses_of(mode: str, step: int) -> np.ndarray:
        paths = [run.eval_records_path for run in runs if run.mode == mode]
        frames = [read_evaluations(path).query(f"step == {step}").sort_values("id") for path in paths if path]
        return np.stack([frame["nll"] for frame in frames])

    full, lora, base = losses_of("full", 30), losses_of("lora", 30), losses_of("full", 0)
    assert pair.excess == paired_interval(lora - full, TARGETS.astype(float))
    assert pair.contrast == paired_interval(lora - full - 0.02 * (base - full), TARGETS.astype(float))
    answer = json.loads(json.dumps(to_answer(judge_runs(*runs))))  # for machines
    (comparison,) = answer["comparisons"]
    assert (answer["answer"], comparison["seeds"], comparison["lora"]["lr"]) == ("worse", [0, 1, 2], 0.005)
    assert comparison["excess"]["low"] == pair.excess.low > 0
    table = pd.json_normalize([answer, to_answer(judge_runs(make_run("full"), make_run("lora", seed=7)))])
    columns = ["model.name", "data.source", "scope", "num_seeds", "records", "answer", "base_loss", "lora.loss"]
    columns += ["model.fingerprint", "data.fingerprint", "effective_records", "margin.value", "excess.high"]
    assert table[columns].notna().sum(axis=1).tolist() == [13, 8], "one row a study, nothing where it is not ranked"
    assert table["schema_version"].unique().tolist() == [3]


def worse(**options: Any) -> dict[str, Any]:
    return {"num_seeds": 3, "excess": 0.2, **options}


FULL = "full (lr 0.0005)"
FEW = {"num_seeds": 3, "unit_sd": 0.02}
BY_SEEDS = {"num_seeds": 3, "excess": 0.05, "unit_sd": 0.01, "seed_sd": 0.06}
BY_RECORDS = {"num_seeds": 3, "excess": 0.01, "unit_sd": 0.6, "seed_sd": 0.0}
BYTES = worse(bytes_per_target=3)  # 0.5 nats a token are 0.5 / (3 ln 2) = 0.24 bits per byte


@pytest.mark.parametrize(
    ("study", "margin", "answer", "said"),
    [
        ({**FEW, "excess": 0.2}, "2%", "worse", "on 120 validation blocks, seeds 0, 1 and 2, 30 steps"),
        ({**FEW, "excess": -0.2}, "2%", "better", f"is better than {FULL} by 0."),
        ({**FEW, "excess": 0.01}, "2%", "good enough", "within the margin of 2 % of what full gained (0.0"),
        (BY_SEEDS, "2%", "cannot tell", "seeds are needed"),
        (BY_RECORDS, "1e-4nats", "cannot tell", "validation blocks no number of seeds resolves less than ±0."),
        ({**BY_SEEDS, "excess": 0.043, "seed_sd": 0.01, "unit_sd": 0.0}, "2%", "cannot tell", "more than 64 seeds are"),
        ({"num_seeds": 2, "excess": 0.2}, "2%", "worse", "Provisionally, with 2 seeds, LoRA"),
        (BYTES, "0.24bpb", "good enough", "within the margin of 0.24 bits per byte"),
        (BYTES, "0.048bpb", "worse", "more than the margin of 0.048 bits per byte"),
        (worse(bytes_per_target=0), "0.24bpb", "worse", "the bytes of these records are not known"),
        (worse(groups=[f"meaning{i // 4}" for i in range(120)]), "2%", "worse", "on 30 clusters of validation records"),
        (worse(num_seen=6), "2%", "worse", "6 records that are not new (see the plan) are left out"),
    ],
)
def test_the_sentence_and_what_follows_it_say_the_answer_and_what_it_rests_on(
    make_run: MakeRun, study: dict[str, Any], margin: str, answer: str, said: str
) -> None:
    verdict = judge_runs(*make_study(make_run, **study), margin=parse_margin(margin))
    assert verdict.primary.answer == answer
    assert said in "\n".join([verdict.sentence, *verdict.details])
    assert verdict.next_step
    interval = verdict.primary.excess
    assert f"nats per token [{interval.low:+.4f}, {interval.high:+.4f}]" in verdict.sentence
    assert verdict.sentence.endswith("; one rate of full was tried; one rate of LoRA was tried.")


def test_a_margin_is_a_number_with_its_unit() -> None:
    assert parse_margin("2%") == Margin()
    assert parse_margin("1e-2nats") == Margin(kind="nats", value=0.01)
    assert parse_margin(".005 bpb") == Margin(kind="bits_per_byte", value=0.005)
    assert (parse_margin(None), parse_margin(None, "score:f1").value) == (Margin(), 2)
    for text in ("0%", "-1nats", "100%", "0.01", "2pt"):
        with pytest.raises(UserError, match=r"--margin .*: expected a number above 0 and its unit"):
            parse_margin(text)
    with pytest.raises(UserError, match=r"--margin .*, such as 2pt of score:exact"):
        parse_margin("2%", "score:exact")


def test_test_records_are_judged_where_all_runs_have_them(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    for run in runs:
        losses = [3.0 if run.mode == "full" else 2.5] * len(TARGETS)
        write_eval_records(Path(run.source), {30: losses}, targets=TARGETS, split="test")
    verdict = judge_runs(*(read_folder(Path(run.source)) for run in runs))
    assert re.search(r"better than full \(lr 0.0005\) by 0.5000 .* on 120 test blocks", verdict.sentence)
    assert any("the base's losses of these records are not there" in line for line in verdict.details)


def test_other_records_edited_ones_or_those_of_one_meaning_give_no_interval(make_run: MakeRun) -> None:
    full, lora = make_study(make_run, num_seeds=1, excess=0.2)
    folder, name = Path(lora.source), "eval_records/step-000030-val.parquet"
    assert lora.final_eval is not None
    losses, ids = {30: [lora.final_eval["loss"]] * len(TARGETS)}, [f"other{i}" for i in range(len(TARGETS))]
    write_eval_records(folder, losses, targets=TARGETS, ids=ids)
    said = judge_runs(full, read_folder(folder)).sentence
    assert "without an interval (other evaluation records (240 are not in both runs))" in said
    shutil.copy(Path(full.source) / name, folder / name)
    reason = "the validation records of lora-s0 at step 30 have loss 2.0043, its row in metrics.jsonl says 2.2129"
    assert f"are not ranked: {reason}." in judge_runs(full, read_folder(folder)).sentence
    shutil.rmtree(folder / "eval_records")
    assert "lora-s0 left no losses of single records" in judge_runs(full, read_folder(folder)).sentence
    pair = judge_runs(*make_study(make_run, num_seeds=3, excess=0.2, groups=["one meaning"] * 120)).primary
    assert (pair.answer, pair.no_losses) == ("cannot tell", "the validation records are one, or share one meaning")


# --- what may not be ranked ---


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"model__fingerprint": "ff"}, "other base weights (ff against e1e1e1e1e1e1e1e1)"),
        ({"resolved__precision": "bf16"}, "other precision (bf16 against fp32)"),
        ({"settings__train__schedule": "constant"}, "other schedule (constant to 0.0 against "),
        ({"resolved__warmup_steps": 9}, "other warm-up (9 steps against 0 steps)"),
        ({"settings__train__weight_decay": 0.3}, "other weight decay (0.3 against 0.0)"),
        ({"settings__train__optim": "adamw8bit"}, "other optimizer (adamw8bit 0"),
        ({"resolved__global_batch": 16}, "other batch (16 against 8)"),
        ({"settings__data__packing": True}, "other packing (several examples a row against one example a row)"),
        ({"settings__train__early_stop": 3}, "other early stop (after 3 evaluations, every epoch against none)"),
        ({"data__test": {"records": 9}}, "other judged weights (last against best of 1 evaluated)"),
        ({"seed": 43}, "other data order (seeds 43 against 42)"),
        ({"losses": [4.0, 3.0, 2.5]}, "other tokens seen (122,880 against 61,440)"),
        ({"data__num_seen": {"val": 90}}, "90 of 100 validation records are not new"),
    ],
)
def test_runs_that_started_or_saw_something_else_are_not_ranked(
    make_run: MakeRun, overrides: dict[str, Any], reason: str
) -> None:
    verdict = judge_runs(make_run("full", [4.0, 2.0]), make_run("lora", **{"losses": [4.0, 2.5], **overrides}))
    assert verdict.sentence.startswith("LoRA (rank 8, lr 0.005) and full (lr 0.0005) are not ranked: ")
    assert reason in verdict.sentence
    assert (to_answer(verdict)["comparisons"][0]["excess"], "2.5" in verdict.sentence) == (None, False)
    assert ("records that training does not see" in verdict.next_step) == ("data__num_seen" in overrides)


def test_a_seed_that_diverged_or_has_no_partner_is_in_the_sentence(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.01, unit_sd=0.02)
    more = [make_run("full", [4.0, 2.0], seed=seed) for seed in (7, 8, 8)]
    verdict = judge_runs(*runs, *more)
    said = "; of full without a partner: seeds 7, 8; runs of full left out, as another has their seed: 1; one rate"
    assert said in verdict.sentence
    table = build_epoch_table(group_by_seed([*runs, *more]), False, verdict.primary)
    assert table.headings[2:5] == ["full, n = 3", "LoRA, n = 3", "LoRA − full"], "paired ones alone"
    long = make_run("full", [4.0, 2.0])
    long.metadata["resolved"]["steps_per_epoch"], long.evals["epoch"][1] = 117_187, 4_000 / 117_187
    table = build_epoch_table(group_by_seed([long]), False, None)
    assert [tuple(row[:3]) for row in table.rows] == [("0", "0", "4.0000"), ("0.0341", "4,000", "2.0000")]
    path = Path(make_run("lora", [4.0, 3.0, 2.0], seed=9, how={"finished": False}).source) / "metrics.jsonl"
    event = EventRecord(event="not_finite", step=40, message="loss is nan", time=1.0)
    path.write_text(path.read_text() + to_line(event) + "\n")
    diverged = judge_runs(*runs, read_folder(path.parent))
    assert diverged.primary.answer == "not ranked"
    said = "LoRA (rank 8, lr 0.005) diverged in 1 of 4 seeds; run all of them at a lower rate, such as 0.0028"
    assert said in diverged.sentence
    assert "Not counted" not in diverged.sentence, "it is said once"
    lora_alone = judge_runs(*runs[1::2], read_folder(path.parent))
    assert (said in lora_alone.sentence, lora_alone.answer) == (True, "not ranked")
    constant = {"resolved__lr": 1e-3, "settings__train__schedule": "constant"}
    other = make_run("lora", [4.0, 1.5], seed=2, **constant)
    sentence = judge_runs(*runs, other).sentence
    assert sentence.startswith("LoRA (lr 0.005, linear, rank 8) is good enough"), "the other may not be ranked"
    assert "; LoRA (lr 0.001, constant, rank 8) is not ranked (other schedule (constant to 0.0 against" in sentence


def test_the_sentence_names_what_adapters_masks_and_margin_have_of_their_own(make_run: MakeRun) -> None:
    adapter = {"adapter": "dora", "alpha": 8.0, "dropout": 0.1, "target_modules": ["mlp"]}
    other = {f"settings__lora__{name}": value for name, value in adapter.items()}
    other |= {"settings__model__quant": "nf4", "settings__model__quant_double": True}
    records = [
        make_run(
            mode, [4.0, 2.0], record_losses={30: losses}, record_options={"targets": TARGETS.tolist()}, **overrides
        )
        for mode, losses, overrides in (
            ("full", np.full(120, 2.0), {}),
            ("lora", np.linspace(2.0, 2.1, 120), {"resolved__micro_batch": 2, **other}),
        )
    ]
    sentence = judge_runs(*records, margin=parse_margin("1nats")).sentence
    for said in (
        "LoRA (dora, on nf4 weights, scales in 8 bits, alpha 8, LoRA dropout 0.1, on mlp, rank 8, lr 0.005) is good",
        "; dropout drew other masks (micro-batch 2 on 1 against 8 on 1 ranks)",
        "; the margin was chosen after the runs; one rate of full was tried",
    ):
        assert said in sentence
    assert "chosen after" not in judge_runs(*records).sentence


def test_a_few_records_that_decide_are_named_and_do_not_make_lora_good_enough_or_better(make_run: MakeRun) -> None:
    rng = np.random.default_rng(4)
    base, full = np.full(len(TARGETS), 4.0), 2.0 + 0.01 * rng.standard_normal(len(TARGETS))
    few, some = np.zeros(len(TARGETS)), 0.12 * rng.standard_normal(len(TARGETS))
    few[:3] = -9.0
    some[:5] -= 0.6
    for shift, answer, said in (
        (0.05 + few, "cannot tell", "as a few of them differ most, and at least 20 are needed"),
        (0.06 + some, "cannot tell", "without the 5 validation blocks that differ most it would not be good enough"),
        (some - 0.03, "good enough", "without the 5 validation blocks that differ most it would not be better"),
    ):
        runs = [
            make_run(
                mode,
                [4.0, float(np.average(losses, weights=TARGETS))],
                record_losses={0: base, 30: losses},
                record_options={"targets": TARGETS.tolist()},
                seed=s,
            )
            for s in range(3)
            for mode, losses in (("full", full), ("lora", full + shift + 0.002 * rng.standard_normal(len(TARGETS))))
        ]
        verdict = judge_runs(*runs, margin=Margin(kind="nats", value=0.08))
        assert (verdict.primary.answer, verdict.primary.contrast.upper < 0) == (answer, True), verdict.sentence
        assert (verdict.primary.excess.high < 0) == (answer == "good enough"), "better, if it were not for the few"
        assert (said in verdict.sentence) == (answer == "cannot tell")
        assert any("“text 0000” (-" in line for line in verdict.details)
        (records,) = (str(headline) for headline in verdict.headlines if headline.label == "Effective records")
        effective = verdict.primary.excess.effective_units
        assert records.startswith(f"Effective records: {effective:.0f} (of 120 validation blocks; a tenth has ")
        (comparison,) = to_answer(verdict)["comparisons"]
        assert said in comparison["doubt"]
        assert len(comparison["decisive_records"]) == 5


def test_equal_weights_are_one_base_and_lora_is_held_against_the_best_full_it_may_be_ranked_with(
    make_run: MakeRun,
) -> None:
    longer, lora = make_run("full", [4.0, 3.0, 1.5], resolved__lr=1e-4), make_run("lora", [4.0, 2.5], model__name="x")
    pair = judge_runs(longer, make_run("full", [4.0, 2.0]), lora).primary
    assert (pair.full.lr, [*pair.blockers]) == (5e-4, [])
    lora.metadata["model"]["fingerprint"] = None
    assert "base weights unknown" in judge_runs(make_run("full", [4.0, 2.0]), lora).sentence


def test_the_best_of_several_settings_is_named_and_is_exploratory(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    runs += [make_run("lora", [4.0, 3.5], seed=seed, resolved__lr=1e-3) for seed in range(3)]
    verdict = judge_runs(*runs)
    assert verdict.sentence.startswith("The best of 2 LoRA settings (lr 0.005, rank 8) is worse than full (lr 0.0005)")
    assert verdict.sentence.endswith(
        "; exploratory, for the settings were chosen on these records; one rate of full was tried; LoRA's best rate is "
        "at the edge of those tried, so a better one may lie beyond."
    )
    assert [comparison.lora.lr for comparison in verdict.comparisons] == [0.005, 0.001]


def test_unfinished_runs_are_left_out_and_one_killed_after_its_last_evaluation_counts(
    make_run: MakeRun,
) -> None:
    alone = "LoRA: validation loss 4.5000 at best; there is no finished full run to compare with."
    verdict = judge_runs(make_run("lora", [4.0, 4.5]))
    assert (verdict.sentence, verdict.next_step[:28]) == (alone, "Train with --mode full too, ")
    going = make_run("lora", [4.0, 3.0, 2.5], how={"finished": False})
    verdict = judge_runs(going)
    assert verdict.sentence == "No run is finished and evaluated, so there is nothing to compare yet."
    assert verdict.next_step.startswith("Let the runs end (--resume ")
    sentence = judge_runs(make_run("full", [4.0, 2.0]), going).sentence
    assert sentence.endswith(" Not counted, as without an end or an evaluation: 1.")
    full, lora = make_study(make_run, num_seeds=1, excess=0.2)
    path = Path(lora.source) / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"finished"' not in line))
    pair = judge_runs(full, read_folder(Path(lora.source))).primary
    assert (pair.answer, pair.memory.reason) == ("worse", "not measured")


def test_time_is_divided_only_where_it_was_taken_in_alternation_and_memory_where_it_was_alike(
    make_run: MakeRun,
) -> None:
    """Of the very same runs 0.98 and 1.14 were said by their own clocks."""
    full, lora = (
        make_run(mode, [4.0, loss], how={"wall_seconds": seconds, "peak_memory_bytes": peak}, **GPU)
        for mode, loss, seconds, peak in (("full", 2.0, 200.0, 1000), ("lora", 2.5, 8.0, 430))
    )
    own_clocks = judge_runs(full, lora)
    pair = own_clocks.primary
    assert (pair.time.ratio, pair.memory.ratio, pair.parameters) == (None, 0.43, 0.0095)  # 19,000 / 2,000,000
    assert [headline.label for headline in own_clocks.headlines] == ["Loss", "Memory", "Trained weights"]
    assert any("Time not compared (not timed in alternation on one machine)" in line for line in own_clocks.details)
    for section, key, value in (("hardware", "gpu", "A100"), ("resolved", "ds_config", "zero2")):
        lora.metadata[section][key] = value
        assert judge_runs(full, lora).primary.memory.ratio is None, "not measured alike"
