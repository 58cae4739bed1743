"""The base and its adapters: how many weights train, by closed formulas, on which layers, and that all start alike. An
adapter of rank r on a layer [in, out] has r * (in + out) parameters, dora's one more for each output. The layers of
GPT-2's blocks are c_attn [d, 3d], c_proj [d, d], c_fc [d, 4d] and c_proj [4d, d], with biases of the outputs' sizes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.settings import LoraSettings, Settings
from trainer.data import hf_hub
from trainer.model.build import build_model, compute_fingerprint, save_base_model
from trainer.model.lora import resolve_target_modules

D, LAYERS = 768, 12  # GPT-2 124M
LORA = LAYERS * 8 * ((D + 3 * D) + (D + D) + (D + 4 * D) + (4 * D + D))
OUTPUTS = LAYERS * (3 * D + D + 4 * D + D)
BIASES, NORMS = LAYERS * 11 * D + D, LAYERS * 4 * D + 2 * D
WTE = 50_257 * D
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(vocab_size=97, **SIZES)


def parse_settings(model: str, flags: str = "") -> Settings:
    return cli.parse_args(["--mode", "lora", "--model", model, *flags.split()]).settings


def make_llama(session_dir: Path) -> str:
    """A folder with a random Llama: all its layers are Linear, and its output layer is not tied."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(session_dir / "llama")
    return str(session_dir / "llama")


@pytest.mark.parametrize(
    ("flags", "formula", "expected"),
    [
        ("--mode full", WTE + 1024 * D + LAYERS * 12 * D * D + BIASES + NORMS - LAYERS * 2 * D - D, 124_439_808),
        ("", LORA, 1_179_648),
        ("--lora-target-modules c_attn,attn.c_proj", LAYERS * 8 * ((D + 3 * D) + (D + D)), 442_368),
        ("--lora-target-modules 11.attn.c_attn,h.3.mlp.c_fc", 8 * (4 * D + 5 * D), 55_296),
        ("--adapter dora", LORA + OUTPUTS, 1_262_592),
        ("--modules-to-save wte,lm_head", LORA + WTE, 39_777_024),  # tied: the same tensor
        # the norms' biases count once
        ("--modules-to-save layernorm,bias", LORA + NORMS + BIASES - LAYERS * 2 * D - D, 1_300_992),
    ],
)
def test_each_method_trains_the_number_of_parameters_of_its_formula(flags, formula, expected):
    facts = build_model(parse_settings("gpt2", f"--init random {flags}"), on_meta=True).metadata
    assert facts["trainable"] == formula == expected
    assert facts["parameters"] == 124_439_808, "the card's number, of the base model, adapters left out"
    assert facts["share"] == expected / 124_439_808


# --- targets ---


def test_lora_targets_are_every_layer_but_the_output_or_the_names_that_were_given():
    causal = AutoModelForCausalLM.from_config(LLAMA)
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    given = ("1.self_attn.q_proj", "mlp.up_proj")
    for targets, expected in (((), every), (("all", "q_proj"), every), (given, list(given))):
        assert resolve_target_modules(causal, LoraSettings(target_modules=targets)) == expected


@pytest.mark.parametrize("targets", ["proj", "lm_head", "c_attn,h.9.mlp.c_fc"])
def test_a_lora_target_that_matches_no_layer_or_the_output_is_refused_even_beside_one_that_does(tiny_model, targets):
    with pytest.raises(UserError) as caught:
        build_model(parse_settings(tiny_model, f"--lora-target-modules {targets}"))
    odd = targets.split(",")[-1]
    assert str(caught.value) == f"--lora-target-modules {odd}: matches no layer; this model has c_attn, c_fc, c_proj"


# --- the base ---


def test_both_modes_start_from_the_same_base_and_a_random_one_is_saved_as_it_was(tiny_model, tmp_path):
    def fingerprint(flags: str, model: str = tiny_model) -> str:
        return build_model(parse_settings(model, flags)).metadata["fingerprint"]

    stored, random = fingerprint("--mode full"), fingerprint("--mode full --init random")
    assert (stored, random) == (fingerprint(""), fingerprint("--init random"))
    save_base_model(parse_settings(tiny_model, "--init random"), tmp_path / "base")
    assert fingerprint("", str(tmp_path / "base")) == random
    causal = build_model(parse_settings(tiny_model, "--mode full")).causal
    with torch.no_grad():
        causal.transformer.ln_f.bias[-1] += 1e-6
    assert len({stored, random, compute_fingerprint(causal), fingerprint("--init random --seed 43")}) == 4


def test_a_missing_model_is_one_line_that_names_the_flag(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"--model no-such-org/no-such-model: no such folder.*pass --model FOLDER"):
        build_model(parse_settings("no-such-org/no-such-model"))
    message = r"--model gpt2: .*run `hf download gpt2` where it can; .*or --model demo-base, the embedded toy$"
    with pytest.raises(UserError, match=message):  # own data without --model are never trained on the toy
        build_model(cli.parse_args(["--mode", "full", "--data", "records.csv"]).settings)
    monkeypatch.setattr(hf_hub, "is_reachable", lambda: True)
    with pytest.raises(UserError, match=r"--model no-such-org/no-such-model: .*and the Hub gives no config.json; pass"):
        build_model(parse_settings("no-such-org/no-such-model"))
