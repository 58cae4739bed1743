"""Logits made in pieces for any architecture whose head is a layer: the model's own loss and gradients."""

from typing import Any

import pytest
import torch
import transformers
from test_loss import (
    compute_gradients,
    hugging_face_gradients,
    losses_by_definition,
    make_batch,
)
from transformers import AutoModelForCausalLM

from trainer.model import loss as loss_module
from trainer.model.loss import CausalLMLoss, simulate_gpu

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "pad_token_id": 5}
OTHER_MODELS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "llama, tied": transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**GROUPED),
    "qwen2": transformers.Qwen2Config(**GROUPED),
    "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=2.0),
    "phi": transformers.PhiConfig(**GROUPED),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, pad_token_id=5),
    "opt": transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=97,
        word_embed_proj_dim=8,
        dropout=0.0,
    ),
    "granite": transformers.GraniteConfig(**GROUPED, logits_scaling=8.0),
    "cohere": transformers.CohereConfig(**GROUPED, logit_scale=0.25, eos_token_id=1),
    "bloom": transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=97, pad_token_id=5),
}


def make_other_model(name: str) -> Any:
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(OTHER_MODELS[name])
    for parameter in causal.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return causal


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_the_chunked_loss_of_other_models_is_that_of_their_own_logits(name, is_gpu, monkeypatch):
    """Heads with a bias, a scale, a cap, a projection; tied embeddings with a padding row, which gets no gradient."""
    causal = make_other_model(name)
    module, (ids, labels) = CausalLMLoss(causal, None), make_batch()
    ids[1, 6:9] = labels[1, 6:9] = 5
    assert module.verify() == ""
    expected = hugging_face_gradients(causal, ids, labels)
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", 7 * 4 * 97)
    with simulate_gpu(is_gpu):
        sums, grads = compute_gradients(module, ids, labels)
    assert sums.tolist() == pytest.approx(losses_by_definition(causal, ids, labels), rel=1e-5)
    for actual, other in zip(grads, expected, strict=True):
        assert (actual - other).norm() <= 1e-5 * (other.norm() + 0.1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_head_that_is_more_than_its_layer_is_found_at_the_start_and_all_logits_are_made(name):
    causal = make_other_model(name)
    original = causal.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 1.001  # what no configuration names
        return output

    causal.forward = forward
    module, (ids, labels) = CausalLMLoss(causal, None), make_batch()
    line = module.verify()
    assert line.startswith("all logits of a micro-batch are made at once, 0.00037 MiB a token: its output layer gives")
    assert module(ids, labels)[1].tolist() == pytest.approx(losses_by_definition(causal, ids, labels), rel=1e-5)
    assert causal.training, "as it was"
