"""The model of more GPUs than are at hand: its bytes are those of the ZeRO paper, its times those of the formula."""

import pytest

from trainer.distributed.bytes_sent import bytes_sent
from trainer.distributed.gradients import MIN_BUCKET_BYTES
from trainer.tools.bench import bench_cli
from trainer.tools.bench.comm_model import GPU_BUCKET_BYTES, Workload, communication, communication_of_two_processors

GPT2, ADAPTERS = 124_439_808, 1_179_648
FULL = Workload(compute_seconds=0.03, num_trainable=GPT2)


def moved(world_size: int, num_trainable: int, num_frozen: int = 0, accumulation: int = 1) -> list[float]:
    """Bytes that a rank sends in a step, by stage."""
    counts = {"num_trainable": num_trainable, "num_frozen": num_frozen, "gradient_accumulation_steps": accumulation}
    return [bytes_sent(stage=stage, world_size=world_size, **counts) for stage in range(4)]


def test_the_comm_model_of_zero_stages_moves_the_bytes_of_the_zero_paper():
    """Section 7: in units of the weights 2 for plain data parallelism and stages 1 and 2, 3 for stage 3, but 2 where
    DeepSpeed keeps the weights from the forward to the backward."""
    assert moved(1, GPT2) == [0] * 4
    assert [num_bytes / (4 * GPT2) for num_bytes in moved(64, GPT2)] == pytest.approx([2 * 63 / 64] * 4)
    assert moved(64, 10**11)[3] / (4 * 10**11) == pytest.approx(3 * 63 / 64, rel=0.002)


def test_zero_3_brings_small_trained_weights_back_once_for_all_micro_batches():
    counts = {"num_trainable": 100, "num_frozen": 0, "world_size": 2, "gradient_accumulation_steps": 4}
    whole, persistent = (bytes_sent(stage=3, num_persistent=n, **counts) for n in (0, 30))
    assert whole - persistent == 4 / 2 * (4 - 1) * 30


def test_frozen_weights_are_communicated_only_where_they_are_sharded():
    lora = moved(8, ADAPTERS, num_frozen=GPT2)
    assert lora[1] == 7 / 8 * 8 * ADAPTERS
    assert lora[3] == 7 / 8 * 4 * (GPT2 + 2 * ADAPTERS)


def test_gradient_accumulation_adds_communication_only_under_zero_2_and_3():
    once, four = (moved(2, 8, accumulation=n) for n in (1, 4))
    assert four[:2] == once[:2]
    assert (four[2], four[3]) == (2.5 * once[2], 4 * once[3])


def test_what_the_backward_does_not_outlast_is_exposed_and_so_is_what_it_makes_last():
    """By hand: GPT-2's gradients take 0.498 s each way at 1e9 bytes/s and two ranks; the backward takes 0.02 s."""
    one_way = 4 * GPT2 / 2 / 1e9
    tied_workload = Workload(compute_seconds=0.03, num_trainable=GPT2, tied_share=0.3)
    slow, fast, tied = (
        communication(stage=0, workload=workload, world_size=2, bandwidth=bandwidth, bucket_bytes=0)
        for workload, bandwidth in ((FULL, 1e9), (FULL, 1e12), (tied_workload, 1e12))
    )
    assert slow.exposed == pytest.approx(2 * one_way - 0.02)
    assert slow.hidden == pytest.approx(0.02)
    assert (fast.exposed, fast.hidden) == (0, pytest.approx(2 * one_way / 1000))
    assert tied.exposed == pytest.approx(0.3 * 2 * one_way / 1000)
    sharded = communication(stage=1, workload=FULL, world_size=2, bandwidth=1e9, bucket_bytes=0)
    assert (sharded.exposed, sharded.hidden) == (pytest.approx(2 * one_way - 0.02), pytest.approx(0.02))
    assert communication(stage=3, workload=FULL, world_size=2, bandwidth=1e9).hidden == 0


def test_gradients_smaller_than_a_bucket_are_exposed():
    lora = Workload(compute_seconds=0.03, num_trainable=ADAPTERS, num_frozen=GPT2)
    assert communication(stage=0, workload=lora, world_size=8, bandwidth=1e9).hidden == 0
    assert MIN_BUCKET_BYTES["nccl"] == GPU_BUCKET_BYTES


def test_two_processors_send_both_halves_at_once():
    """The half of the first weights leaves in the second half of the backward; the weights' halves come back."""
    half = 4 * GPT2 / 2 / 1e9
    costs = communication_of_two_processors(stage=1, workload=FULL, bandwidth=1e9, bucket_bytes=0)
    assert costs.exposed == pytest.approx(2 * half - 0.01)
    tied = Workload(compute_seconds=30, num_trainable=GPT2, tied_share=0.5)
    assert communication_of_two_processors(stage=1, workload=tied, bandwidth=1e9, bucket_bytes=0).hidden == 0


def test_the_scaling_script_prints_the_comm_model_of_both_modes(capsys):
    assert bench_cli.run(["scaling", "--only-model", "--step-ms", "10"]) == 0
    output = capsys.readouterr().out
    assert "modelled: GPT-2 124M, 2 x 1024 tokens a GPU in 10 ms" in output
    assert "| 8 | within a node | " in output
    assert "| 64 | Ethernet, 25 Gbit/s a node | " in output
