"""A tiny GPT-2 and tiny data, made once per session from seeds."""

import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCAB_SIZE = 97
EOS_TOKEN = "<|endoftext|>"


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once; the data cache of every test lives there too."""
    folder = tmp_path_factory.mktemp("shelf")
    os.environ["TRAINER_CACHE"] = str(folder / "cache")
    return folder


@pytest.fixture(scope="session")
def tiny_model(session_dir: Path) -> str:
    """A folder with a random GPT-2 of two layers, without dropout, and a tokenizer of one token a word.

    Its weights are large enough for a gradient worth clipping.
    """
    return make_tiny_gpt2(session_dir / "tiny", dropout=0.0)


def make_tiny_gpt2(folder: Path, *, dropout: float, seed: int = 0, hidden_size: int = 16) -> str:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=32, n_embd=hidden_size, n_layer=2, n_head=2,
        initializer_range=1.2 / hidden_size**0.5,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(
        models.WordLevel({EOS_TOKEN: 0, **{f"w{n}": n for n in range(1, VOCAB_SIZE)}}, unk_token=EOS_TOKEN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS_TOKEN, bos_token=EOS_TOKEN).save_pretrained(
        folder
    )
    return str(folder)


def write_records(path: Path, *, num_records: int, seed: int) -> str:
    """A JSONL of prompts and completions with a pattern to learn: words count upwards, with noise."""
    rng = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(num_records):
            num_words, num_prompt_words, first_word = (
                rng.randint(8, 18),
                rng.randint(2, 6),
                rng.randrange(1, VOCAB_SIZE),
            )
            words = [f"w{1 + (first_word + n + rng.randrange(2)) % (VOCAB_SIZE - 1)}" for n in range(num_words)]
            record = {
                "prompt": " ".join(words[:num_prompt_words]),
                "completion": " " + " ".join(words[num_prompt_words:]),
            }
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def data_files(session_dir: Path) -> tuple[str, str]:
    """(training, validation) files; 21 blocks of 16 tokens, or 25 rows: batches of 6 leave a ragged one."""
    return (
        write_records(session_dir / "train.jsonl", num_records=25, seed=1),
        write_records(session_dir / "val.jsonl", num_records=9, seed=2),
    )


TEMPLATE_FLAGS = ["--prompt", "{prompt}", "--completion", "{completion}"]
