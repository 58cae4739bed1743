"""What LoRA cost beside full, withheld where it was not measured under one condition, and the margin."""

from pathlib import Path

import pytest
from helpers.fake_runs import make_metadata
from helpers.fake_studies import GPU, MakeRun, judge_runs, make_study, run_maker

from trainer.config.errors import UserError
from trainer.report.full_vs_lora import Margin, parse_margin
from trainer.report.run_folder import read_folder


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    return run_maker(tmp_path)


def test_time_and_memory_have_the_hand_computed_ratios_on_one_gpu(make_run: MakeRun) -> None:
    full = make_run("full", [4.0, 2.0], how={"wall_seconds": 200.0, "peak_memory_bytes": 1000}, **GPU)
    lora = make_run("lora", [4.0, 2.5], how={"wall_seconds": 122.0, "peak_memory_bytes": 430}, **GPU)
    got = judge_runs(full, lora).primary
    assert got is not None
    assert (got.time.ratio, got.memory.ratio, got.parameters) == (0.61, 0.43, 0.0095)  # 19,000 / 2,000,000


def test_time_of_cpu_ranks_is_said_but_not_divided(make_run: MakeRun) -> None:
    full = make_run("full", [4.0, 2.0], how={"wall_seconds": 200.0})
    got = judge_runs(full, make_run("lora", [4.0, 2.5], how={"wall_seconds": 8.0}))
    assert got.primary is not None
    assert got.primary.time.ratio is None
    time = next(headline for headline in got.headlines if headline.label == "Time")
    assert (time.value, "8.0 s against 3.3 min" in time.note) == ("-", True)


def test_cost_is_compared_only_on_the_same_hardware_and_ranks(make_run: MakeRun) -> None:
    full = make_run("full", [4.0, 2.0])
    for overrides, reason in (
        ({"hardware__gpu": "H100"}, "other hardware"),
        ({"resolved__ranks": 2}, "other number of ranks"),
    ):
        got = judge_runs(full, make_run("lora", [4.0, 2.5], **overrides))
        assert any(f"time and memory not compared ({reason})" in line for line in got.details)
        assert got.primary is not None
        assert (got.primary.time.ratio, got.primary.memory.ratio) == (None, None)
    zero = judge_runs(full, make_run("lora", [4.0, 2.5], resolved__ds_config="zero2"))
    assert any("ZeRO file zero2 against zero0" in line for line in zero.details)
    threads = judge_runs(full, make_run("lora", [4.0, 2.5], resolved__threads_per_rank=1))
    assert any("measured with different settings: threads per rank 1 against 2" in line for line in threads.details)


def test_time_and_memory_of_a_resumed_run_are_withheld(make_run: MakeRun) -> None:
    """The recorded peak is the last process's: 1.23x was said where 0.52x was true."""
    resumed = make_run(
        "lora", [4.0, 2.5], resumed={"settings": make_metadata("lora")["settings"], "changed": {}}, **GPU
    )
    got = judge_runs(make_run("full", [4.0, 2.0], **GPU), resumed).primary
    assert got is not None
    for cost in (got.time, got.memory):
        assert cost.ratio is None
        assert "was resumed and measured in parts" in cost.reason


def test_a_run_killed_after_its_last_evaluation_counts_and_has_no_cost(make_run: MakeRun) -> None:
    full, lora = make_study(make_run, num_seeds=1, excess=0.2)
    path = Path(lora.source) / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if '"finished"' not in line))
    ended = read_folder(Path(lora.source))
    assert ended.is_finished
    assert "evaluated to its end but not closed: its time and memory are unknown" in ended.notes
    got = judge_runs(full, ended)
    assert got.primary is not None
    assert got.primary.answer == "worse"
    assert got.primary.memory.reason == "not measured"


# --- the margin ---


def test_a_margin_is_a_share_of_fulls_gain_or_nats_per_token() -> None:
    assert parse_margin("2%") == Margin(share=0.02)
    assert parse_margin("0.01") == Margin(share=None, nats=0.01)
    for text in ("0", "-1", "100%", "a", "%", "nan"):
        with pytest.raises(UserError, match=r"--margin .*: expected a share of what full gained"):
            parse_margin(text)


def test_a_margin_in_nats_is_tested_by_the_upper_bound(make_run: MakeRun) -> None:
    runs = make_study(make_run, num_seeds=3, excess=0.2)
    assert "within the margin of 0.5 nats per token" in judge_runs(*runs, margin=parse_margin("0.5")).sentence
    tight = judge_runs(*runs, margin=parse_margin("0.2")).primary
    assert tight is not None
    assert tight.answer == "worse"
