"""launch/judge.py on folders that plain Hugging Face code wrote: the sentence, the page, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_helpers import make_tokenizer
from helpers.tiny_inputs import TEMPLATE_FLAGS, make_tiny_gpt2, write_records
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from launch.judge import main
from trainer.report.interval import paired_interval, sum_by_unit

LORA = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
Models = dict[str, str]


def train(base: str, folder: Path, records: str, seed: int, *, with_adapter: bool) -> str:
    """What a user's script does: Trainer, and `save_pretrained` of transformers or peft, without the tokenizer."""
    from peft import LoraConfig, get_peft_model

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    if with_adapter:
        model = get_peft_model(model, LoraConfig(**LORA))
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line) for line in Path(records).read_text().splitlines()]
    rows = [tokenizer(text["prompt"] + text["completion"])["input_ids"] for text in texts]
    off: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(
        output_dir=str(folder / "runs"),
        max_steps=15,
        learning_rate=0.02,
        per_device_train_batch_size=1,
        seed=seed,
        use_cpu=True,
        **off,
    )
    Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two seeds of whole models and of adapters, as `train` leaves them, and records that they did not see."""
    folder = tmp_path_factory.mktemp("judged")
    records = write_records(folder / "train.jsonl", num_records=15, seed=1)
    kinds = [(kind, seed) for kind in ("whole", "adapter") for seed in (1, 2)]
    return {
        **{f"{k}{s}": train(tiny_model, folder / f"{k}{s}", records, s, with_adapter=k == "adapter") for k, s in kinds},
        "base": tiny_model,
        "data": write_records(folder / "new.jsonl", num_records=40, seed=3),
    }


def judge(models: Models, folder: Path, *argv: str) -> dict[str, Any]:
    flags = ["--base", models["base"], "--data", models["data"], "--output-dir", str(folder), *TEMPLATE_FLAGS]
    assert main([*flags, *argv]) == 0
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    return answer


@torch.no_grad()
def losses_and_targets(model: Any, base: str, data: str) -> np.ndarray:
    """[2, groups]: summed losses and numbers of the completions' tokens and ends, by transformers' own loss, record by
    record; records of one prompt are a group."""
    tokenizer, rows, prompts = AutoTokenizer.from_pretrained(base), [], []
    for record in map(json.loads, Path(data).read_text().splitlines()):
        prompt, completion = (tokenizer(record[name])["input_ids"] for name in ("prompt", "completion"))
        ids, targets = [*prompt, *completion, tokenizer.eos_token_id], len(completion) + 1
        labels = [-100] * len(prompt) + ids[-targets:]
        loss = model.eval()(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        rows.append((loss * targets, targets))
        prompts.append(record["prompt"])
    return sum_by_unit(np.array(rows).T, prompts)


def test_whole_models_and_adapters_of_other_programs_are_judged_by_two_seeds(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import AutoPeftModelForCausalLM

    seeds = [f"{kind}={models[f'{kind}1']},{models[f'{kind}2']}" for kind in ("whole", "adapter")]
    answer = judge(models, tmp_path, *seeds)
    said, (comparison,) = capsys.readouterr().out, answer["comparisons"]
    assert (comparison["num_seeds"], comparison["full"]["label"], comparison["lora"]["label"]) == (
        2,
        "whole",
        "adapter",
    )
    losses = {}
    for mode, kind in (("full", "whole"), ("lora", "adapter")):
        load = (AutoModelForCausalLM if kind == "whole" else AutoPeftModelForCausalLM).from_pretrained
        rows = [losses_and_targets(load(models[f"{kind}{seed}"]), models["base"], models["data"]) for seed in (1, 2)]
        losses[mode], targets = np.stack([nll for nll, _ in rows]), rows[0][1]
        assert comparison[mode]["loss"] == pytest.approx(losses[mode].sum() / (2 * targets.sum()), rel=1e-5)
    expected = paired_interval(losses["lora"] - losses["full"], targets)
    excess = comparison["excess"]
    bounds = [(excess[name], getattr(expected, name)) for name in ("estimate", "low", "high")]
    assert all(ours == pytest.approx(theirs, abs=1e-4) for ours, theirs in bounds), "each record beside itself"
    assert f"[{excess['low']:+.4f}, {excess['high']:+.4f}]" in said
    assert "whether a model was trained on these records is not known" in said
    assert '"/' not in json.dumps(answer), "it is passed on"
    page = (tmp_path / "report.html").read_text()
    assert "Was adapter as good as whole on new.jsonl?" in page
    assert not {"LoRA", "full"} & set(page.partition("</style>")[2].replace("<", " ").replace(">", " ").split())


def test_another_base_is_said_and_other_tokenizers_are_judged_by_bits_per_byte(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = []
    packed, other_base = tmp_path / "nf4", make_tiny_gpt2(tmp_path / "b", dropout=0.0, seed=5)
    packed.mkdir()
    (packed / "config.json").write_text('{"quantization_config": {}}')  # as the bases of Unsloth
    for name, base in (("lost", "/home/somebody/tiny"), ("packed", str(packed)), ("moved", other_base)):
        adapters.append(shutil.copytree(models["adapter1"], tmp_path / name))
        config = json.loads((adapters[-1] / "adapter_config.json").read_text())
        (adapters[-1] / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    texts = Path(models["data"]).read_text().splitlines()
    other = make_tokenizer(tmp_path / "bpe", texts, vocab_size=600)
    shape = {"vocab_size": 600, "n_positions": 256, "n_embd": 16, "n_layer": 1, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(other)
    answer = judge(models, tmp_path / "out", models["whole1"], str(other), *map(str, adapters), "--margin", "0.01bpb")
    output = capsys.readouterr().out
    for said in (
        *("bpe is worse than whole1 by", "bits per byte [+", "bpe is of another base, a GPT2LMHeadModel of"),
        "packed names the base nf4, which is not here in full precision: --base was used; moved is an adapter of",
    ):
        assert said in output
    lost, _, moved = answer["comparisons"][1:]
    assert lost["lora"]["loss"] != moved["lora"]["loss"]


def test_a_mistake_is_one_line(models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disable_progress_bar()  # as the launch file does, of a fresh process
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    whole, adapter, empty = models["whole1"], models["adapter1"], tmp_path / "empty.jsonl"
    one = tmp_path / "one.jsonl"
    one.write_text(Path(models["data"]).read_text().splitlines()[0])
    baseless, broken = (shutil.copytree(path, tmp_path / f"copy-{Path(path).name}") for path in (adapter, whole))
    config = json.loads((baseless / "adapter_config.json").read_text())
    (baseless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    weights = load_file(broken / "model.safetensors")
    weights["transformer.wpe.weight"][8:] = np.nan  # of some records alone
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    flags = ["--base", models["base"], "--data", models["data"], "--output-dir", str(tmp_path / "out"), *TEMPLATE_FLAGS]
    for argv, said in (
        ([whole], f"{whole}: is one model; expected two or more"),
        ([whole, "nowhere"], "nowhere: not here in full precision, nor on the Hub; expected a folder or hub id"),
        ([whole, f"{tmp_path}/nothing"], f"{tmp_path}/nothing: holds no model; expected a folder or hub id"),
        ([f"A={whole}", f"A={adapter}"], "A: 2 models have this name; expected NAME=MODEL for each"),
        ([whole, adapter, "--margin", "2pt"], "--margin 2pt: expected a number above 0 and its unit, such as"),
        ([whole, adapter, "--data", str(empty)], f"--data {empty}: holds no record"),
        ([whole, adapter, "--data", str(one)], f"--data {one}: the test records are one, or share one meaning"),
        ([whole, adapter, "--data", str(one), "--objective", "blocks"], f"--data {one}: 1 records make 0 examples of"),
        ([f"A={whole},", adapter], f"A={whole},: not here in full precision, nor on the Hub; expected"),
        ([whole, str(baseless)], f"{baseless}: adapter_config.json: base_model_name_or_path is None; expected"),
        ([whole, str(broken)], f"{broken}: the loss of "),
        ([whole, adapter, "--data", "~no-such-user/x"], "--data ~no-such-user/x: expected a name, a file or a folder"),
        ([whole, adapter, "--base", "~no-such-user/x"], "~no-such-user/x: there is no home folder of ~no-such-user"),
        ([whole, adapter, "--base", whole], f"{whole}: no usable tokenizer in the folder"),
    ):
        assert main([*flags, *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {said}")
        assert not re.search("--global-batch|-fraction", line), "it has no such flag"
        assert not (tmp_path / "out").exists()
