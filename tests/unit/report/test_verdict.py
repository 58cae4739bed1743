"""The verdict: its numbers by hand, and no number where there may be none."""

from pathlib import Path
from typing import Any

import pytest
from helpers.fake_runs import make_metadata, make_reference_like_metadata, make_run_folder

from trainer.report.run_data import RunData, read_folder
from trainer.report.seed_groups import group_by_seed
from trainer.report.verdict import Verdict, build_verdict, format_percent


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    count = iter(range(100))

    def build(
        mode: str, losses: list[float], like_card: bool = False, seed: int = 42, how: Any = None, **overrides: Any
    ) -> RunData:
        content = (
            make_reference_like_metadata(mode, **overrides)
            if like_card
            else make_metadata(mode, seed=seed, **overrides)
        )
        by_epoch = {float(epoch): loss for epoch, loss in enumerate(losses)}
        return read_folder(
            make_run_folder(
                tmp_path / str(next(count)),
                metadata=content,
                losses=by_epoch,
                every=500,
                epochs=len(losses) - 1,
                **(how or {}),
            )
        )

    return build


def judge_runs(*runs: RunData, with_card: bool = False) -> Verdict:
    return build_verdict(group_by_seed(runs), with_card)


def test_the_verdict_has_the_hand_computed_share_parameters_time_and_memory(make_run: Any) -> None:
    full = make_run("full", [4.0, 3.0, 2.0], how={"wall_seconds": 200.0, "peak_memory_bytes": 1000})
    lora = make_run("lora", [4.0, 3.0, 2.5], how={"wall_seconds": 122.0, "peak_memory_bytes": 430})
    got = judge_runs(full, lora, with_card=True)
    assert got.sentence == (  # (4 - 2.5) / (4 - 2), 19,000 / 2,000,000, 122 / 200, 430 / 1000
        "LoRA reached 75.0% of full's improvement (best validation loss 2.5000 against 2.0000) "
        "with 0.95% of its trainable parameters, 0.61x its time and 0.43x its memory; "
        "neither is comparable with the card: other data, other tokenizer, other rows, other base model."
    )
    pair = got.numbers["pairs"][0]
    assert (pair["share"], pair["parameters"], pair["time"], pair["memory"]) == (0.75, 0.0095, 0.61, 0.43)
    assert got.details[1:] == (  # one seed a side
        "Whether the difference exceeds the spread between seeds is not known: "
        "it takes two different seeds or more on both sides.",
    )


def test_the_verdict_compares_seed_groups_by_their_standard_deviation(make_run: Any) -> None:
    fulls = [make_run("full", [4.0, loss], seed=seed) for seed, loss in enumerate([2.00, 2.02, 2.04])]
    near = [make_run("lora", [4.0, loss], seed=seed) for seed, loss in enumerate([2.01, 2.03, 2.06])]
    far = [make_run("lora", [4.0, loss], seed=seed) for seed, loss in enumerate([2.51, 2.53, 2.56])]
    assert "a difference that does not exceed the spread between seeds" in judge_runs(*fulls, *near).sentence
    got = judge_runs(*fulls, *far)
    assert "a difference that exceeds the spread between seeds" in got.sentence
    assert "2.5333 ± 0.0252 (n = 3) against 2.0200 ± 0.0200 (n = 3)" in got.details[0]
    assert got.details[-1].startswith(
        "A difference exceeds the spread between seeds when the 95 % interval of Welch's t test"
    )


def test_one_seed_twice_gives_no_standard_deviation(make_run: Any) -> None:
    fulls = [make_run("full", [4.0, 2.0], run_id=f"full{n}") for n in range(2)]
    loras = [make_run("lora", [4.0, 2.5], run_id=f"lora{n}") for n in range(2)]
    assert judge_runs(*fulls, *loras).numbers["pairs"][0]["gap"]["exceeds"] is None


def test_the_verdict_names_the_best_of_several_lora_settings_and_lists_all(make_run: Any) -> None:
    got = judge_runs(
        make_run("full", [4.0, 2.0]), make_run("lora", [4.0, 3.0]), make_run("lora", [4.0, 2.5], resolved__lr=1e-3)
    )
    assert got.sentence.startswith("The best of 2 LoRA settings (lr 0.001) reached 75.0% of full's improvement")
    assert [pair["share"] for pair in got.numbers["pairs"]] == [0.75, 0.5]
    fulls = [make_run("full", [4.0, 3.0]), make_run("full", [4.0, 2.0], resolved__lr=1e-4)]
    assert judge_runs(*fulls, make_run("lora", [4.0, 2.5])).sentence.startswith(
        "LoRA reached 75.0% of the improvement of the best of 2 full settings (lr 0.0001)"
    )


def test_the_verdict_gives_no_share_without_an_improvement(make_run: Any) -> None:
    worse = judge_runs(make_run("full", [4.0, 4.5]), make_run("lora", [4.0, 3.5]))
    assert "no share of improvement is given because full did not improve on its base" in worse.sentence
    assert worse.numbers["pairs"][0]["share"] is None
    lost = judge_runs(make_run("full", [4.0, 3.0]), make_run("lora", [4.0, 4.5]))
    assert lost.sentence.startswith("LoRA did not improve on its base where full did")


def test_the_verdict_gives_no_share_without_a_step_0_evaluation_or_with_another_base(
    make_run: Any, tmp_path: Path
) -> None:
    lora = read_folder(make_run_folder(tmp_path / "x", metadata=make_metadata("lora"), losses={1.0: 2.5}, epochs=1))
    assert "because there was no evaluation at step 0" in judge_runs(make_run("full", [4.0, 2.0]), lora).sentence
    other = judge_runs(make_run("full", [4.0, 2.0]), make_run("lora", [4.0, 2.5], model__fingerprint="ff"))
    assert "because they started from different base models" in other.sentence


def test_the_verdict_compares_cost_only_on_the_same_hardware_and_ranks(make_run: Any) -> None:
    full = make_run("full", [4.0, 2.0])
    gpu = judge_runs(full, make_run("lora", [4.0, 2.5], hardware__gpu="H100"))
    assert "time and memory not compared (other hardware)" in gpu.sentence
    ranks = judge_runs(full, make_run("lora", [4.0, 2.5], resolved__ranks=2))
    assert "time and memory not compared (other number of ranks)" in ranks.sentence
    for got in (gpu, ranks):
        assert got.numbers["pairs"][0]["time"] is None
        assert got.numbers["pairs"][0]["memory"] is None
    longer = judge_runs(full, make_run("lora", [4.0, 3.0, 2.5]))
    assert "1.00x its memory; time not compared (1 epochs against 2)" in longer.sentence
    zero = judge_runs(full, make_run("lora", [4.0, 2.5], resolved__ds_config="zero2"))
    assert "ZeRO file zero2 against zero0" in zero.details[1]
    threads = judge_runs(full, make_run("lora", [4.0, 2.5], resolved__threads_per_rank=1))
    assert "measured with different settings: threads per rank 1 against 2" in threads.details[1]


def test_the_verdict_gives_no_number_for_incomparable_runs(make_run: Any) -> None:
    got = judge_runs(make_run("full", [4.0, 2.0]), make_run("lora", [5.0, 2.5], data__fingerprint="other"))
    assert got.sentence == (
        "LoRA and full are not comparable with one another (other data): "
        "full improved on its base (4.0000 -> 2.0000 at best); "
        "LoRA improved on its base (5.0000 -> 2.5000 at best)."
    )
    assert got.numbers["pairs"] == []


def test_the_verdict_says_that_only_one_mode_was_run(make_run: Any) -> None:
    assert judge_runs(make_run("lora", [4.0, 2.5])).sentence == (
        "LoRA improved on its base (4.0000 -> 2.5000 at best); there is no finished full run to compare with."
    )


def test_two_data_sets_are_two_verdicts_in_one_sentence(make_run: Any) -> None:
    runs = [
        make_run(mode, losses, **other)
        for mode, losses in (("full", [4.0, 2.0]), ("lora", [4.0, 2.5]))
        for other in ({}, {"data__source": "e2e.csv", "data__fingerprint": "e2e", "run_id": f"{mode}e2e"})
    ]
    got = judge_runs(*runs, with_card=True)
    assert "LoRA (acled-demo) reached 75.0% of the improvement of full (acled-demo)" in got.sentence
    assert "; LoRA (e2e.csv) reached 75.0% of the improvement of full (e2e.csv)" in got.sentence
    assert "; none is comparable with the card: other data, " in got.sentence
    assert [(pair["full"], pair["lora"]) for pair in got.numbers["pairs"]] == [
        ("full (acled-demo)", "LoRA (acled-demo)"),
        ("full (e2e.csv)", "LoRA (e2e.csv)"),
    ], "a number across the gap"


def test_unfinished_runs_are_left_out_of_the_verdict(make_run: Any) -> None:
    going = make_run("lora", [4.0, 2.5], how={"finished": False})
    assert judge_runs(going).sentence == "No run is finished and evaluated, so there is nothing to compare yet."
    assert judge_runs(make_run("full", [4.0, 2.0]), going).sentence.endswith(
        "; 1 run without an end or an evaluation not counted."
    )


def test_the_verdict_compares_with_the_reference_only_where_comparable(make_run: Any) -> None:
    full = make_run("full", [4.0, 1.2, 1.0, 0.93], like_card=True)
    got = judge_runs(full, make_run("lora", [4.0, 1.3, 1.1, 1.0], like_card=True), with_card=True)
    assert (
        "full ended 0.0114 below the card's 0.9414 at epoch 3; LoRA ended 0.0586 above the card's 0.9414 at epoch 3"
        in got.sentence
    )
    assert "card" not in judge_runs(full).sentence


def test_percentages_of_the_verdict_have_two_significant_digits() -> None:
    assert [format_percent(share) for share in (0.00953, 0.0095, 0.12345, 0.9999, 1.0, 1.5)] == [
        "0.95%",
        "0.95%",
        "12%",
        "100%",
        "100%",
        "150%",
    ]
