"""The benchmark measures what it says: its variants, its formulas, its table, and one tiny call of the real thing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config.errors import UserError
from trainer.tools.bench.bench_cli import add_relative_speeds, format_markdown
from trainer.tools.bench.configs import BenchmarkConfig, build_configs, flops_per_token

ROOT = Path(__file__).parents[2]
COMMON: dict[str, Any] = {"model": "demo-base", "block_size": 32}


def test_bench_runs_this_trainer_first_and_peers_on_one_rank():
    found = build_configs(
        modes=["full", "lora"], global_batches=[2], ds_configs=["zero0", "zero2"], peers=["hf", "hf-deepspeed"],
        world_sizes=[1, 2],
        common_fields=COMMON,
    )  # fmt: skip
    full = [one.name for one in found if one.mode == "full"]
    assert full == [
        "ours zero0 fp32", "ours zero2 fp32", "ours zero0 2 ranks fp32", "ours zero2 2 ranks fp32", "hf fp32",
        "hf-deepspeed zero0 fp32", "hf-deepspeed zero2 fp32",
    ]  # fmt: skip
    assert len(set(found)) == len(found) == 14


def test_bench_runs_this_trainer_in_every_precision_and_peers_in_the_first():
    found = build_configs(
        modes=["full"], global_batches=[2], ds_configs=["zero0"], peers=["hf"], world_sizes=[1],
        precisions=["fp32", "bf16"],
        executions=["auto", "compile"], common_fields=COMMON,
    )  # fmt: skip
    assert [one.name for one in found] == [
        "ours zero0 fp32", "ours zero0 fp32 compile", "ours zero0 bf16", "ours zero0 bf16 compile", "hf fp32"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"peers": ["nanogpt"]}, "--against nanogpt: expected plain, hf"),
        ({"ds_configs": ["zero9"]}, "--ds zero9: expected zero0"),
        ({"modes": ["lara"]}, "--modes lara: expected full, lora"),
        ({"global_batches": [3], "world_sizes": [2]}, "--batches 3: does not divide over 2 ranks"),
        ({"global_batches": [0]}, "expected whole numbers from 1, got 0"),
    ],
)
def test_a_wrong_bench_argument_is_one_line(given, words):
    usual: dict[str, Any] = {
        "modes": ["full"],
        "global_batches": [2],
        "ds_configs": ["zero0"],
        "peers": [],
        "world_sizes": [1],
    }
    with pytest.raises(UserError, match=words):
        build_configs(**{**usual, **given}, common_fields=COMMON)


def test_flops_per_token_are_those_of_the_formula():
    """GPT-2 124M at T = 1024: 6 x 124.4 million + 12 x 12 x 768 x 1024, 1.76 TFLOP for the card's 2,048 tokens."""
    shape = {"num_parameters": 124_439_808, "num_layers": 12, "hidden_size": 768, "block_size": 1024}
    full = flops_per_token(mode="full", num_trainable=124_439_808, **shape)
    assert full * 2048 == pytest.approx(1.76e12, rel=2e-3)
    lora = flops_per_token(mode="lora", num_trainable=1_179_648, **shape)
    assert full - lora == 2 * 124_439_808 - 6 * 1_179_648, "no gradients of frozen weights"


def test_bench_speedup_is_the_ratio_round_by_round():
    rows: list[dict[str, Any]] = [
        {"mode": "full", "global_batch": 2, "rounds": [1.0, 2.0, 3.0]},
        {"mode": "full", "global_batch": 2, "rounds": [2.0, 2.0, 12.0]},
        {"mode": "lora", "global_batch": 2, "rounds": [5.0]},
        {"mode": "lora", "global_batch": 2, "problem": "failed"},
    ]
    add_relative_speeds(rows)
    assert rows[0]["speed"] == [1.0, 1.0, 1.0]
    assert rows[1]["speed"] == [0.5, 0.25, 1.0], "a machine that slows down for a round slows both"
    assert rows[2]["speed"] == [1.0, 1.0, 1.0]
    assert "speed" not in rows[3]


def test_a_benchmark_that_failed_says_so_in_its_line():
    facts = {
        "model": "m", "block_size": 8, "hardware": "h", "threads": 1, "versions": {"torch": "2"},
        "rounds": 1, "steps": "1", "ceiling_flops": 1e12, "ceiling_precision": "fp32",
    }  # fmt: skip
    row = {
        **BenchmarkConfig(program="hf", mode="full", global_batch=2, ds_config=None).as_dict(),
        "name": "hf",
        "problem": "failed: why",
    }
    line = next(line for line in format_markdown([row], facts).splitlines() if "failed" in line)
    assert line.startswith("| full | 2 | hf | failed: why |")
    assert line.count("|") == 12


@pytest.mark.slow
def test_a_tiny_bench_call_measures_this_trainer_and_a_plain_loop(tmp_path):
    words = "--model demo-base --block-size 16 --modes lora --batches 2 --against plain --windows 2 --window 2"
    command = [sys.executable, str(ROOT / "launch" / "bench.py"), *words.split(), "--warmup", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--output-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    content = json.loads((tmp_path / "bench.json").read_text())
    ours, plain = content["rows"]
    assert (ours["name"], plain["name"]) == ("ours zero0 fp32", "plain fp32")
    for row in (ours, plain):
        assert len(row["windows"][0]) == 2
        assert row["tokens_per_second"] == pytest.approx(32 / row["step"])
        assert 0 < row["flop_share"] < 2
        assert row["peak_memory"] > 2**26
    assert ours["eval_over_training"] > 0
    assert content["facts"]["ceiling_flops"] > 1e6
    assert "| lora | 2 | ours zero0 fp32 |" in (tmp_path / "bench.md").read_text()
    assert "round 1/1" in done.stdout
