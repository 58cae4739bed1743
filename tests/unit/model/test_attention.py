"""Attention stays causal without a mask where transformers would build one: while capturing and while tracing."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from trainer.model import attention

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=64, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=8),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    attention.install(causal)
    return causal


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """(has a mask, is causal) of every call of torch's attention."""
    seen: list[tuple[bool, bool]] = []
    original = functional.scaled_dot_product_attention

    def record(*args: Any, attn_mask: Any = None, is_causal: bool = False, **kwargs: Any) -> torch.Tensor:
        seen.append((attn_mask is not None, is_causal))
        return original(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    return seen


@pytest.mark.parametrize("is_capturing", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_attention_is_causal_without_a_mask_in_eager_and_captured_steps(name, is_capturing, calls, monkeypatch):
    causal, ids = build(name), torch.arange(24).view(2, 12)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    causal(input_ids=ids, use_cache=False)
    assert calls == [(False, True)] * 2


def test_transformers_itself_would_build_a_mask_while_a_stream_is_capturing(calls, monkeypatch):
    """The finding that `trainer.model.attention` answers; when this fails it has become superfluous."""
    causal = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["gpt2"])).eval()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    causal(input_ids=torch.arange(12)[None], use_cache=False)
    assert calls == [(True, False)] * 2


def test_logits_are_those_of_transformers_own_attention_also_with_padding_and_sliding_windows():
    for name in CONFIGS:
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
        causal = build(name)
        ids = torch.arange(36).view(2, 18)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        with torch.no_grad():
            for kwargs in ({}, {"attention_mask": mask}):
                assert torch.equal(causal(input_ids=ids, **kwargs).logits, plain(input_ids=ids, **kwargs).logits), name


def test_the_saved_configuration_does_not_name_the_attention(tmp_path):
    build("gpt2").save_pretrained(tmp_path)
    assert attention.ATTENTION_NAME not in (tmp_path / "config.json").read_text()
