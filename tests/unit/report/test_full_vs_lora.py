"""What LoRA cost beside full, withheld where it was not measured under one condition, and the margin."""

from pathlib import Path

import pytest
from helpers.fake_runs import make_metadata
from helpers.fake_studies import GPU, MakeRun, judge_runs, make_study, run_maker

from trainer.config.errors import UserError
from trainer.report.margin import Margin, parse_margin
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


def test_a_margin_is_a_number_with_its_unit() -> None:
    assert parse_margin("2%") == Margin()
    assert parse_margin("1e-2nats") == Margin(kind="nats", value=0.01)
    assert parse_margin(".005 bpb") == Margin(kind="bits_per_byte", value=0.005)
    for text in ("0%", "-1nats", "100%", "a", "%", "nannats", "0.01", "2"):
        with pytest.raises(UserError, match=r"--margin .*: expected a number above 0 and its unit"):
            parse_margin(text)


def test_a_margin_is_tested_by_the_upper_bound(make_run: MakeRun) -> None:
    """Targets of 3 bytes: 0.5 nats a token are 0.5 / (3 ln 2) = 0.24 bits per byte."""
    runs = make_study(make_run, num_seeds=3, excess=0.2, record_options={"bytes_per_target": 3})
    for loose, tight, unit in ((0.5, 0.2, "nats"), (0.24, 0.096, "bpb")):
        sentence = judge_runs(*runs, margin=parse_margin(f"{loose}{unit}")).sentence
        assert f"within the margin of {loose} {'nats per token' if unit == 'nats' else 'bits per byte'}" in sentence
        primary = judge_runs(*runs, margin=parse_margin(f"{tight}{unit}")).primary
        assert primary is not None
        assert primary.answer == "worse"
    unknown = judge_runs(
        *make_study(make_run, num_seeds=3, excess=0.2, record_options={"bytes_per_target": 0}),
        margin=parse_margin("0.24bpb"),
    )
    assert any("not known: the bytes of these records are not known" in line for line in unknown.details)
