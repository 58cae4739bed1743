"""The formula for a step's operations against torch's own count of the products that a model really makes."""

import numpy as np
import pytest
import torch
from helpers.tiny_inputs import make_tiny_gpt2
from helpers.tolerances import FLOPS_TOLERANCE
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import cli
from trainer.model.build import TrainableModel, build_model
from trainer.model.flops import count_step_flops, count_training_flops

NUM_ROWS, LENGTH = 3, 24


@pytest.fixture(scope="module", params=[0.0, 0.1])
def model_folder(request, tmp_path_factory) -> str:
    return make_tiny_gpt2(tmp_path_factory.mktemp("flops"), dropout=request.param, hidden_size=64)


def build(*flags: str) -> TrainableModel:
    argv = ["--data", "acled-demo", *flags]
    model = build_model(cli.parse_args(argv).settings)
    model.causal.set_attn_implementation("eager")  # torch does not count the fused attention of a CPU
    return model.causal.train() and model


def count_with_torch(model: TrainableModel) -> int:
    ids = torch.randint(1, 90, (NUM_ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model.causal(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
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
def test_the_formula_is_within_two_percent_of_the_counted_products(model_folder, flags, checkpointing):
    model = build("--model", model_folder, *flags, *(["--activation-checkpointing"] if checkpointing else []))
    formula = count_step_flops(model, num_rows=NUM_ROWS, sequence_length=LENGTH, activation_checkpointing=checkpointing)
    assert formula == pytest.approx(count_with_torch(model), rel=FLOPS_TOLERANCE)
    lengths = np.array([LENGTH, LENGTH - 5, LENGTH - 9])  # what a run records: of rows as long as they are
    rows = [
        count_step_flops(model, num_rows=1, sequence_length=int(n), activation_checkpointing=checkpointing)
        for n in lengths
    ]
    recorded = count_training_flops(model, lengths=lengths, global_batch=2, activation_checkpointing=checkpointing)
    assert recorded == round(2 * sum(rows) / 3)


def test_full_and_lora_of_the_embedded_model_take_the_operations_that_are_counted():
    counts = {}
    for mode in ("full", "lora"):
        model = build("--model", "demo-base", "--mode", mode)
        counts[mode] = count_step_flops(model, num_rows=NUM_ROWS, sequence_length=LENGTH)
        assert counts[mode] == pytest.approx(count_with_torch(model), rel=FLOPS_TOLERANCE)
    assert 0.6 < counts["lora"] / counts["full"] < 0.8, "adapters save the gradients of the frozen weights"


def test_other_models_are_counted_too(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for mode in ("full", "lora"):
        model = build("--model", str(tmp_path), "--mode", mode)
        formula = count_step_flops(model, num_rows=NUM_ROWS, sequence_length=LENGTH)
        assert formula == pytest.approx(count_with_torch(model), rel=FLOPS_TOLERANCE), mode
