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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    llama = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(llama)
    gpt2 = make_tiny_gpt2(tmp_path_factory.mktemp("gpt2"), dropout=0.1, hidden_size=64)
    return {"gpt2": gpt2, "llama": str(llama)}


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("gpt2", "--mode full"),
        ("gpt2", "--mode lora --activation-checkpointing"),
        ("gpt2", "--mode lora --lora-rank 32 --lora-target-modules *.h.1.*"),
        ("gpt2", "--mode lora --modules-to-save wte"),
        ("llama", "--mode lora"),
    ],
)
def test_a_step_is_counted_as_it_computes(folders, model, flags):
    settings = cli.parse_args(["--model", folders[model], *flags.split()]).settings
    causal = build_model(settings).causal
    causal.set_attn_implementation("eager")  # torch does not count the fused attention of a CPU
    ids = torch.randint(1, 90, (NUM_ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        causal.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    count = count_step_flops(settings, lengths=np.full(5, LENGTH), global_batch=NUM_ROWS)
    assert count == pytest.approx(counter.get_total_flops(), rel=FLOPS_TOLERANCE)


def test_a_full_step_takes_six_operations_a_weight_and_twelve_a_pair_of_tokens_and_lora_less():
    """By formula: 2 forward and 4 backward for each weight in a product; attention 4 and 8 for each pair and channel.
    An average over rows of several lengths is the mean of their counts."""
    full, lora = (cli.parse_args(["--mode", mode, "--model", "demo-base"]).settings for mode in ("full", "lora"))
    config = build_model(full, on_meta=True).causal.config
    width, num_layers, lengths = config.n_embd, config.n_layer, np.array([24, 19, 15])
    weights = num_layers * 12 * width**2 + config.vocab_size * width
    counts = [6 * weights * n + 12 * num_layers * width * n**2 for n in lengths]
    expected = round(2 * sum(counts) / 3)
    assert count_step_flops(full, lengths=lengths, global_batch=2) == expected
    count = count_step_flops(lora, lengths=lengths, global_batch=2)
    assert count is not None
    assert 0.6 < count / expected < 0.8, "adapters save the gradients of the frozen weights"
