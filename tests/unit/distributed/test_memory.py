"""The memory estimate: state by hand, passes against real tensors, and the sum against what a process grows by."""

import dataclasses
from typing import Any

import pytest
import torch

from trainer.config import cli
from trainer.distributed.deepspeed_config import DeepSpeedFile
from trainer.distributed.execution import cast_frozen_weights
from trainer.distributed.memory import (
    MAX_COUNTED_TOKENS,
    LiveBytes,
    MemoryEstimate,
    ModelStates,
    ParamCounts,
    PassMemory,
    PassSetup,
    count_pass_memory,
    estimate_memory,
    estimate_model_states,
    pass_memory,
)
from trainer.model import cpu_attention
from trainer.model.build import TrainableModel, build_model
from trainer.model.loss import CausalLMLoss
from trainer.model.quantization import set_compute_dtype

GIB = 2**30
NO_PASS = PassMemory(saved=0, peak=0, peak_with_gradients=0)
CPU = {"device": "cpu"}


def zero_file(stage: int, **offloads: Any) -> DeepSpeedFile:
    return DeepSpeedFile(name="test", content={"zero_optimization": {"stage": stage, **offloads}}, reason="")


def estimate(counts: ParamCounts, passes: PassMemory, stage: int = 0, ranks: int = 1, **fields: Any) -> MemoryEstimate:
    settings = {"precision": "fp32", "accumulates": False, **fields}
    return estimate_memory(counts, passes, zero_file(stage), ranks, **settings)


def states_of(counts: ParamCounts, stage: int, ranks: int, **offloads: Any) -> ModelStates:
    return estimate_model_states(counts, zero_file(stage, **offloads), ranks, precision="fp32")


# --- state, by hand ---


@pytest.mark.parametrize(
    ("stage", "ranks", "expected"),
    [(0, 1, 16), (0, 8, 16), (1, 1, 20), (1, 4, 8 + 12 / 4), (2, 4, 4 + 16 / 4), (3, 4, 20 / 4)],
)
def test_state_bytes_per_trained_weight_follow_the_zero_stage(stage, ranks, expected):
    counts = ParamCounts(frozen=0, trainable=1000)
    assert states_of(counts, stage, ranks).total == pytest.approx(1000 * expected)


@pytest.mark.parametrize(("stage", "expected_weights"), [(0, 4 * 1010), (1, 4 * 1010), (2, 4 * 1010), (3, 1010)])
def test_frozen_weights_take_no_gradient_and_no_optimizer_state_and_zero3_shards_them(stage, expected_weights):
    states = states_of(ParamCounts(frozen=1000, trainable=10), stage, 4)
    assert states.weights == expected_weights
    assert states.gradients + states.optimizer <= 16 * 10


def test_offload_moves_bytes_and_loses_none():
    counts = ParamCounts(frozen=0, trainable=1000)
    offloaded = states_of(counts, 2, 2, offload_optimizer=CPU)
    assert offloaded.total + offloaded.host == states_of(counts, 2, 2).total
    assert offloaded.total == 4 * 1000, "the weights stay"
    assert states_of(counts, 3, 2, offload_optimizer=CPU, offload_param=CPU).total == 0


@pytest.mark.parametrize(
    ("trainable", "targets", "expected"), [(10, ["c_attn"], (1000, 10)), (1000, [], (0, 1000)), (400, [], (600, 400))]
)
def test_param_counts_add_adapters_to_the_base(trainable, targets, expected):
    counts = ParamCounts.from_model_info({"parameters": 1000, "trainable": trainable, "lora_targets": targets})
    assert (counts.frozen, counts.trainable) == expected


def test_the_memory_estimate_counts_a_quantized_base_at_its_own_size():
    """Embeddings and norms of it in float32, so by bytes and not by elements."""
    model_info = {"parameters": 1000, "trainable": 10, "lora_targets": ["c_attn"], "frozen_bytes": 700}
    counts = ParamCounts.from_model_info(model_info)
    zero0, zero3 = (estimate(counts, NO_PASS, stage, 4) for stage in (0, 3))
    assert zero0.model_states.weights == 700 + 4 * 10
    assert zero3.model_states.weights == (700 + 4 * 10) / 4
    assert zero3.gathered == 700 + 4 * 10


def test_the_memory_estimate_counts_two_bytes_for_frozen_weights_in_bf16():
    counts, passes = ParamCounts(frozen=1000, trainable=10), dataclasses.replace(NO_PASS, cast_weights=900)
    states = estimate(counts, passes, precision="bf16").model_states
    assert states.weights == 4 * 1010 - 2 * 900
    assert states.host == 0


@pytest.mark.parametrize(
    ("stage", "ranks", "expected"),
    [
        (0, 1, 70),
        (2, 1, 70),  # every gradient stays where it is made
        (1, 2, 70),
        (0, 2, 50 + 4 * 100),  # a flat buffer for them is always there
        (2, 4, 50),
        (3, 4, 50 + 4 * 100 + 4 * 100 / 4),  # ZeRO-3: gathered weights, and its share's buffer
    ],
)
def test_a_pass_holds_all_gradients_up_to_zero_1_and_a_share_beyond(stage, ranks, expected):
    passes = PassMemory(saved=30, peak=50, peak_with_gradients=70)
    memory = estimate(ParamCounts(frozen=0, trainable=100), passes, stage, ranks)
    assert memory.forward_backward == expected
    assert memory.activations == 30


# --- the count, against real tensors ---

ROWS, WIDTH = 2, 160  # not a whole number of the attention's blocks


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(vocab_size=211, n_positions=256, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    return str(folder)


def parse(model: str, flags: str) -> Any:
    return cli.parse_args(f"--preset demo --model {model} --init random {flags}".split()).settings


def cpu_setup(**fields: Any) -> PassSetup:
    defaults = {"micro_batch_size": ROWS, "sequence_length": WIDTH, "precision": "fp32", "is_gpu": False}
    return PassSetup(**{**defaults, **fields})


def real_pass_memory(model: TrainableModel, setup: PassSetup) -> PassMemory:
    """What the same pass holds in real tensors, run as the engine runs it on a CPU."""
    is_bf16 = setup.precision == "bf16"
    cast_layers = cast_frozen_weights(model) if setup.casts_frozen_weights else []
    cpu_attention.install(model.module, model.causal)
    set_compute_dtype(model.module, torch.bfloat16 if is_bf16 else torch.float32)
    loss_module = CausalLMLoss(model.causal, torch.bfloat16 if is_bf16 else None).train()
    ids = torch.zeros(setup.micro_batch_size, setup.sequence_length, dtype=torch.long)
    with LiveBytes(loss_module) as live:
        loss, row_losses = loss_module(ids, ids)
        saved_bytes = live.bytes
        loss.backward()
        del loss, row_losses
    return PassMemory(
        saved=saved_bytes,
        peak=live.peak_bytes,
        peak_with_gradients=live.peak_bytes_with_gradients,
        cast_weights=sum(layer.weight.numel() for layer in cast_layers),
    )


@pytest.mark.parametrize(
    ("flags", "fields", "precision"),
    [
        pytest.param("--mode full", {}, "fp32", marks=pytest.mark.sweep),
        ("--mode full", {}, "bf16"),
        pytest.param("--mode full --dropout 0", {}, "bf16", marks=pytest.mark.sweep),
        pytest.param("--mode lora", {}, "fp32", marks=pytest.mark.sweep),
        ("--mode lora", {}, "bf16"),
        pytest.param("--mode lora --lora-target-modules c_attn --dropout 0", {}, "fp32", marks=pytest.mark.sweep),
        ("--mode lora --lora-dropout 0.1", {}, "bf16"),
        ("--mode lora --adapter dora", {}, "fp32"),
        ("--mode full --activation-checkpointing", {}, "bf16"),
        ("--mode lora --activation-checkpointing", {}, "fp32"),
    ],
)
def test_the_count_without_data_is_what_real_tensors_hold(small_model, flags, fields, precision):
    if precision == "bf16" and "lora" in flags:
        fields = {**fields, "casts_frozen_weights": True}
    settings, setup = parse(small_model, flags), cpu_setup(precision=precision, **fields)
    counted = count_pass_memory(settings, setup)
    real = real_pass_memory(build_model(settings, with_fingerprint=False), setup)
    assert counted.cast_weights == real.cast_weights
    for name in ("saved", "peak", "peak_with_gradients"):
        assert getattr(counted, name) == pytest.approx(getattr(real, name), rel=0.01), name


@pytest.mark.parametrize(("kind", "precision"), [("nf4", "bf16"), ("int8", "fp32")])
def test_the_count_of_a_quantized_base_is_near_what_real_tensors_hold(small_model, kind, precision):
    """bitsandbytes keeps small tensors of its own, which the stand-in for its layers leaves out."""
    settings, setup = parse(small_model, f"--mode lora --quant {kind}"), cpu_setup(precision=precision)
    counted = count_pass_memory(settings, setup)
    real = real_pass_memory(build_model(settings, with_fingerprint=False), setup)
    assert counted.saved == pytest.approx(real.saved, rel=0.01)
    assert counted.peak == pytest.approx(real.peak, rel=0.05), "passing tensors of its own as well"


def test_gradients_that_have_arrived_at_their_weight_are_counted_apart():
    layer = torch.nn.Linear(8, 8)
    with LiveBytes(layer) as live:
        layer(torch.ones(1, 8)).sum().backward()
    assert live.gradient_bytes == 4 * (8 * 8 + 8)


def test_the_count_changes_no_random_state_and_accumulated_gradients_are_in_it(small_model):
    settings = parse(small_model, "--mode full")
    before = torch.get_rng_state()
    once, again = (count_pass_memory(settings, cpu_setup(accumulates=accumulates)) for accumulates in (False, True))
    assert torch.equal(torch.get_rng_state(), before)
    gradients = 4 * build_model(settings, on_meta=True).metadata["trainable"]
    assert again.peak_with_gradients >= again.peak + gradients
    assert once.peak_with_gradients < again.peak_with_gradients


def test_a_large_micro_batch_follows_from_two_small_ones(small_model):
    settings = parse(small_model, "--mode lora")
    size = 3 * MAX_COUNTED_TOKENS // 256
    setup = cpu_setup(micro_batch_size=size, sequence_length=256)
    direct = count_pass_memory(settings, setup)
    inferred = pass_memory(settings, setup)
    assert inferred.saved == pytest.approx(direct.saved, rel=1e-3)
    assert inferred.peak == pytest.approx(direct.peak, rel=0.05)


# --- a GPU's memory, counted without one ---


def gpu_peak_gib(model: str, flags: str, micro_batch_size: int, **fields: Any) -> float:
    """1,024 tokens a row, bf16, AdamW, ZeRO 0 on one rank."""
    settings = parse(model, flags)
    counts = ParamCounts.from_model_info(build_model(settings, on_meta=True).metadata)
    setup = PassSetup(micro_batch_size=micro_batch_size, sequence_length=1024, precision="bf16", is_gpu=True, **fields)
    return estimate(counts, pass_memory(settings, setup), precision="bf16").peak / GIB


def test_the_count_for_a_gpu_meets_the_targets():
    """GiB; at most 2.8, 1.3 and 9 are wanted. Live storages on the CUDA build of torch 2.11 were 2.69, 1.21 and 7.6."""
    assert gpu_peak_gib("gpt2", "--mode full", 2) == pytest.approx(2.70, abs=0.01)
    assert gpu_peak_gib("gpt2", "--mode lora", 2, casts_frozen_weights=True) == pytest.approx(1.25, abs=0.01)
    assert gpu_peak_gib("gpt2", "--mode full", 16) == pytest.approx(7.63, abs=0.01)


def test_activation_checkpointing_saves_block_inputs_only(small_model):
    """A block's input of 64 float32 numbers for each token, and little else that grows with the layers."""
    usual, checkpointed = (
        pass_memory(parse(small_model, flags), cpu_setup(is_gpu=True)).saved
        for flags in ("--mode lora", "--mode lora --activation-checkpointing")
    )
    assert 3 * 4 * 64 * ROWS * WIDTH < checkpointed < usual / 2


@pytest.mark.sweep
def test_gpt2_xl_on_an_nf4_base_fits_into_six_gib_by_estimate(tmp_path):
    """1.5 billion weights; four bits and a doubly quantised scale of about one byte for each block of 64."""
    from transformers import GPT2Config

    config = GPT2Config(n_layer=48, n_embd=1600, n_head=25)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    assert 4 < gpu_peak_gib(str(tmp_path), "--mode lora --quant nf4 --quant-double", 1) < 6
