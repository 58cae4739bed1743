"""The model of more GPUs than are at hand: its bytes are those of the ZeRO paper, its times those of the formula."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.tools.bench.comm_model import (
    NETWORK_BYTES_PER_SECOND,
    NVLINK_BYTES_PER_SECOND,
    Cluster,
    bytes_moved,
    scaling_table,
    step_seconds,
)

ROOT = Path(__file__).parents[3]
GPT2 = 124_439_808


def test_the_comm_model_of_one_rank_moves_no_bytes():
    assert all(bytes_moved(stage=stage, num_trainable=GPT2, num_frozen=0, world_size=1) == 0 for stage in range(4))


def test_the_comm_model_of_zero_stages_moves_the_bytes_of_the_zero_paper():
    """Section 7: in units of the weights 2 for plain data parallelism and stages 1 and 2, 3 for stage 3."""
    moved = [
        bytes_moved(stage=stage, num_trainable=GPT2, num_frozen=0, world_size=64) / (4 * GPT2) for stage in range(4)
    ]
    assert moved == pytest.approx([2 * 63 / 64] * 3 + [3 * 63 / 64])


def test_frozen_weights_are_communicated_only_where_they_are_sharded():
    adapters = 1_179_648
    assert bytes_moved(stage=1, num_trainable=adapters, num_frozen=GPT2, world_size=8) == 7 / 8 * 8 * adapters
    assert bytes_moved(stage=3, num_trainable=adapters, num_frozen=GPT2, world_size=8) > 7 / 8 * 8 * GPT2


def test_gradient_accumulation_adds_communication_only_under_zero_2_and_3():
    once, four = (
        [
            bytes_moved(stage=stage, num_trainable=8, num_frozen=0, world_size=2, gradient_accumulation_steps=n)
            for stage in range(4)
        ]
        for n in (1, 4)
    )
    assert four[:2] == once[:2]
    assert (four[2], four[3]) == (2.5 * once[2], 4 * once[3])


def test_the_modelled_step_time_is_compute_plus_bytes_over_the_slowest_link():
    shape = {"stage": 1, "num_trainable": GPT2, "num_frozen": 0}
    within = step_seconds(compute_seconds=0.01, cluster=Cluster(world_size=8), **shape)
    beyond = step_seconds(compute_seconds=0.01, cluster=Cluster(world_size=64), **shape)
    assert within == pytest.approx(0.01 + 8 * GPT2 * 7 / 8 / NVLINK_BYTES_PER_SECOND)
    assert beyond == pytest.approx(0.01 + 8 * GPT2 * 63 / 64 / NETWORK_BYTES_PER_SECOND)
    assert "| 64 |" in scaling_table(compute_seconds=0.01, num_tokens=2048, num_trainable=GPT2, num_frozen=0)


def test_the_scaling_script_prints_the_comm_model_of_both_modes():
    command = [sys.executable, str(ROOT / "launch" / "bench.py"), "scaling", "--only-model", "--step-ms", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "full, modelled: 2 x 1024 tokens a GPU in 10 ms" in done.stdout
    assert "lora, modelled" in done.stdout
    assert "| 1 | 0.00 GB, 100% (204,800 tokens/s)" in done.stdout
