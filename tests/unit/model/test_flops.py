"""A step's operations, counted without memory, against torch's count of what a model with weights really computes."""

import numpy as np
import pytest
import torch
from helpers.tolerances import FLOPS_TOLERANCE
from test_build import make_llama
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import cli
from trainer.model.build import build_model
from trainer.model.flops import count_step_flops


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("gpt2", "--mode full"),
        ("gpt2", "--mode lora --activation-checkpointing --modules-to-save wte"),
        ("llama", "--mode lora --lora-rank 4 --lora-target-modules *.1.*"),
    ],
)
def test_a_step_is_counted_as_it_computes(tiny_model, session_dir, family, flags):
    model = tiny_model if family == "gpt2" else make_llama(session_dir)
    settings = cli.parse_args(["--model", model, *flags.split()]).settings
    causal = build_model(settings).causal
    causal.set_attn_implementation("eager")  # torch does not count the fused attention of a CPU
    ids = torch.randint(1, 90, (3, 24))
    with FlopCounterMode(display=False) as counter:
        causal.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    count = count_step_flops(settings, lengths=np.full(5, 24), global_batch=3)
    assert count == pytest.approx(counter.get_total_flops(), rel=FLOPS_TOLERANCE)


def test_a_full_step_takes_six_operations_a_weight_and_twelve_a_pair_of_tokens():
    """By formula: 2 forward and 4 backward for each weight in a product; attention 4 and 8 for each pair and channel.
    An average over rows of several lengths is the mean of their counts."""
    settings = cli.parse_args(["--mode", "full", "--model", "demo-base"]).settings
    config = build_model(settings, on_meta=True).causal.config
    width, num_layers, lengths = config.n_embd, config.n_layer, np.array([24, 19, 15])
    weights = num_layers * 12 * width**2 + config.vocab_size * width
    counts = [6 * weights * n + 12 * num_layers * width * n**2 for n in lengths]
    assert count_step_flops(settings, lengths=lengths, global_batch=2) == round(2 * sum(counts) / 3)
