"""The verdict: its numbers by hand, and no number where there may be none."""

from pathlib import Path
from typing import Any

import pytest
from run_folders import facts, like_the_card, make

from trainer.report.paired_interval import groups
from trainer.report.run_data import Run, read_folder
from trainer.report.verdict import Verdict, judge, percent


@pytest.fixture
def run(tmp_path: Path) -> Any:
    count = iter(range(100))

    def build(
        mode: str, losses: list[float], like_card: bool = False, seed: int = 42, how: Any = None, **given: Any
    ) -> Run:
        content = like_the_card(mode, **given) if like_card else facts(mode, seed=seed, **given)
        by_epoch = {float(epoch): loss for epoch, loss in enumerate(losses)}
        return read_folder(
            make(
                tmp_path / str(next(count)),
                facts_of=content,
                losses=by_epoch,
                every=500,
                epochs=len(losses) - 1,
                **(how or {}),
            )
        )

    return build


def verdict(*runs: Run, with_card: bool = False) -> Verdict:
    return judge(groups(runs), with_card)


def test_share_parameters_time_and_memory_by_hand(run: Any) -> None:
    full = run("full", [4.0, 3.0, 2.0], how={"wall_seconds": 200.0, "peak_memory_bytes": 1000})
    lora = run("lora", [4.0, 3.0, 2.5], how={"wall_seconds": 122.0, "peak_memory_bytes": 430})
    got = verdict(full, lora, with_card=True)
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


def test_several_seeds_are_grouped_and_the_difference_is_held_against_their_spread(run: Any) -> None:
    fulls = [run("full", [4.0, loss], seed=seed) for seed, loss in enumerate([2.00, 2.02, 2.04])]
    near = [run("lora", [4.0, loss], seed=seed) for seed, loss in enumerate([2.01, 2.03, 2.06])]
    far = [run("lora", [4.0, loss], seed=seed) for seed, loss in enumerate([2.51, 2.53, 2.56])]
    assert "a difference that does not exceed the spread between seeds" in verdict(*fulls, *near).sentence
    got = verdict(*fulls, *far)
    assert "a difference that exceeds the spread between seeds" in got.sentence
    assert "2.5333 ± 0.0252 (n = 3) against 2.0200 ± 0.0200 (n = 3)" in got.details[0]
    assert got.details[-1].startswith(
        "A difference exceeds the spread between seeds when the 95 % interval of Welch's t test"
    )


def test_the_same_seed_twice_is_no_spread(run: Any) -> None:
    fulls = [run("full", [4.0, 2.0], run_id=f"full{n}") for n in range(2)]
    loras = [run("lora", [4.0, 2.5], run_id=f"lora{n}") for n in range(2)]
    assert verdict(*fulls, *loras).numbers["pairs"][0]["gap"]["exceeds"] is None


def test_of_several_lora_settings_the_best_is_told_and_all_are_in_the_numbers(run: Any) -> None:
    got = verdict(run("full", [4.0, 2.0]), run("lora", [4.0, 3.0]), run("lora", [4.0, 2.5], resolved__lr=1e-3))
    assert got.sentence.startswith("The best of 2 LoRA settings (lr 0.001) reached 75.0% of full's improvement")
    assert [pair["share"] for pair in got.numbers["pairs"]] == [0.75, 0.5]
    fulls = [run("full", [4.0, 3.0]), run("full", [4.0, 2.0], resolved__lr=1e-4)]
    assert verdict(*fulls, run("lora", [4.0, 2.5])).sentence.startswith(
        "LoRA reached 75.0% of the improvement of the best of 2 full settings (lr 0.0001)"
    )


def test_no_improvement_gives_no_share(run: Any) -> None:
    worse = verdict(run("full", [4.0, 4.5]), run("lora", [4.0, 3.5]))
    assert "no share of improvement is given because full did not improve on its base" in worse.sentence
    assert worse.numbers["pairs"][0]["share"] is None
    lost = verdict(run("full", [4.0, 3.0]), run("lora", [4.0, 4.5]))
    assert lost.sentence.startswith("LoRA did not improve on its base where full did")


def test_no_evaluation_at_step_0_or_another_base_gives_no_share(run: Any, tmp_path: Path) -> None:
    lora = read_folder(make(tmp_path / "x", facts_of=facts("lora"), losses={1.0: 2.5}, epochs=1))
    assert "because there was no evaluation at step 0" in verdict(run("full", [4.0, 2.0]), lora).sentence
    other = verdict(run("full", [4.0, 2.0]), run("lora", [4.0, 2.5], model__fingerprint="ff"))
    assert "because they started from different base models" in other.sentence


def test_cost_is_compared_only_on_the_same_hardware_and_ranks(run: Any) -> None:
    full = run("full", [4.0, 2.0])
    gpu = verdict(full, run("lora", [4.0, 2.5], hardware__gpu="H100"))
    assert "time and memory not compared (other hardware)" in gpu.sentence
    ranks = verdict(full, run("lora", [4.0, 2.5], resolved__ranks=2))
    assert "time and memory not compared (other number of ranks)" in ranks.sentence
    for got in (gpu, ranks):
        assert got.numbers["pairs"][0]["time"] is None
        assert got.numbers["pairs"][0]["memory"] is None
    longer = verdict(full, run("lora", [4.0, 3.0, 2.5]))
    assert "1.00x its memory; time not compared (1 epochs against 2)" in longer.sentence
    zero = verdict(full, run("lora", [4.0, 2.5], resolved__ds_config="zero2"))
    assert "ZeRO file zero2 against zero0" in zero.details[1]
    threads = verdict(full, run("lora", [4.0, 2.5], resolved__threads_per_rank=1))
    assert "measured with different settings: threads per rank 1 against 2" in threads.details[1]


def test_incomparable_runs_get_no_number_across_the_gap(run: Any) -> None:
    got = verdict(run("full", [4.0, 2.0]), run("lora", [5.0, 2.5], data__fingerprint="other"))
    assert got.sentence == (
        "LoRA and full are not comparable with one another (other data): "
        "full improved on its base (4.0000 -> 2.0000 at best); "
        "LoRA improved on its base (5.0000 -> 2.5000 at best)."
    )
    assert got.numbers["pairs"] == []


def test_one_mode_alone_says_so(run: Any) -> None:
    assert verdict(run("lora", [4.0, 2.5])).sentence == (
        "LoRA improved on its base (4.0000 -> 2.5000 at best); there is no finished full run to compare with."
    )


def test_two_data_sets_are_two_verdicts_in_one_sentence(run: Any) -> None:
    runs = [
        run(mode, losses, **other)
        for mode, losses in (("full", [4.0, 2.0]), ("lora", [4.0, 2.5]))
        for other in ({}, {"data__source": "e2e.csv", "data__fingerprint": "e2e", "run_id": f"{mode}e2e"})
    ]
    got = verdict(*runs, with_card=True)
    assert "LoRA (acled-demo) reached 75.0% of the improvement of full (acled-demo)" in got.sentence
    assert "; LoRA (e2e.csv) reached 75.0% of the improvement of full (e2e.csv)" in got.sentence
    assert "; none is comparable with the card: other data, " in got.sentence
    assert [(pair["full"], pair["lora"]) for pair in got.numbers["pairs"]] == [
        ("full (acled-demo)", "LoRA (acled-demo)"),
        ("full (e2e.csv)", "LoRA (e2e.csv)"),
    ], "a number across the gap"


def test_unfinished_runs_do_not_count(run: Any) -> None:
    going = run("lora", [4.0, 2.5], how={"finished": False})
    assert verdict(going).sentence == "No run is finished and evaluated, so there is nothing to compare yet."
    assert verdict(run("full", [4.0, 2.0]), going).sentence.endswith(
        "; 1 run without an end or an evaluation not counted."
    )


def test_against_the_card_only_where_comparable(run: Any) -> None:
    full = run("full", [4.0, 1.2, 1.0, 0.93], like_card=True)
    got = verdict(full, run("lora", [4.0, 1.3, 1.1, 1.0], like_card=True), with_card=True)
    assert (
        "full ended 0.0114 below the card's 0.9414 at epoch 3; LoRA ended 0.0586 above the card's 0.9414 at epoch 3"
        in got.sentence
    )
    assert "card" not in verdict(full).sentence


def test_two_significant_digits() -> None:
    assert [percent(share) for share in (0.00953, 0.0095, 0.12345, 0.9999, 1.0, 1.5)] == [
        "0.95%",
        "0.95%",
        "12%",
        "100%",
        "100%",
        "150%",
    ]
