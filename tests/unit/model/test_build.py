"""The base model and its adapters: which layers are adapted, how many parameters that is, and that it changes nothing.

Counts are held against closed formulas. An adapter of rank r on a layer [in, out] has r * (in + out) parameters; the
layers of GPT-2's blocks are c_attn [d, 3d], c_proj [d, d], c_fc [d, 4d] and c_proj [4d, d].
"""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig
from transformers.activations import NewGELUActivation

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.settings import LoraSettings, Settings
from trainer.model.build import (
    TrainableModel,
    build_model,
    compute_fingerprint,
    get_max_positions,
    save_base_model,
)
from trainer.model.lora import resolve_target_modules as lora_targets

D, LAYERS = 768, 12  # GPT-2 124M


def parse_settings(model_dir: str, mode: str = "lora", *flags: str) -> Settings:
    return cli.parse_args(["--mode", mode, "--model", model_dir, *flags]).settings


def gpt2_settings(mode: str = "lora", *flags: str) -> Settings:
    return parse_settings("gpt2", mode, "--init", "random", *flags)


def build_from_config(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA, NEOX = LlamaConfig(vocab_size=97, **SIZES), GPTNeoXConfig(vocab_size=97, **SIZES)
GPT2 = GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2)


# --- counts ---


def test_gpt2_has_the_cards_number_of_parameters():
    facts = build_model(gpt2_settings("full"), on_meta=True).metadata
    assert facts["parameters"] == facts["trainable"] == 124_439_808  # the card's
    assert facts["share"] == 1
    d = D
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 4 * d
    assert facts["parameters"] == 50_257 * d + 1024 * d + LAYERS * block + 2 * d  # the tied output layer counts once


# --- targets ---


@pytest.mark.parametrize(
    ("config", "targets", "expected"),
    [
        (LLAMA, (), "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),  # every layer but the output
        (LLAMA, ("attention",), "k_proj o_proj q_proj v_proj"),
        (LLAMA, ("mlp",), "down_proj gate_proj up_proj"),
        (LLAMA, ("*.layers.1.*.q_proj",), "1.self_attn.q_proj"),
        (LLAMA, ("model.layers.1.mlp.up_proj",), "1.mlp.up_proj"),
        (NEOX, (), "dense dense_4h_to_h dense_h_to_4h query_key_value"),
        (NEOX, ("attention",), "dense query_key_value"),
        (NEOX, ("mlp",), "dense_4h_to_h dense_h_to_4h"),
        (GPT2, (), "c_attn c_fc c_proj"),
        (GPT2, ("attention",), "attn.c_proj c_attn"),  # the MLP has a c_proj too
    ],
)
def test_lora_targets_become_the_shortest_unambiguous_layer_names(config, targets, expected):
    assert lora_targets(build_from_config(config), LoraSettings(target_modules=targets)) == expected.split()


@pytest.mark.parametrize("config", [GPT2, LLAMA, NEOX])
def test_the_output_layer_is_never_adapted(config):
    causal = build_from_config(config)
    output = next(n for n, m in causal.named_modules() if m is causal.get_output_embeddings())
    assert output not in lora_targets(causal, LoraSettings())
    with pytest.raises(UserError, match=f"--lora-target-modules {output}: matches no layer"):
        lora_targets(causal, LoraSettings(target_modules=(output,)))


@pytest.mark.parametrize(
    "targets", ["q_proj", "c_attn,q_proj", "q_proj,c_attn", "proj", "attn", "wte", "c_attn,*.h.9.*"]
)
def test_a_lora_target_that_matches_nothing_is_refused_even_beside_one_that_does(tiny_model, targets):
    with pytest.raises(UserError) as caught:
        build_model(parse_settings(tiny_model, "lora", "--lora-target-modules", targets))
    odd = next(name for name in targets.split(",") if name != "c_attn")
    assert str(caught.value) == f"--lora-target-modules {odd}: matches no layer; this model has c_attn, c_fc, c_proj"


# --- modes ---


def test_each_mode_trains_only_what_it_says(tiny_model):
    built = build_model(parse_settings(tiny_model))
    trained = {n for n, p in built.module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    full = build_model(parse_settings(tiny_model, "full"))
    assert all(p.requires_grad for p in full.module.parameters())
    assert full.causal.config.use_cache, "generation keeps its cache"
    assert get_max_positions(full.causal.config) == 32


def test_a_conv1d_adapter_computes_what_its_formula_says(tiny_model):
    """W is stored [in, out], so y = xW + b + (alpha / r) x A^T B^T."""
    built = build_model(
        parse_settings(tiny_model, "lora", "--lora-target-modules", "c_attn", "--lora-rank", "2", "--lora-alpha", "6")
    )
    layer = built.causal.transformer.h[0].attn.c_attn
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(3, 16)
    base = layer.base_layer
    torch.testing.assert_close(layer(x), x @ base.weight + base.bias + 6 / 2 * x @ a.T @ b.T)


# --- the same start ---


def fingerprint(model_dir: str, mode: str = "lora", *flags: str) -> str:
    return build_model(parse_settings(model_dir, mode, *flags)).metadata["fingerprint"]


def test_both_modes_start_from_the_same_base_and_a_random_one_is_saved_as_it_was(tiny_model, tmp_path):
    stored = {fingerprint(tiny_model, mode) for mode in ("full", "lora")}
    random = {fingerprint(tiny_model, mode, "--init", "random") for mode in ("full", "lora")}
    assert len(stored) == len(random) == 1
    assert stored != random
    save_base_model(parse_settings(tiny_model, "lora", "--init", "random"), tmp_path / "base")
    assert {fingerprint(str(tmp_path / "base"))} == random
    causal = build_model(parse_settings(tiny_model, "full")).causal
    with torch.no_grad():
        causal.transformer.ln_f.bias[-1] += 1e-6
    assert {compute_fingerprint(causal)} != stored, "every weight counts"


def test_the_seed_decides_random_weights_and_adapters(tiny_model):
    def adapters(*more: str) -> torch.Tensor:
        module = build_model(parse_settings(tiny_model, "lora", *more)).module
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(adapters(), adapters())
    assert not torch.equal(adapters(), adapters("--seed", "43"))


# --- finding the model ---


def test_tied_embeddings_are_detected_from_the_tensors():
    llama = TrainableModel(module=None, causal=build_from_config(LLAMA), metadata={})
    assert not llama.has_tied_embeddings
    assert build_model(gpt2_settings("full"), on_meta=True).has_tied_embeddings


def test_a_missing_model_is_one_line_that_names_the_flag(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"--model no-such-org/no-such-model: no such folder.*pass --model FOLDER"):
        build_model(parse_settings("no-such-org/no-such-model"))


def test_weights_are_float32_whatever_the_folder_holds(tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model).half().save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    built = build_model(parse_settings(str(tmp_path), "full"))
    assert {p.dtype for p in built.module.parameters()} == {torch.float32}


def test_the_one_kernel_activation_equals_that_of_transformers(tiny_model):
    """The same formula: outputs and gradients differ by rounding only, and the exported configuration is untouched."""
    model = build_model(parse_settings(tiny_model, "full"))
    kinds = {type(m).__name__ for m in model.causal.modules()}
    assert "GELU" in kinds
    assert "NewGELUActivation" not in kinds
    assert model.causal.config.activation_function == "gelu_new"
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    answers = []
    for activation in (NewGELUActivation(), next(m for m in model.causal.modules() if isinstance(m, torch.nn.GELU))):
        leaf = x.clone().requires_grad_()
        out = activation(leaf)
        out.sum().backward()
        answers.append((out.detach(), leaf.grad))
    for theirs, ours in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
