"""The memory estimate: state by hand, passes against real tensors, and the sum against what a process grows by."""

from typing import Any

import pytest
import torch

from trainer.config import cli
from trainer.distributed import memory
from trainer.distributed.deepspeed_config import DeepSpeedFile, read_deepspeed_file
from trainer.distributed.execution import cast_frozen_weights
from trainer.distributed.memory import LiveBytes, MemoryEstimate, PassMemory, count_pass_memory, estimate_memory
from trainer.model import attention
from trainer.model.build import TrainableModel, build_model
from trainer.model.loss import CausalLMLoss
from trainer.model.quantization import set_compute_dtype

GIB = 2**30
CPU = {"device": "cpu"}


def estimate(
    trainable: int, frozen: int = 0, *, stage: int = 0, ranks: int = 1, passes: PassMemory | None = None, **options: Any
) -> MemoryEstimate:
    """Of a model of so many weights; `options`: of the ZeRO file, of the model's facts, or of the run."""
    model_info = {"parameters": frozen or trainable, "trainable": trainable, "lora_targets": ["all"] * bool(frozen)}
    model_info |= {"frozen_bytes": options.pop("frozen_bytes")} if "frozen_bytes" in options else {}
    run = {"precision": options.pop("precision", "fp32"), "is_gpu": options.pop("is_gpu", False)}
    file = DeepSpeedFile(name="test", content={"zero_optimization": {"stage": stage, **options}}, reason="")
    return estimate_memory(model_info, passes or PassMemory(), file, ranks, **run)


# --- state, by hand ---


def state_bytes(memory: MemoryEstimate) -> float:
    """What lives on the device from step to step."""
    return memory.weights + memory.gradients + memory.optimizer


@pytest.mark.parametrize(
    ("stage", "ranks", "expected"),
    [(0, 1, 16), (0, 8, 16), (1, 1, 20), (1, 4, 8 + 12 / 4), (2, 4, 4 + 16 / 4), (3, 4, 20 / 4)],
)
def test_state_bytes_per_trained_weight_follow_the_zero_stage(stage, ranks, expected):
    assert state_bytes(estimate(1000, stage=stage, ranks=ranks)) == pytest.approx(1000 * expected)


@pytest.mark.parametrize(
    ("options", "expected_weights"),
    [
        ({"stage": 0}, 4 * 1010),
        ({"stage": 3}, 1010),
        ({"stage": 3, "frozen_bytes": 700}, (700 + 4 * 10) / 4),  # packed: by bytes, as embeddings and norms are not
        ({"stage": 0, "passes": PassMemory(cast_weights=900)}, 4 * 1010 - 2 * 900),  # held in bfloat16
    ],
)
def test_frozen_weights_take_no_gradient_and_no_optimizer_state_and_zero3_shards_them(options, expected_weights):
    memory = estimate(10, 1000, ranks=4, **options)
    assert memory.weights == expected_weights
    assert memory.gradients + memory.optimizer <= 16 * 10
    assert memory.gathered == (4 * expected_weights if options["stage"] == 3 else 0)


def test_offload_moves_bytes_and_loses_none():
    offloaded = estimate(1000, stage=2, ranks=2, offload_optimizer=CPU)
    assert state_bytes(offloaded) + offloaded.host == state_bytes(estimate(1000, stage=2, ranks=2))
    assert state_bytes(offloaded) == 4 * 1000, "the weights stay"
    assert state_bytes(estimate(1000, stage=3, ranks=2, offload_optimizer=CPU, offload_param=CPU)) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 70),
        ({"stage": 1, "ranks": 2}, 70),
        ({"ranks": 2}, 50 + 4 * 100),  # a flat buffer for them is always there
        ({"stage": 3, "ranks": 4}, 50 + 4 * 100 + 4 * 100 / 4),  # ZeRO-3: gathered weights, and its share's buffer
        # A GPU holds DeepSpeed's bucket of gradients in its whole size, whatever the size of the model.
        ({"is_gpu": True, "stage": 1}, 70 + 4 * 5 * 10**8),
        ({"is_gpu": True, "stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}, 50 + 4 * 100 + 2 * 4 * 1000),
        ({"is_gpu": True, "stage": 2, "reduce_bucket_size": 1000, "contiguous_gradients": False}, 50 + 4 * 100),
    ],
)
def test_a_pass_holds_all_gradients_up_to_zero_1_a_share_beyond_and_the_bucket_of_a_gpu(options, expected):
    passes = PassMemory(saved=30, peak=50, peak_with_gradients=70)
    memory = estimate(100, passes=passes, **options)
    assert memory.activations + memory.passing + memory.gathered == expected
    assert memory.activations == 30


# --- the count, against real tensors ---

ROWS, WIDTH = 2, 160  # not a whole number of the attention's blocks
ON_CPU: Any = {"micro_batch_size": ROWS, "row_length": WIDTH, "precision": "fp32", "is_gpu": False}


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


def real_pass_memory(model: TrainableModel, precision: str, *, casts_frozen: bool) -> PassMemory:
    """What the same pass holds in real tensors, run as the engine runs it on a CPU."""
    dtype = torch.bfloat16 if precision == "bf16" else None
    cast_layers = cast_frozen_weights(model) if casts_frozen else []
    attention.install_on_cpu(model.module, model.causal)
    set_compute_dtype(model.module, dtype or torch.float32)
    loss_module, ids = CausalLMLoss(model.causal, dtype).train(), torch.zeros(ROWS, WIDTH, dtype=torch.long)
    with LiveBytes(loss_module) as live:
        loss, row_losses = loss_module(ids, ids)
        saved_bytes = live.bytes - live.gradient_bytes
        loss.backward()
        del loss, row_losses
    cast_weights = sum(layer.weight.numel() for layer in cast_layers)
    return PassMemory(saved_bytes, live.peak_bytes, live.peak_bytes_with_gradients, cast_weights)


@pytest.mark.parametrize(
    ("flags", "precision", "rel"),
    [
        ("--mode full", "bf16", 0.01),
        ("--mode lora --lora-dropout 0.1", "bf16", 0.01),
        ("--mode lora --adapter dora", "fp32", 0.01),
        ("--mode full --activation-checkpointing", "bf16", 0.01),
        ("--mode lora --activation-checkpointing", "fp32", 0.01),
        # bitsandbytes keeps small passing tensors of its own, which the stand-in for its layers leaves out.
        ("--mode lora --quant nf4", "bf16", 0.05),
        ("--mode lora --quant int8", "fp32", 0.05),
    ],
)
def test_the_count_without_data_is_what_real_tensors_hold(small_model, flags, precision, rel):
    is_packed = "--quant" in flags
    casts = precision == "bf16" and "lora" in flags and not is_packed
    settings = parse(small_model, flags)
    counted = count_pass_memory(settings, **ON_CPU | {"precision": precision}, casts_frozen=casts)
    real = real_pass_memory(build_model(settings, with_fingerprint=False), precision, casts_frozen=casts)
    assert counted.cast_weights == real.cast_weights
    assert counted.saved == pytest.approx(real.saved, rel=0.01)
    assert counted.peak == pytest.approx(real.peak, rel=rel)
    assert is_packed or counted.peak_with_gradients == pytest.approx(real.peak_with_gradients, rel=rel)


def test_the_count_changes_no_random_state_and_accumulated_gradients_are_in_it(small_model):
    settings = parse(small_model, "--mode full")
    before = torch.get_rng_state()
    once, again = (count_pass_memory(settings, **ON_CPU, accumulates=accumulates) for accumulates in (False, True))
    assert torch.equal(torch.get_rng_state(), before)
    gradients = 4 * build_model(settings, on_meta=True).metadata["trainable"]
    assert again.peak_with_gradients >= again.peak + gradients
    assert once.peak_with_gradients < again.peak_with_gradients


def test_a_large_micro_batch_follows_from_two_small_ones(small_model, monkeypatch):
    form: Any = {**ON_CPU, "micro_batch_size": 12, "row_length": 256}
    direct = count_pass_memory.__wrapped__(parse(small_model, "--mode lora"), **form)
    monkeypatch.setattr(memory, "MAX_COUNTED_TOKENS", 1024)
    inferred = count_pass_memory.__wrapped__(parse(small_model, "--mode lora"), **form)
    assert inferred[:2] == (pytest.approx(direct.saved, rel=1e-3), pytest.approx(direct.peak, rel=0.05))
    assert isinstance(inferred.peak, float), "not counted, but by the growth of two counts"


# --- a GPU's memory, counted without one ---


def gpu_peak_gib(model: str, flags: str, *, casts_frozen: bool) -> float:
    """2 x 1,024 tokens, bf16, AdamW, ZeRO 0 on one rank."""
    settings = parse(model, flags)
    model_info = build_model(settings, on_meta=True).metadata
    form: Any = {"precision": "bf16", "is_gpu": True}
    passes = count_pass_memory(settings, micro_batch_size=2, row_length=1024, **form, casts_frozen=casts_frozen)
    return estimate_memory(model_info, passes, read_deepspeed_file("zero0"), 1, **form).peak / GIB


def test_the_count_for_a_gpu_meets_the_targets():
    """GiB; at most 2.8 and 1.3 are wanted. Live storages on the CUDA build of torch 2.11 were 2.69 and 1.21."""
    assert gpu_peak_gib("gpt2", "--mode full", casts_frozen=False) == pytest.approx(2.70, abs=0.01)
    assert gpu_peak_gib("gpt2", "--mode lora", casts_frozen=True) == pytest.approx(1.25, abs=0.01)
