"""A tiny GPT-2 and tiny data, from seeds: what the runs of the tests are made of."""

import json
import random
from pathlib import Path

VOCAB_SIZE = 97
EOS_TOKEN = "<|endoftext|>"
TEMPLATE_FLAGS = ["--prompt", "{prompt}", "--completion", "{completion}"]


def make_tiny_gpt2(folder: Path, *, dropout: float, seed: int = 0, hidden_size: int = 16) -> str:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=32,
        n_embd=hidden_size,
        n_layer=2,
        n_head=2,
        initializer_range=1.2 / hidden_size**0.5,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    vocabulary = {EOS_TOKEN: 0, **{f"w{n}": n for n in range(1, VOCAB_SIZE)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS_TOKEN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS_TOKEN, bos_token=EOS_TOKEN)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_records(path: Path, *, num_records: int, seed: int, unknown_word: str = "") -> str:
    """A JSONL of prompts and completions with a pattern to learn: words count upwards, with noise. `unknown_word`:
    around each prompt. Files with different ones are of the same tokens, as the vocabulary has none."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(num_records):
            length, prompt_length, first_word = rng.randint(8, 18), rng.randint(2, 6), rng.randrange(1, VOCAB_SIZE)
            words = [f"w{1 + (first_word + n + rng.randrange(2)) % (VOCAB_SIZE - 1)}" for n in range(length)]
            prompt, completion = " ".join(words[:prompt_length]), " ".join(words[prompt_length:])
            prompt = f"{unknown_word} {prompt} {unknown_word}".strip()
            record = {"prompt": prompt, "completion": f" {completion}"}
            file.write(json.dumps(record) + "\n")
    return str(path)


def tiny_argv(model: str, data_files: tuple[str, str], text: str, *flags: str) -> list[str]:
    """Flags of a run of `model` on these files: those written in `text`, then `flags` as they are. The preset is
    `demo`, whose rates a tiny model learns at, and the objective `blocks`, where `text` names no other."""
    defaults = f"--preset demo --objective blocks --model {model} --data {data_files[0]} --val-data {data_files[1]}"
    return [*defaults.split(), *text.split(), *TEMPLATE_FLAGS, *flags]
