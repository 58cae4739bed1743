"""The model of more GPUs than are at hand: its bytes are those of the ZeRO paper, its times those of the formula."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.tools.bench.comm_model import NETWORK, NVLINK, Cluster, bytes_moved, step_seconds, table

ROOT = Path(__file__).parent.parent
GPT2 = 124_439_808


def test_one_rank_moves_nothing():
    assert all(bytes_moved(stage=stage, trained=GPT2, frozen=0, ranks=1) == 0 for stage in range(4))


def test_the_stages_move_what_the_zero_paper_says():
    """Section 7: in units of the weights 2 for plain data parallelism and stages 1 and 2, 3 for stage 3."""
    moved = [bytes_moved(stage=stage, trained=GPT2, frozen=0, ranks=64) / (4 * GPT2) for stage in range(4)]
    assert moved == pytest.approx([2 * 63 / 64] * 3 + [3 * 63 / 64])


def test_frozen_weights_move_only_where_they_are_divided():
    adapters = 1_179_648
    assert bytes_moved(stage=1, trained=adapters, frozen=GPT2, ranks=8) == 7 / 8 * 8 * adapters
    assert bytes_moved(stage=3, trained=adapters, frozen=GPT2, ranks=8) > 7 / 8 * 8 * GPT2


def test_accumulation_is_free_but_under_stages_2_and_3():
    once, four = (
        [bytes_moved(stage=stage, trained=8, frozen=0, ranks=2, accumulation=n) for stage in range(4)] for n in (1, 4)
    )
    assert four[:2] == once[:2]
    assert (four[2], four[3]) == (2.5 * once[2], 4 * once[3])


def test_a_step_is_its_arithmetic_and_its_bytes_over_the_slowest_link():
    shape = {"stage": 1, "trained": GPT2, "frozen": 0}
    within = step_seconds(compute=0.01, cluster=Cluster(ranks=8), **shape)
    beyond = step_seconds(compute=0.01, cluster=Cluster(ranks=64), **shape)
    assert within == pytest.approx(0.01 + 8 * GPT2 * 7 / 8 / NVLINK)
    assert beyond == pytest.approx(0.01 + 8 * GPT2 * 63 / 64 / NETWORK)
    assert "| 64 |" in table(compute=0.01, tokens=2048, trained=GPT2, frozen=0)


def test_the_script_prints_the_model_of_both_modes():
    command = [sys.executable, str(ROOT / "launch" / "bench_scaling.py"), "--only-model", "--step-ms", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "full, modelled: 2 x 1024 tokens a GPU in 10 ms" in done.stdout
    assert "lora, modelled" in done.stdout
    assert "| 1 | 0.00 GB, 100% (204,800 tokens/s)" in done.stdout
