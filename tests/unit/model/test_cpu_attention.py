"""Dropout on a processor: the masks' odds, the attention against its definition, what it takes the place of."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trainer.config.settings import LoraSettings
from trainer.model import cpu_attention
from trainer.model.cpu_attention import (
    BLOCK_SIZE,
    NUM_LEVELS,
    BlockwiseAttention,
    Dropout,
    dropout_scale,
    install,
    sample_keep_mask,
)
from trainer.model.lora import add_adapters
from trainer.model.loss import CausalLMLoss

NUM_ELEMENTS = 4 * 10**6


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.003])
def test_dropout_keeps_elements_with_its_probability_in_each_of_the_four_lanes(probability):
    """Within five standard deviations; and a lane says nothing about the next."""
    torch.manual_seed(0)
    stay = sample_keep_mask(torch.Size([NUM_ELEMENTS // 4, 4]), probability).double()
    rounded = round(probability * NUM_LEVELS) / NUM_LEVELS
    spread = math.sqrt(rounded * (1 - rounded) / (NUM_ELEMENTS // 4))
    assert ((stay.mean(0) - (1 - rounded)).abs() < 5 * spread).all()
    correlation = torch.corrcoef(stay.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(NUM_ELEMENTS // 4)


def test_the_rounding_of_a_dropout_probability_is_small_and_its_scale_is_exact():
    assert abs(round(0.1 * NUM_LEVELS) / NUM_LEVELS - 0.1) < 1 / NUM_LEVELS
    for probability in (0.1, 0.5, 0.003):
        assert dropout_scale(probability) * (1 - round(probability * NUM_LEVELS) / NUM_LEVELS) == pytest.approx(
            1, rel=1e-15
        )
    assert dropout_scale(1.0) == NUM_LEVELS, "a configuration may say 1; one element of 65,536 stays"
    assert sample_keep_mask(torch.Size([7]), 0.0).all()


def test_dropout_masks_depend_on_the_seed_and_not_on_the_threads():
    masks, threads = [], torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(5)
            masks += [sample_keep_mask(torch.Size([1000, 333]), 0.1)]
        other = sample_keep_mask(torch.Size([1000, 333]), 0.1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*masks)
    assert not torch.equal(masks[0], other)


def test_the_dropout_layer_scales_and_passes_gradients_through_the_same_mask():
    layer, inputs = Dropout(0.25), torch.randn(50, 40, requires_grad=True)
    output = layer(inputs)
    output.backward(torch.ones_like(output))
    stay = output != 0
    assert 0.15 < 1 - stay.double().mean() < 0.35
    torch.testing.assert_close(output[stay], inputs[stay] * 4 / 3)
    torch.testing.assert_close(inputs.grad, stay * (4 / 3))
    layer.eval()
    assert layer(inputs) is inputs


def attention_by_definition(
    query, key, value, scaling: float, masks: list[torch.Tensor], probability: float
) -> torch.Tensor:
    """All pairs at once in float64, with the masks that the blocks drew."""
    width = query.shape[2]
    scores = query.double() @ key.double().transpose(2, 3) * scaling
    probs = scores.masked_fill(torch.ones(width, width).triu(1).bool(), -torch.inf).softmax(3)
    keep_mask = torch.zeros_like(probs)
    start = 0
    for mask in masks:
        end = start + mask.shape[1]
        keep_mask[:, :, start:end, : mask.shape[2]] = mask.view(*query.shape[:2], *mask.shape[1:])
        start = end
    return (probs * keep_mask * dropout_scale(probability)) @ value.double()


@pytest.mark.parametrize("probability", [0.1, 0.0])
@pytest.mark.parametrize("width", [1, BLOCK_SIZE - 1, BLOCK_SIZE, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE + 7])
def test_blockwise_attention_and_its_gradients_are_those_of_the_definition(monkeypatch, width, probability):
    torch.manual_seed(width)
    masks: list[torch.Tensor] = []
    monkeypatch.setattr(
        cpu_attention, "sample_keep_mask", lambda *inputs: masks.append(sample_keep_mask(*inputs)) or masks[-1]
    )
    inputs = [torch.randn(2, width, 3, 16, requires_grad=True) for _ in range(3)]
    heads = [actual.transpose(1, 2) for actual in inputs]  # as they come out of the layer before
    by = torch.randn(2, 3, width, 16)
    output = BlockwiseAttention.apply(*heads, 0.25, probability)
    grads = torch.autograd.grad(output, inputs, by)
    expected = attention_by_definition(*heads, 0.25, masks, probability)
    assert len(masks) == -(-width // BLOCK_SIZE)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    expected_grads = torch.autograd.grad(expected, inputs, by.double())
    for actual, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-5)
    if not probability:
        torch.testing.assert_close(output, functional.scaled_dot_product_attention(*heads, is_causal=True, scale=0.25))


def test_attention_in_bf16_is_nearly_as_exact_as_torchs_own_kernel_without_dropout(monkeypatch):
    """Outputs and gradients against float64: scores and softmax are not rounded, what goes into a product is."""
    torch.manual_seed(0)
    masks: list[torch.Tensor] = []
    monkeypatch.setattr(
        cpu_attention, "sample_keep_mask", lambda *inputs: masks.append(sample_keep_mask(*inputs)) or masks[-1]
    )
    inputs = [(3 * torch.randn(2, 3, 200, 32)).bfloat16().requires_grad_() for _ in range(3)]
    by = torch.randn(2, 3, 200, 32).bfloat16()

    def errors(attention: torch.Tensor, expected: torch.Tensor) -> list[float]:
        ours, exact = torch.autograd.grad(attention, inputs, by), torch.autograd.grad(expected, inputs, by.double())
        pairs = zip((attention, *ours), (expected, *exact), strict=True)
        return [((actual.double() - other).norm() / other.norm()).item() for actual, other in pairs]

    with torch.autocast("cpu", torch.bfloat16):
        attention = BlockwiseAttention.apply(*inputs, 32**-0.5, 0.1)
    assert attention.dtype == torch.bfloat16
    own_errors = errors(attention, attention_by_definition(*inputs, 32**-0.5, masks, 0.1))
    torchs = functional.scaled_dot_product_attention(*inputs, is_causal=True)
    whole = [torch.ones_like(mask) for mask in masks]
    for actual, other in zip(
        own_errors, errors(torchs, attention_by_definition(*inputs, 32**-0.5, whole, 0.0)), strict=True
    ):
        assert actual < 3 * other


@pytest.fixture
def causal(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    return model.train()


def compute_gradients(causal, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    causal.zero_grad()
    ids = torch.arange(90).view(3, 30)
    CausalLMLoss(causal, None)(ids, ids)[0].backward()
    return [p.grad.clone() for p in causal.parameters() if p.requires_grad]


def test_every_dropout_of_a_model_is_replaced_and_its_mean_gradient_stays(causal):
    """Over many seeds both kinds have the same mean; the difference is measured in its own standard errors."""
    seeds = range(64)

    def sample() -> torch.Tensor:
        return torch.stack(
            [torch.cat([g.flatten()[:40] for g in compute_gradients(causal, seed)]) for seed in seeds]
        ).double()

    theirs = sample()
    install(causal, causal)
    layers = [layer for layer in causal.modules() if isinstance(layer, nn.Dropout)]
    assert len(layers) == 1 + 3 * 2
    assert all(type(layer) is Dropout for layer in layers)
    ours = sample()
    errors = (ours.var(0) + theirs.var(0)).div(len(seeds)).sqrt()
    apart = ((ours.mean(0) - theirs.mean(0)) / errors.clamp(min=1e-12))[errors > 1e-9]
    assert len(apart) > 500
    assert apart.square().mean() < 1.5, "one, if the means are the same"
    assert 0.8 < float(ours.var(0).mean() / theirs.var(0).mean()) < 1.25


def test_blockwise_attention_is_called_in_training_and_not_in_evaluation(causal, monkeypatch):
    calls = []
    honest = BlockwiseAttention.apply
    monkeypatch.setattr(BlockwiseAttention, "apply", lambda *args: calls.append(args[-1]) or honest(*args))
    ids = torch.arange(60).view(2, 30)
    causal.eval()
    with torch.no_grad():
        before = causal(ids).logits
        install(causal, causal)
        assert torch.equal(causal(ids).logits, before)
        short = causal.generate(
            input_ids=ids[:, :5], attention_mask=torch.ones(2, 5, dtype=torch.long), max_new_tokens=3, do_sample=False
        )
    assert short.shape == (2, 8)
    assert calls == []
    causal.train()
    compute_gradients(causal, 0)
    assert calls == [0.1, 0.1], "once in each of the two layers"


def test_activation_checkpointing_draws_the_same_dropout_masks(causal):
    install(causal, causal)
    once = compute_gradients(causal, 3)
    causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for actual, other in zip(once, compute_gradients(causal, 3), strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-6, atol=1e-7)


def test_the_dropout_of_adapters_is_replaced_too_and_what_is_saved_stays_as_it_was(causal, tmp_path):
    module = add_adapters(causal, LoraSettings(dropout=0.2), ["c_attn"])
    names, config_before = set(module.state_dict()), causal.config.to_dict()
    install(module, causal)
    assert {layer.p for layer in module.modules() if type(layer) is Dropout} == {0.1, 0.2}
    assert not [layer for layer in module.modules() if type(layer) is nn.Dropout]
    assert set(module.state_dict()) == names
    assert causal.config.to_dict() == config_before
    module.save_pretrained(tmp_path)
    causal.config.save_pretrained(tmp_path)
    assert cpu_attention.ATTENTION_NAME not in "".join(file.read_text() for file in tmp_path.glob("*.json"))


def test_other_models_and_models_without_dropout_keep_their_attention(tiny_model):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=97, attention_dropout=0.1, **shape))
    none = AutoModelForCausalLM.from_pretrained(tiny_model, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    for causal in (llama, none):
        install(causal, causal)
        assert causal.config._attn_implementation == "sdpa"
        assert not [layer for layer in causal.modules() if type(layer) is Dropout]
