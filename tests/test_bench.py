"""The benchmark measures what it says: its variants, its formulas, its table, and one tiny call of the real thing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.config.errors import UserError
from trainer.tools.bench.bench_cli import compare, markdown
from trainer.tools.bench.configs import Variant, flops_per_token, variants

ROOT = Path(__file__).parent.parent
COMMON: dict[str, Any] = {"model": "demo-base", "block_size": 32}


def test_ours_comes_first_and_peers_run_on_one_rank():
    found = variants(
        modes=["full", "lora"], batches=[2], zero=["zero0", "zero2"], against=["hf", "hf-deepspeed"], ranks=[1, 2],
        common=COMMON,
    )  # fmt: skip
    full = [one.name for one in found if one.mode == "full"]
    assert full == [
        "ours zero0 fp32", "ours zero2 fp32", "ours zero0 2 ranks fp32", "ours zero2 2 ranks fp32", "hf fp32",
        "hf-deepspeed zero0 fp32", "hf-deepspeed zero2 fp32",
    ]  # fmt: skip
    assert len(set(found)) == len(found) == 14


def test_ours_runs_in_every_precision_and_peers_in_the_first():
    found = variants(
        modes=["full"], batches=[2], zero=["zero0"], against=["hf"], ranks=[1], precisions=["fp32", "bf16"],
        compiles=["off", "on"], common=COMMON,
    )  # fmt: skip
    assert [one.name for one in found] == [
        "ours zero0 fp32", "ours zero0 fp32 compiled", "ours zero0 bf16", "ours zero0 bf16 compiled", "hf fp32"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"against": ["nanogpt"]}, "--against nanogpt: expected plain, hf"),
        ({"zero": ["zero9"]}, "--ds zero9: expected zero0"),
        ({"modes": ["lara"]}, "--modes lara: expected full, lora"),
        ({"batches": [3], "ranks": [2]}, "--batches 3: does not divide over 2 ranks"),
        ({"batches": [0]}, "expected whole numbers from 1, got 0"),
    ],
)
def test_a_wrong_name_or_number_is_one_line(given, words):
    usual: dict[str, Any] = {"modes": ["full"], "batches": [2], "zero": ["zero0"], "against": [], "ranks": [1]}
    with pytest.raises(UserError, match=words):
        variants(**{**usual, **given}, common=COMMON)


def test_the_operations_of_a_token_are_those_of_the_formula():
    """GPT-2 124M at T = 1024: 6 x 124.4 million + 12 x 12 x 768 x 1024, 1.76 TFLOP for the card's 2,048 tokens."""
    shape = {"parameters": 124_439_808, "layers": 12, "width": 768, "block_size": 1024}
    full = flops_per_token(mode="full", trainable=124_439_808, **shape)
    assert full * 2048 == pytest.approx(1.76e12, rel=2e-3)
    lora = flops_per_token(mode="lora", trainable=1_179_648, **shape)
    assert full - lora == 2 * 124_439_808 - 6 * 1_179_648, "no gradients of frozen weights"


def test_speed_is_ours_over_theirs_round_by_round():
    rows: list[dict[str, Any]] = [
        {"mode": "full", "batch": 2, "rounds": [1.0, 2.0, 3.0]},
        {"mode": "full", "batch": 2, "rounds": [2.0, 2.0, 12.0]},
        {"mode": "lora", "batch": 2, "rounds": [5.0]},
        {"mode": "lora", "batch": 2, "problem": "failed"},
    ]
    compare(rows)
    assert rows[0]["speed"] == [1.0, 1.0, 1.0]
    assert rows[1]["speed"] == [0.5, 0.25, 1.0], "a machine that slows down for a round slows both"
    assert rows[2]["speed"] == [1.0, 1.0, 1.0]
    assert "speed" not in rows[3]


def test_a_variant_that_failed_says_so_in_its_line():
    facts = {
        "model": "m", "block_size": 8, "hardware": "h", "threads": 1, "versions": {"torch": "2"},
        "rounds": 1, "steps": "1", "ceiling_flops": 1e12, "ceiling_precision": "fp32",
    }  # fmt: skip
    row = {**Variant(program="hf", mode="full", batch=2, zero=None).as_dict(), "name": "hf", "problem": "failed: why"}
    line = next(line for line in markdown([row], facts).splitlines() if "failed" in line)
    assert line.startswith("| full | 2 | hf | failed: why |")
    assert line.count("|") == 12


@pytest.mark.slow
def test_a_tiny_call_measures_ours_and_a_plain_loop(tmp_path):
    words = "--model demo-base --block-size 16 --modes lora --batches 2 --against plain --windows 2 --window 2"
    command = [sys.executable, str(ROOT / "launch" / "bench.py"), *words.split(), "--warmup", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=400,
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
