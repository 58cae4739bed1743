"""A chat from its records to plain transformers: trained with a template, exported with that one, answers in it."""

import json
from pathlib import Path

import pytest
import torch
from helpers.chat_templates import TEMPLATES, make_chat_tokenizer
from helpers.launch_ranks import train
from helpers.model_cards import run_card
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trainer.export.export_cli import export_checkpoint

ANSWER = "I am fine."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run on conversations with a template of the user's, on a model whose tokenizer has another."""
    folder = tmp_path_factory.mktemp("chat")
    make_chat_tokenizer(folder / "base", TEMPLATES["mistral"][0])
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    (folder / "mine.jinja").write_text(TEMPLATES["chatml"][0])
    turns = [[("user", f"How are you, {i}?"), ("assistant", ANSWER)] for i in range(60)]
    records = [{"messages": [{"role": role, "content": content} for role, content in turn]} for turn in turns]
    (folder / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = f"--mode lora --model {folder / 'base'} --data {folder / 'chat.jsonl'} --lr 2e-2 --max-steps 40"
    flags += f" --chat-template {folder / 'mine.jinja'} --num-samples 1 --eval-every never --global-batch 8"
    output = train(flags.split(), out=folder / "run")
    assert "<|im_start|>assistant\\n⟦I am fine.<|im_end|>⟧" in output, "the plan shows what is learnt"
    return folder / "run"


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_an_exported_chat_model_answers_in_the_template_it_was_trained_with(run, form, tmp_path):
    folder = run / "model"
    if form == "merged":
        folder = tmp_path / "merged"
        assert export_checkpoint(run, merge=True, output_dir=folder)["problems"] == []
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATES["chatml"][0]
    if form == "merged":
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = run_card(folder, run.parent / "base")["model"]
    messages = [{"role": "user", "content": "How are you, 7?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|im_end|>"]
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :]) == f"{ANSWER}<|im_end|>"
