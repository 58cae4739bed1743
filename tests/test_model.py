"""The base model and its adapters: which layers are adapted, how many parameters that is, and that it changes nothing.

Counts are held against closed formulas. An adapter of rank r on a layer [in, out] has r * (in + out) parameters; the
layers of GPT-2's blocks are c_attn [d, 3d], c_proj [d, d], c_fc [d, 4d] and c_proj [4d, d].
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.schema import LoraSettings, ModelSettings, Settings
from trainer.model.build import Model, build, fingerprint, load_config, merge_adapters, positions, save_base
from trainer.model.lora import targets as lora_targets

D, LAYERS = 768, 12  # GPT-2 124M


def settings(folder: str, mode: str = "lora", *more: str) -> Settings:
    return cli.read(["--mode", mode, "--model", folder, *more]).settings


def gpt2(mode: str = "lora", *more: str) -> Settings:
    return settings("gpt2", mode, "--init", "random", *more)


def tiny_of(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


LLAMA = LlamaConfig(
    vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
)  # fmt: skip
NEOX = GPTNeoXConfig(vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


# --- counts ---


def test_gpt2_has_the_cards_number_of_parameters():
    facts = build(gpt2("full"), on_meta=True).facts
    assert facts["parameters"] == facts["trainable"] == 124_439_808  # the card's
    assert facts["share"] == 1
    d = D
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + 4 * d
    assert facts["parameters"] == 50_257 * d + 1024 * d + LAYERS * block + 2 * d  # the tied output layer counts once


@pytest.mark.parametrize(
    ("targets", "formula", "expected"),
    [
        ("", LAYERS * 8 * ((D + 3 * D) + (D + D) + (D + 4 * D) + (4 * D + D)), 1_179_648),
        ("c_attn", LAYERS * 8 * (D + 3 * D), 294_912),
        ("mlp.c_proj", LAYERS * 8 * (4 * D + D), 368_640),
        ("attn.c_proj,c_fc", LAYERS * 8 * (D + D + D + 4 * D), 516_096),
    ],
)
def test_lora_trains_the_number_of_parameters_of_the_formula(targets, formula, expected):
    more = ["--lora-targets", targets] if targets else []
    facts = build(gpt2("lora", *more), on_meta=True).facts
    assert facts["trainable"] == formula == expected
    assert facts["parameters"] == 124_439_808, "of the base model, adapters left out"
    assert facts["share"] == expected / 124_439_808


def test_the_rank_multiplies_the_adapters():
    assert build(gpt2("lora", "--lora-rank", "16"), on_meta=True).facts["trainable"] == 2 * 1_179_648


# --- targets ---


def test_left_out_targets_are_every_layer_but_the_output(tiny):
    assert build(settings(tiny)).facts["lora_targets"] == ["c_attn", "c_fc", "c_proj"]
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert lora_targets(tiny_of(LLAMA), LoraSettings()) == names
    assert lora_targets(tiny_of(NEOX), LoraSettings()) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


@pytest.mark.parametrize("config", [GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97), LLAMA, NEOX])
def test_the_output_layer_is_never_adapted(config):
    causal = tiny_of(config)
    output = next(n for n, m in causal.named_modules() if m is causal.get_output_embeddings())
    assert output not in lora_targets(causal, LoraSettings())
    with pytest.raises(UserError, match=f"--lora-targets {output}: matches no layer"):
        lora_targets(causal, LoraSettings(targets=(output,)))


@pytest.mark.parametrize("targets", ["q_proj", "c_attn,q_proj", "q_proj,c_attn", "proj", "attn", "wte"])
def test_a_target_that_matches_nothing_is_refused_even_beside_one_that_does(tiny, targets):
    with pytest.raises(UserError) as caught:
        build(settings(tiny, "lora", "--lora-targets", targets))
    odd = next(name for name in targets.split(",") if name != "c_attn")
    assert str(caught.value) == f"--lora-targets {odd}: matches no layer; this model has c_attn, c_fc, c_proj"


def test_a_target_may_name_one_layer(tiny):
    built = build(settings(tiny, "lora", "--lora-targets", "transformer.h.1.mlp.c_fc"))
    names = [n for n, p in built.module.named_parameters() if p.requires_grad]
    assert len(names) == 2
    assert all("h.1.mlp.c_fc" in name for name in names)


# --- modes ---


def test_each_mode_trains_only_what_it_says(tiny):
    assert all(p.requires_grad for p in build(settings(tiny, "full")).module.parameters())
    built = build(settings(tiny))
    assert built.is_adapter
    trained = {n for n, p in built.module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 4
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    assert not build(settings(tiny, "full")).is_adapter


def test_adapters_start_as_the_identity_and_do_something_once_they_moved(tiny):
    ids = torch.arange(1, 31)[None]
    with torch.no_grad():
        before = build(settings(tiny, "full")).module.eval()(ids).logits
        built = build(settings(tiny))
        assert torch.equal(built.module.eval()(ids).logits, before)
        for name, parameter in built.module.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
        assert (built.module(ids).logits - before).abs().max() > 0.1


def test_a_conv1d_adapter_computes_what_its_formula_says(tiny):
    """W is stored [in, out], so y = xW + b + (alpha / r) x A^T B^T."""
    built = build(settings(tiny, "lora", "--lora-targets", "c_attn", "--lora-rank", "2", "--lora-alpha", "6"))
    layer = built.causal.transformer.h[0].attn.c_attn
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(3, 16)
    base = layer.base_layer
    torch.testing.assert_close(layer(x), x @ base.weight + base.bias + 6 / 2 * x @ a.T @ b.T)


def test_merged_adapters_answer_alike_and_stay_tied(tiny):
    built = build(settings(tiny))
    with torch.no_grad():
        for name, parameter in built.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        ids = torch.arange(1, 31)[None]
        expected = built.module.eval()(ids).logits
        assert built.tied
        merged = merge_adapters(built).eval()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-4)  # float32, logits of 30
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert not any("lora" in name for name, _ in merged.named_parameters())


# --- the same start ---


def test_both_modes_start_from_the_same_base(tiny):
    assert build(settings(tiny)).facts["fingerprint"] == build(settings(tiny, "full")).facts["fingerprint"]
    random = [build(settings(tiny, mode, "--init", "random")).facts["fingerprint"] for mode in ("full", "lora")]
    assert random[0] == random[1]
    assert random[0] != build(settings(tiny)).facts["fingerprint"]


def test_the_seed_decides_random_weights_and_adapters(tiny):
    def adapters(*more: str) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in build(settings(tiny, "lora", *more)).module.parameters()])

    assert torch.equal(adapters(), adapters())
    assert not torch.equal(adapters(), adapters("--seed", "43"))


def test_the_fingerprint_sees_every_weight(tiny):
    causal = build(settings(tiny, "full")).causal
    before = fingerprint(causal)
    with torch.no_grad():
        causal.transformer.ln_f.bias[-1] += 1e-6
    assert fingerprint(causal) != before


def test_the_kept_random_base_is_the_one_that_was_built(tiny, tmp_path):
    wanted = settings(tiny, "lora", "--init", "random")
    save_base(wanted, tmp_path / "base")
    assert build(settings(str(tmp_path / "base"))).facts["fingerprint"] == build(wanted).facts["fingerprint"]


def test_training_leaves_the_cache_of_generation_on(tiny):
    assert build(settings(tiny, "full")).causal.config.use_cache


# --- finding the model ---


def test_tied_is_what_the_tensors_say():
    llama = Model(module=None, causal=tiny_of(LLAMA), facts={})
    assert not llama.tied
    assert build(gpt2("full"), on_meta=True).tied


def test_the_longest_row_comes_from_the_configuration(tiny):
    assert positions(load_config(ModelSettings(model=tiny))) == 32
    assert positions(LLAMA) == 2048


@pytest.mark.parametrize(
    ("remove", "named", "said"),
    [("config.json", "tiny", "has no config.json"), ("model.safetensors", "tiny", "has no weights")],
)
def test_a_folder_without_a_model_is_one_line_that_names_the_flag(shelf, tmp_path, remove, named, said):
    folder = tmp_path / named
    shutil.copytree(make_tiny(shelf / "for-removal", dropout=0.0), folder)
    (folder / remove).unlink()
    with pytest.raises(UserError) as caught:
        build(settings(str(folder)))
    assert said in str(caught.value)
    assert "--model FOLDER" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_nowhere_names_the_flag(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"--model no-such-org/no-such-model: no such folder.*pass --model FOLDER"):
        build(settings("no-such-org/no-such-model"))


def test_weights_are_float32_whatever_the_folder_holds(tiny, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(tiny).half()
    half.save_pretrained(tmp_path / "half")
    built = build(settings(str(tmp_path / "half"), "full"))
    assert {p.dtype for p in built.module.parameters()} == {torch.float32}
    assert Path(tiny, "model.safetensors").stat().st_size > (tmp_path / "half" / "model.safetensors").stat().st_size


def test_the_activation_is_transformers_own_in_one_kernel(tiny):
    """The same formula: outputs and gradients differ by rounding only, and the exported configuration is untouched."""
    from transformers.activations import NewGELUActivation

    model = build(cli.read(["--mode", "full", "--model", tiny]).settings)
    kinds = {type(m).__name__ for m in model.causal.modules()}
    assert "GELU" in kinds
    assert "NewGELUActivation" not in kinds
    assert model.causal.config.activation_function == "gelu_new"
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    answers = []
    for activation in (NewGELUActivation(), next(m for m in model.causal.modules() if isinstance(m, torch.nn.GELU))):
        given = x.clone().requires_grad_()
        out = activation(given)
        out.sum().backward()
        answers.append((out.detach(), given.grad))
    for theirs, ours in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
