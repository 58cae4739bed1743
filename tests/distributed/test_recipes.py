"""The exported folder in lm-evaluation-harness, as launch/README.md has it: `pip install lm-eval`, then
`pytest -n 0 -m sweep tests/distributed/test_recipes.py`."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers.launch_ranks import train
from helpers.tiny_inputs import tiny_argv
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.export.export_cli import ExportRequest, export_checkpoint

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
    assert export_checkpoint(ExportRequest(run_folder=tmp_path / "run", merge=True, output_dir=merged)) == 0
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
