"""Every adapter, packing and optimizer once, and every family of models: it learns, resumes bitwise, and its export is
what was trained. Under every ZeRO file in the sweep."""

import json
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import prepare_data
from helpers.launch_ranks import run_on_ranks
from helpers.matrix import assert_resumed_bitwise, launch_jobs, make_job, read_job_result, run_jobs
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv
from helpers.tolerances import INT8_TOLERANCE, LOSS_TOLERANCE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from trainer.config import cli
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.distributed.process_group import simulated_context
from trainer.export import export_cli
from trainer.export.verify import LOGITS_BOUND
from trainer.model.build import build_model
from trainer.training.run_plan import validate_early

LONG = pytest.mark.timeout(3600)
STOP_STEP = 2  # the step after which a run is stopped
LORA_RANK = 16  # with layers of 64 and 256: A and B of c_fc and c_proj have 4,096 elements, which 8-bit optimizers pack
EACH_ONCE = {
    "lora": "--quant nf4 --optim adamw8bit",
    "dora": "--adapter dora --quant nf4 --optim adamw",
    "rslora": "--adapter rslora --quant int8 --optim adamw_fused",
    "pissa": "--adapter pissa --optim paged_adamw8bit",
}


@pytest.fixture(scope="module")
def argv(session_dir: Path, data_files: tuple[str, str]) -> list[str]:
    """Flags of a run of the tiny model, four times as wide."""
    text = f"--mode lora --block-size 16 --lr 0.003 --lora-rank {LORA_RANK} --global-batch 6 --eval-batch 4"
    text += " --max-steps 4 --eval-every 2 --save-every 1 --save-total-limit 99"
    return tiny_argv(make_tiny_gpt2(session_dir / "wide", dropout=0.0, hidden_size=64), data_files, text)


def launch_whole_and_resumed(world_size: int, jobs: Iterable[dict[str, Any]]) -> None:
    """Each job, and once more from STOP_STEP."""
    again = ({**job, "name": f"{job['name']}-again", "resume": [job["name"], STOP_STEP]} for job in jobs)
    launch_jobs(world_size, [*jobs, *again], jobs_per_launch=8)


def assert_promises(
    job: dict[str, Any], *, loss_tolerance: float = 1e-6, merges: bool = False, learns: bool = True
) -> dict[str, Any]:
    """Assert all three of a job that was launched, `merges`: of its merged folder too; returns its run.json."""
    out, name = Path(job["out"]), job["name"]
    losses = [record["loss"] for record in read_job_result(out, name)[0] if record["kind"] == "eval"]
    assert losses[-1] < losses[0] if learns else losses[-1] != losses[0], (name, losses)
    assert_resumed_bitwise(out, name, f"{name}-again", STOP_STEP)
    for merge in (False, True) if merges else (False,):
        result = export_cli.export_checkpoint(out / name, data_folder=job["data"], merge=merge)
        pattern = r"at most (\S+?)(?: \(the largest is (\S+)\))?, float32, validation loss (\S+) \(recorded (\S+)\)"
        numbers = re.search(pattern, result["summary"])
        assert numbers is not None, (name, result)
        difference, largest, loss, recorded = (float(number or 1) for number in numbers.groups())
        assert difference <= LOGITS_BOUND * max(1.0, largest) * (10 if merge else 1), (name, result)
        assert loss == pytest.approx(recorded, rel=loss_tolerance), (name, result)
        assert all(p.startswith(("validation loss", "logits differ")) for p in result["problems"]), (name, result)
    return json.loads((out / name / "run.json").read_text())


def test_each_method_learns_resumes_bitwise_and_exports_what_was_trained(argv, tmp_path):
    jobs = [make_job(tmp_path, name, [*argv, *flags.split()]) for name, flags in EACH_ONCE.items()]
    launch_whole_and_resumed(1, jobs)
    for job in jobs:
        assert_promises(job)
    flags, source = [*argv, "--optim", "adamw", "--quant", "nf4"], ["lora", STOP_STEP]
    other = make_job(tmp_path, "other", flags, resume=source)
    assert run_on_ranks(1, run_jobs, [other], log=tmp_path / "other.log") == 1
    assert "the checkpoint holds the moments of another kind of --optim" in (tmp_path / "other.log").read_text()


# --- on several ranks, under every ZeRO stage ---

METHOD_FLAGS = {
    "saved": "--modules-to-save wte,layernorm,bias",
    "packed": "--quant nf4 --quant-double --adapter rslora --activation-checkpointing --modules-to-save wte,layernorm",
    "dora": "--adapter dora --lora-dropout 0.1",
    "int8": "--quant int8 --adapter rslora --activation-checkpointing --modules-to-save lm_head",
    "again": "--activation-checkpointing --adapter pissa --modules-to-save lm_head --lora-dropout 0.1",
    "codes": "--optim adamw8bit --modules-to-save wte",
}
REFUSED = {"int8": ("zero3", "zero3_offload", "strict"), "codes": (*DS_CONFIG_NAMES[1:], "strict")}
ALL_CASES = {
    name: [(name, zero) for zero in (*DS_CONFIG_NAMES, "strict") if zero not in REFUSED.get(name, ())]
    for name in METHOD_FLAGS
}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([("saved", "zero2"), ("packed", "strict")], id="a sample"),
        *(pytest.param(cases, id=name, marks=[pytest.mark.sweep, LONG]) for name, cases in ALL_CASES.items()),
    ],
)
def test_methods_on_two_ranks_learn_resume_and_export_alike_under_every_zero_stage(
    cases, argv, strict_zero_files, tmp_path
):
    """Every promise, and the same losses under each ZeRO file within the bounds of test_invariance.py. Layers in int8
    round what goes into them to 8 bits too: there a last bit can turn into another code."""
    jobs = []
    for method, zero in cases:
        file = strict_zero_files["zero3"] if zero == "strict" else zero
        flags = [*argv, *METHOD_FLAGS[method].split(), "--micro-batch", "1", "--ds-config", file]
        jobs.append(make_job(tmp_path, f"{method}-{zero}", flags))
    launch_whole_and_resumed(2, jobs)
    first_losses: dict[str, list[float]] = {}
    for (method, _), job in zip(cases, jobs, strict=True):
        assert_promises(job)
        losses = [row["loss"] for row in read_job_result(tmp_path, job["name"])[0] if "loss" in row]
        tolerance = INT8_TOLERANCE if method == "int8" else LOSS_TOLERANCE
        assert losses == pytest.approx(first_losses.setdefault(method, losses), rel=tolerance), job["name"]


# --- methods of peft by its own files, and adapters that are there already ---

PEFT_METHODS = {
    "vera": ("gpt2", "0.03", {"r": 16}),
    "ia3": ("gpt2", "0.03", {}),
    "oft": ("llama", "0.003", {"r": 0, "oft_block_size": 4}),
}


def test_other_methods_of_peft_keep_the_promises_and_are_exported_as_peft_has_them(
    tiny_model, data_files, strict_zero_files, tmp_path, monkeypatch
):
    monkeypatch.setattr(export_cli, "save_tokenizer", lambda *_: None)  # of the Llama
    text = "--mode lora --block-size 16 --global-batch 6 --eval-batch 4 --max-steps 4 --eval-every 2"
    text += " --save-every 1 --save-total-limit 99"
    data = prepare_data(tiny_argv(tiny_model, data_files, text))
    jobs = []
    for method, (family, lr, fields) in PEFT_METHODS.items():
        model = save_family(family, tmp_path / f"{family}-{method}", tiny_model, initializer_range=0.3)
        (file := tmp_path / f"{method}.json").write_text(json.dumps({"peft_type": method.upper(), **fields}))
        flags = [*tiny_argv(model, data_files, text), "--lr", lr, "--peft-config", str(file)]
        for zero in ("zero0", strict_zero_files["zero3"]) if method == "vera" else ("zero0",):
            jobs.append(make_job(tmp_path, f"{method}-{Path(zero).stem}", [*flags, "--ds-config", zero], data=data))
    launch_whole_and_resumed(2, jobs)
    losses = [[r["loss"] for r in read_job_result(tmp_path, job["name"])[0] if "loss" in r] for job in jobs[:2]]
    assert losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE)
    for job in jobs:
        assert_promises(job, learns="oft" not in job["name"])  # to rotate random weights teaches nothing
        method, folder = job["name"].partition("-")[0], next((tmp_path / job["name"]).glob("export-*"))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert {"peft_type": method.upper(), **PEFT_METHODS[method][2]}.items() <= config.items()


def test_an_adapter_is_trained_further_on_its_base_and_is_one_adapter_again(
    tiny_model, data_files, strict_zero_files, tmp_path, monkeypatch
):
    """Ours with weights of the base in it, one of DoRA, and one that peft wrote, by a folder in two places."""
    text = "--mode lora --block-size 16 --lr 0.01 --global-batch 6 --eval-batch 4 --max-steps 4 --eval-every 2"
    text += " --save-every 1 --save-total-limit 99"
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    monkeypatch.chdir(tmp_path)
    argv = tiny_argv(str(base), data_files, text)
    first = {"ours": "--modules-to-save layernorm --lora-rank 4", "dora": "--adapter dora --lora-target-modules c_fc"}
    jobs = [make_job(tmp_path, name, [*argv, *flags.split()]) for name, flags in first.items()]
    launch_jobs(1, jobs)
    for job in jobs:
        export_cli.export_checkpoint(
            tmp_path / job["name"], data_folder=job["data"], output_dir=tmp_path / f"of-{job['name']}"
        )
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, rank_pattern={"h.0.attn.c_attn": 4}, target_modules=["c_attn"], fan_in_fan_out=True)
    config.task_type = "CAUSAL_LM"
    get_peft_model(model, config).save_pretrained(tmp_path / "of-theirs")
    config = json.loads((tmp_path / "of-theirs/adapter_config.json").read_text())
    (tmp_path / "of-theirs/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
    again = []
    for name, zero in (("ours", strict_zero_files["zero3"]), ("dora", "zero2"), ("theirs", "zero1")):
        flags = [*tiny_argv(f"of-{name}", data_files, text), "--ds-config", zero]
        again.append(make_job(tmp_path, f"again-{name}-{Path(zero).stem}", flags))
    launch_whole_and_resumed(2, again)
    for job in again:
        name = job["name"].split("-")[1]
        metadata = assert_promises(job)
        assert (metadata["model"]["name"], Path(metadata["model"]["base"]).name) == (f"of-{name}", "base")
        losses = [row["loss"] for row in read_job_result(tmp_path, job["name"])[0] if row["kind"] == "eval"]
        folders = tmp_path / f"of-{name}", next((tmp_path / job["name"]).glob("export-*"))
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
        shape = ("r", "rank_pattern", "use_dora", "peft_type", "base_model_name_or_path")
        assert [configs[0][key] for key in shape] == [configs[1][key] for key in shape]
        stored = [{n: t.shape for n, t in load_file(f / "adapter_model.safetensors").items()} for f in folders]
        assert stored[0] == stored[1]
        if name != "theirs":  # which peft begins at nothing
            before = [row["loss"] for row in read_job_result(tmp_path, name)[0] if row["kind"] == "eval"]
            assert losses[0] == pytest.approx(before[-1], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mode full --model ADAPTER", "holds an adapter, .*expected --mode lora .*RUN --merge"),
        ("--model ADAPTER --lora-rank 4 --adapter dora", "--lora-rank, --adapter: not with --model .*an adapter"),
        ("--model PACKED", "was trained on its base in nf4; expected --quant nf4"),
        ("--model LOST", "its base nowhere, which its adapter_config.json names"),
        ("--model BROKEN", "adapter_model.safetensors: not a whole safetensors file"),
        ("--model OTHER", "does not fit its base: .*size mismatch"),
        ("--peft-config OFT", r"--peft-config: peft refuses OFT for this model \(TypeError: Target module Conv1D"),
        ("--peft-config PROMPT", "PROMPT_TUNING is not supported; expected a method that adapts layers"),
        ("--peft-config VERA --lora-rank 4", "--lora-rank: not with --peft-config"),
        ("--peft-config VERA --mode full", "--peft-config: is about adapters; expected --mode lora"),
        ("--peft-config NOWHERE", "--peft-config NOWHERE: expected an adapter_config.json of peft"),
    ],
)
def test_adapters_and_methods_that_cannot_be_are_one_line(flags, message, tiny_model, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=2, fan_in_fan_out=True))
    paths = {name: tmp_path / name for name in ("ADAPTER", "PACKED", "LOST", "BROKEN", "OTHER")}
    for name, path in paths.items():
        model.save_pretrained(path)
        config = json.loads((path / "adapter_config.json").read_text())
        config |= {"LOST": {"base_model_name_or_path": "nowhere"}, "OTHER": {"r": 3}}.get(name, {})
        (path / "adapter_config.json").write_text(json.dumps(config))
    packing = {"quantization_config": {"bnb_4bit_quant_type": "nf4"}}
    (paths["PACKED"] / "base_quantization.json").write_text(json.dumps(packing))
    (paths["BROKEN"] / "adapter_model.safetensors").write_bytes(b"x")
    for name in ("OFT", "VERA", "PROMPT"):
        paths[name] = tmp_path / name
        kind = {"PROMPT": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}}.get(name, {"peft_type": name})
        paths[name].write_text(json.dumps(kind))
    words = [str(paths.get(word, word)) for word in flags.split()]
    argv = ["--mode", "lora", *([] if "--model" in words else ["--model", tiny_model]), *words]
    with pytest.raises(UserError, match=message) as error:
        build_model(cli.parse_args(argv).settings)
    assert "\n" not in str(error.value)


# --- families of models ---

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 1}
LLAMA_LAYERS = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
NEOX_LAYERS = "dense dense_4h_to_h dense_h_to_4h query_key_value"
#: {model_type: (fields of its configuration beside SHAPE, the layers that get adapters)}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({"n_inner": 64}, "c_attn c_fc c_proj"),
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
FIRST = ("gpt_neox", "llama", "gemma2", "mamba")


def save_family(family: str, folder: Path, tokenizer_folder: str, **more: Any) -> str:
    """A folder with a random model of the family and the tiny tokenizer."""
    fields = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, **FAMILIES[family][0], **more}
    config = CONFIG_MAPPING[family](**SHAPE, **fields)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer_folder) / name, folder)
    return str(folder)


@pytest.mark.parametrize(
    "families",
    [FIRST, pytest.param(tuple(f for f in FAMILIES if f not in FIRST), marks=pytest.mark.sweep)],
    ids=["a sample", "others"],
)
def test_each_family_trains_resumes_exports_and_merges(families, tiny_model, data_files, tmp_path, monkeypatch):
    monkeypatch.setattr(export_cli, "save_tokenizer", lambda *_: None)  # qwen2 would read the tiny one as its own kind
    text = "--block-size 16 --lr 3e-3 --global-batch 6 --eval-batch 4 --max-steps 3 --lora-rank 2 --eval-every 3"
    text += " --save-every 1 --save-total-limit 99 --mode"
    data = prepare_data(tiny_argv(tiny_model, data_files, f"{text} full"))  # families have tokenizers of their own
    jobs = []
    for family in families:
        model = save_family(family, tmp_path / family, tiny_model)
        for mode in ("full", "lora") if FAMILIES[family][1] else ("full",):
            argv = tiny_argv(model, data_files, f"{text} {mode}")
            jobs.append(make_job(tmp_path, f"{family}-{mode}", argv, data=data))
    launch_whole_and_resumed(1, jobs)
    for job in jobs:
        family, _, mode = job["name"].rpartition("-")
        metadata = assert_promises(job, loss_tolerance=2e-6, merges=mode == "lora")
        assert metadata["model"]["lora_targets"] == (FAMILIES[family][1].split() if mode == "lora" else []), family


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mamba", r"MambaMixer reads its weights past an adapter \(mamba\); expected --mode full"),
        ("t5", "t5 .*causal language model"),
        ("bert", "bert .*causal language model"),
        ("clip", "clip .*causal language model"),
    ],
)
def test_a_model_that_cannot_be_trained_is_one_line_before_data_are_read(family, message, tmp_path):
    CONFIG_MAPPING[family]().save_pretrained(tmp_path / family)
    flags = f"--mode lora --init random --model {tmp_path / family} --data nowhere.csv --output-dir {tmp_path / 'run'}"
    settings = cli.parse_args(flags.split()).settings
    refuse: Any = partial(validate_early, dist_context=simulated_context(1))
    refuse = partial(build_model, on_meta=True) if family == "mamba" else refuse
    with pytest.raises(UserError, match=message) as refused:
        refuse(settings)
    assert "\n" not in str(refused.value)
