"""The table of model families: each trains, resumes bitwise, is exported and merged as what it was, on two ranks."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import prepare_data
from helpers.matrix import make_job
from helpers.method_matrix import assert_promises, launch_whole_and_resumed
from helpers.tiny_inputs import tiny_argv
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.distributed.process_group import simulated_context
from trainer.export import export_cli
from trainer.model.build import TrainableModel, build_model
from trainer.training.run_plan import validate_early

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 1}
LLAMA_LAYERS = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
NEOX_LAYERS = "dense dense_4h_to_h dense_h_to_4h query_key_value"
#: {model_type: (fields of its configuration beside SHAPE, the layers that get adapters)}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, "c_attn c_fc c_proj"),
    "gpt_neox": ({}, NEOX_LAYERS),
    "llama": ({}, LLAMA_LAYERS),
    "qwen3": (GROUPED | {"head_dim": 8}, LLAMA_LAYERS),
    "opt": ({"ffn_dim": 32, "word_embed_proj_dim": 16}, "fc1 fc2 k_proj out_proj q_proj v_proj"),
    "mistral": (GROUPED, LLAMA_LAYERS),
    "qwen2": (GROUPED, LLAMA_LAYERS),
    "gemma2": (GROUPED | {"head_dim": 8}, LLAMA_LAYERS),
    "gemma3_text": (GROUPED | {"head_dim": 8}, LLAMA_LAYERS),
    "phi3": ({}, "down_proj gate_up_proj o_proj qkv_proj"),
    "falcon": ({}, NEOX_LAYERS),
    "bloom": ({"n_layer": 2, "n_head": 2}, NEOX_LAYERS),
    "mamba": ({"state_size": 4}, ""),  # full only
    "mixtral": (GROUPED | {"num_local_experts": 2}, "k_proj o_proj q_proj v_proj"),
}
FIRST = ("gpt2", "gpt_neox", "llama", "qwen3")


def save_family(family: str, folder: Path, tokenizer_folder: str) -> str:
    """A folder with a random model of the family and the tiny tokenizer."""
    config = CONFIG_MAPPING[family](
        **{
            **({} if family == "gpt2" else SHAPE),
            "vocab_size": 97,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **FAMILIES[family][0],
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_folder) / name, folder)
    return str(folder)


def family_argv(model: str, data_files: tuple[str, str], mode: str) -> list[str]:
    text = f"--mode {mode} --block-size 16 --lr 3e-3 --global-batch 6 --eval-batch 4 --max-steps 3 --lora-rank 2"
    return tiny_argv(model, data_files, f"{text} --eval-every 3 --save-every 1 --save-total-limit 99")


@pytest.mark.parametrize(
    "families",
    [FIRST, pytest.param(tuple(f for f in FAMILIES if f not in FIRST), marks=pytest.mark.slow)],
    ids=["first", "others"],
)
def test_each_family_trains_resumes_exports_and_merges(families, tiny_model, data_files, tmp_path, monkeypatch):
    monkeypatch.setattr(export_cli, "save_tokenizer", lambda *_: None)  # qwen2 would read the tiny one as its own kind
    models = {family: save_family(family, tmp_path / family, tiny_model) for family in families}
    data = prepare_data(family_argv(tiny_model, data_files, "full"))  # families have tokenizers of their own kinds
    jobs = []
    for family, model in models.items():
        for mode in ("full", "lora") if FAMILIES[family][1] else ("full",):
            argv = family_argv(model, data_files, mode)
            jobs.append(make_job(tmp_path, f"{family}-{mode}", argv, data=data))
    launch_whole_and_resumed(2, jobs)
    for job in jobs:
        family, _, mode = job["name"].rpartition("-")
        metadata = assert_promises(job, loss_tolerance=2e-6, merges=mode == "lora")
        assert metadata["model"]["lora_targets"] == (FAMILIES[family][1].split() if mode == "lora" else []), family


def build_lora(model: str) -> TrainableModel:
    return build_model(cli.parse_args(["--mode", "lora", "--model", model]).settings, on_meta=True)


def test_weights_of_experts_that_get_no_adapter_are_noted(tiny_model, tmp_path):
    mixtral = save_family("mixtral", tmp_path / "mixtral", tiny_model)
    assert build_lora(mixtral).metadata["not_adapted"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert build_lora(tiny_model).metadata["not_adapted"] == []


def test_adapters_on_layers_whose_weights_are_read_past_them_are_refused(tiny_model, tmp_path):
    model = save_family("mamba", tmp_path / "mamba", tiny_model)
    message = r"MambaMixer reads its weights past an adapter \(mamba\); expected --mode full"
    with pytest.raises(UserError, match=message):
        build_lora(model)


@pytest.mark.parametrize("family", ["t5", "bert", "bart", "clip"])
def test_what_is_no_causal_model_is_refused_in_one_line_before_data_are_read(family, tmp_path):
    CONFIG_MAPPING[family]().save_pretrained(tmp_path / family)
    flags = f"--mode lora --model {tmp_path / family} --data nowhere.csv --output-dir {tmp_path / 'run'}"
    with pytest.raises(UserError) as refused:
        validate_early(cli.parse_args(flags.split()).settings, simulated_context(1))
    assert "\n" not in str(refused.value)
    assert f"{family} " in str(refused.value)
    assert "causal language model" in str(refused.value)
