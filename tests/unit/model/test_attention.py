"""Attention stays causal without a mask where transformers would build one, while capturing and while tracing; and a
processor's own dropout: its masks' odds, its attention against the definition, and what it takes the place of."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig

from trainer.config.settings import LoraSettings
from trainer.model import attention
from trainer.model.attention import (
    BLOCK_SIZE,
    NUM_LEVELS,
    BlockwiseAttention,
    Dropout,
    dropout_scale,
    install_on_cpu,
    sample_keep_mask,
)
from trainer.model.lora import add_adapters
from trainer.model.loss import CausalLMLoss

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=0),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8),
}


def build(name: str, *, installed: bool = True) -> Any:
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    if installed:
        attention.install(causal)
    return causal


# --- without a mask ---


@pytest.mark.parametrize("is_capturing", [False, True])
def test_attention_is_causal_without_a_mask_in_eager_and_captured_steps(is_capturing, monkeypatch):
    """transformers itself builds one while a stream is capturing."""
    calls: list[tuple[Any, bool]] = []
    original = functional.scaled_dot_product_attention

    def record(*args: Any, attn_mask: Any = None, is_causal: bool = False, **kwargs: Any) -> torch.Tensor:
        calls.append((attn_mask, is_causal))
        return original(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    causal = build("gpt2")
    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    causal(input_ids=torch.arange(24).view(2, 12), use_cache=False)
    assert calls == [(None, True)] * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_own_attention_also_with_padding_and_sliding_windows(name, tmp_path):
    plain, causal, ids = build(name, installed=False), build(name), torch.arange(36).view(2, 18)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask}):
            assert torch.equal(causal(input_ids=ids, **kwargs).logits, plain(input_ids=ids, **kwargs).logits)
    causal.save_pretrained(tmp_path)
    assert attention.CAUSAL_NAME not in (tmp_path / "config.json").read_text()


# --- dropout on a processor ---


@pytest.mark.parametrize("probability", [0.1, 0.003])
def test_dropout_keeps_elements_with_its_probability_in_each_of_the_four_lanes(probability):
    """Within five standard deviations; a lane says nothing about the next, and the scale keeps the mean exactly."""
    torch.manual_seed(0)
    num_rows = 10**6
    stay = sample_keep_mask(torch.Size([num_rows, 4]), probability).double()
    rounded = round(probability * NUM_LEVELS) / NUM_LEVELS
    assert abs(rounded - probability) < 1 / NUM_LEVELS
    spread = math.sqrt(rounded * (1 - rounded) / num_rows)
    assert ((stay.mean(0) - (1 - rounded)).abs() < 5 * spread).all()
    correlation = torch.corrcoef(stay.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(num_rows)
    assert dropout_scale(probability) * (1 - rounded) == pytest.approx(1, rel=1e-15)
    assert dropout_scale(1.0) == NUM_LEVELS, "a configuration may say 1; one element of 65,536 stays"


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The masks that the blocks of an attention draw, in order."""
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(attention, "sample_keep_mask", lambda *args: drawn.append(sample_keep_mask(*args)) or drawn[-1])
    return drawn


@pytest.mark.parametrize(("width", "probability"), [(1, 0.1), (3 * BLOCK_SIZE + 7, 0.1), (BLOCK_SIZE, 0.0)])
def test_blockwise_attention_and_its_gradients_are_those_of_the_definition(masks, width, probability):
    """All pairs at once in float64, with the masks that the blocks drew."""
    torch.manual_seed(width)
    inputs = [torch.randn(2, width, 3, 16, requires_grad=True) for _ in range(3)]
    heads = [tensor.transpose(1, 2) for tensor in inputs]  # as they come out of the layer before
    by = torch.randn(2, 3, width, 16)
    output = BlockwiseAttention.apply(*heads, 0.25, probability)
    grads = torch.autograd.grad(output, inputs, by)
    assert len(masks) == -(-width // BLOCK_SIZE)
    query, key, value = (tensor.double() for tensor in heads)
    scores = (query @ key.transpose(2, 3) * 0.25).masked_fill(torch.ones(width, width).triu(1).bool(), -torch.inf)
    keep_mask = torch.zeros_like(scores)
    for block, mask in enumerate(masks):
        rows = slice(block * BLOCK_SIZE, block * BLOCK_SIZE + mask.shape[1])
        keep_mask[:, :, rows, : mask.shape[2]] = mask.view(2, 3, *mask.shape[1:])
    expected = (scores.softmax(3) * keep_mask * dropout_scale(probability)) @ value
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    for grad, other in zip(grads, torch.autograd.grad(expected, inputs, by.double()), strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def causal(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    return model.train()


def test_blockwise_attention_is_called_in_training_and_not_in_evaluation(causal, masks):
    ids = torch.arange(60).view(2, 30)
    causal.eval()
    with torch.no_grad():
        before = causal(ids).logits
        install_on_cpu(causal, causal)
        assert torch.equal(causal(ids).logits, before)
        ones = torch.ones(2, 5, dtype=torch.long)
        short = causal.generate(input_ids=ids[:, :5], attention_mask=ones, max_new_tokens=3, do_sample=False)
    assert short.shape == (2, 8)
    assert masks == []
    CausalLMLoss(causal.train(), None)(ids, ids)
    assert sum(mask.dim() == 3 and mask.shape[-2:] == (30, 30) for mask in masks) == 2, "once in each of the two layers"


def test_the_dropout_of_adapters_is_replaced_too_and_what_is_saved_stays_as_it_was(causal, tmp_path):
    module = add_adapters(causal, LoraSettings(dropout=0.2), ["c_attn"])
    names, config_before = set(module.state_dict()), causal.config.to_dict()
    install_on_cpu(module, causal)
    assert {layer.p for layer in module.modules() if type(layer) is Dropout} == {0.1, 0.2}
    assert not [layer for layer in module.modules() if type(layer) is nn.Dropout], "every one is replaced"
    assert set(module.state_dict()) == names
    assert causal.config.to_dict() == config_before
    module.save_pretrained(tmp_path)
    causal.config.save_pretrained(tmp_path)
    assert attention.BLOCKWISE_NAME not in "".join(file.read_text() for file in tmp_path.glob("*.json"))
