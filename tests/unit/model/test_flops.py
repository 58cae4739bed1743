"""A step's operations, counted without memory, against torch's count of what a model with weights really computes."""

import numpy as np
import pytest
import torch
from helpers.tiny_inputs import make_tiny_gpt2
from helpers.tolerances import FLOPS_TOLERANCE
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config import cli
from trainer.model.build import build_model
from trainer.model.flops import count_step_flops

NUM_ROWS, LENGTH = 3, 24


@pytest.fixture(scope="module", params=[0.0, 0.1])
def gpt2_folder(request, tmp_path_factory) -> str:
    return make_tiny_gpt2(tmp_path_factory.mktemp("flops"), dropout=request.param, hidden_size=64)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **shape)).save_pretrained(
        folder
    )
    return str(folder)


def assert_count_is_right(*flags: str) -> int:
    """The count without memory is that of a model with weights; returns it."""
    settings = cli.parse_args(["--data", "acled-demo", *flags]).settings
    model = build_model(settings)
    model.causal.set_attn_implementation("eager")  # torch does not count the fused attention of a CPU
    ids = torch.randint(1, 90, (NUM_ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model.causal.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    count = count_step_flops(settings, lengths=np.full(5, LENGTH), global_batch=NUM_ROWS)
    assert count == pytest.approx(counter.get_total_flops(), rel=FLOPS_TOLERANCE)
    assert count is not None
    return count


@pytest.mark.parametrize("checkpointing", [(), ("--activation-checkpointing",)], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    "flags",
    [
        ("--mode", "full"),
        ("--mode", "lora"),
        ("--mode", "lora", "--lora-rank", "32"),
        ("--mode", "lora", "--lora-target-modules", "mlp"),
        ("--mode", "lora", "--lora-target-modules", "*.h.1.*"),
        ("--mode", "lora", "--modules-to-save", "wte"),
    ],
    ids=lambda flags: "-".join(flags[1::2]),
)
def test_gpt2_is_counted_as_it_computes(gpt2_folder, flags, checkpointing):
    assert_count_is_right("--model", gpt2_folder, *flags, *checkpointing)


def test_full_and_lora_of_the_embedded_model_are_counted_as_they_compute():
    full, lora = (assert_count_is_right("--model", "demo-base", "--mode", mode) for mode in ("full", "lora"))
    assert 0.6 < lora / full < 0.8, "adapters save the gradients of the frozen weights"


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_llama_is_counted_as_it_computes(llama_folder, mode):
    assert_count_is_right("--model", llama_folder, "--mode", mode)


def test_a_full_step_takes_six_operations_a_weight_and_twelve_a_pair_of_tokens(gpt2_folder):
    """By formula: 2 forward and 4 backward for each weight in a product; attention 4 and 8 for each pair and channel.
    An average over rows of several lengths is the mean of their counts."""
    settings = cli.parse_args(["--mode", "full", "--model", gpt2_folder]).settings
    config = build_model(settings, on_meta=True).causal.config
    width, num_layers, lengths = config.n_embd, config.n_layer, np.array([24, 19, 15])
    weights = num_layers * 12 * width**2 + config.vocab_size * width
    counts = [6 * weights * n + 12 * num_layers * width * n**2 for n in lengths]
    assert count_step_flops(settings, lengths=lengths, global_batch=2) == round(2 * sum(counts) / 3)
