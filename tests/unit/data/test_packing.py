"""Packed rows: each example once, none sees another, the losses and gradients of one example a row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
)

from trainer.data.dataset import TokenDataset
from trainer.data.sampler import collate, pack_rows
from trainer.model import attention
from trainer.model.loss import CausalLMLoss, find_packing_problem

VOCABULARY, WIDTH = 97, 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}
OTHER_CONFIGS = {
    "gemma2": Gemma2Config(**SMALL, head_dim=8, sliding_window=16),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
}


def make_dataset(lengths, seed=0, with_mask=False):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(0, VOCABULARY, offsets[-1]).astype(np.uint16)
    mask = None
    if with_mask:
        mask = (rng.random(offsets[-1]) < 0.5).astype(np.uint8)
        mask[offsets[:-1]] = 0
        mask[offsets[1:] - 1] = 1
    return TokenDataset(ids=ids, offsets=offsets, target_mask=mask)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, WIDTH), min_size=1, max_size=20))
def test_every_example_stands_in_one_row_and_no_row_is_too_long(lengths):
    rows = pack_rows(np.array(lengths), WIDTH)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= WIDTH for row in rows)
    assert len(rows) <= 1 + 2 * sum(lengths) // WIDTH


@pytest.mark.parametrize(
    ("family", "with_mask", "attention"),
    [("gpt2", True, "eager"), ("gpt2", False, "sdpa"), ("llama", False, "sdpa"), ("qwen3", True, "sdpa")],
)
def test_packed_rows_give_each_example_the_loss_and_the_weights_the_gradient_of_single_rows(
    family, with_mask, attention
):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention).double().eval()
    loss_module = CausalLMLoss(model, None)
    dataset = make_dataset([9, 30, 5, 12, 40, 3, 8], with_mask=with_mask)
    indices = np.arange(len(dataset))

    def loss_and_grads(batch):
        model.zero_grad()
        positions = () if batch.position_ids is None else (torch.from_numpy(batch.position_ids),)
        total, rows = loss_module(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels), *positions)
        total.backward()
        return rows, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    single_rows, single_grads = loss_and_grads(collate(dataset, indices, 0))
    packed = collate(dataset, indices, 0, WIDTH)
    packed_rows, packed_grads = loss_and_grads(packed)
    by_row = [sum(float(single_rows[place]) for place in row) for row in pack_rows(dataset.lengths(), WIDTH)]
    torch.testing.assert_close(packed_rows.double(), torch.tensor(by_row).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed_grads, single_grads, rtol=1e-6, atol=1e-6)
    leaked = packed.__class__(**{**vars(packed), "position_ids": None})  # one long text instead
    assert (loss_and_grads(leaked)[1] - single_grads).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*CONFIGS, *OTHER_CONFIGS])
def test_families_whose_packed_examples_see_one_another_are_found_at_the_start(family, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**CONFIGS, **OTHER_CONFIGS}[family]).to(dtype)
    attention.install(model)
    own_attention = model.config._attn_implementation
    assert bool(find_packing_problem(model)) == (family in ("bloom", "mamba"))
    assert model.config._attn_implementation == own_attention


def test_an_attention_that_does_not_mask_packed_rows_is_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["gpt2"], attn_implementation="sdpa")
    attention.install(model)
    batch = collate(make_dataset([5, 6]), np.arange(2), 0, WIDTH)
    with pytest.raises(ValueError, match="packed rows need an attention that masks"):
        CausalLMLoss(model, None)(*map(torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids)))
