"""A tiny GPT-2 and tiny data, made once per session from seeds."""

import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCABULARY = 97
END = "<|endoftext|>"


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once; the data cache of every test lives there too."""
    folder = tmp_path_factory.mktemp("shelf")
    os.environ["TRAINER_CACHE"] = str(folder / "cache")
    return folder


@pytest.fixture(scope="session")
def tiny(shelf: Path) -> str:
    """A folder with a random GPT-2 of two layers, without dropout, and a tokenizer of one token a word.

    Its weights are large enough for a gradient worth clipping.
    """
    return make_tiny(shelf / "tiny", dropout=0.0)


def make_tiny(folder: Path, *, dropout: float, seed: int = 0, width: int = 16) -> str:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=width, n_layer=2, n_head=2, initializer_range=1.2 / width**0.5,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({END: 0, **{f"w{n}": n for n in range(1, VOCABULARY)}}, unk_token=END))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, bos_token=END).save_pretrained(folder)
    return str(folder)


def write_records(path: Path, *, rows: int, seed: int) -> str:
    """A JSONL of prompts and completions with a pattern to learn: words count upwards, with noise."""
    dice = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(rows):
            size, cut, start = dice.randint(8, 18), dice.randint(2, 6), dice.randrange(1, VOCABULARY)
            words = [f"w{1 + (start + n + dice.randrange(2)) % (VOCABULARY - 1)}" for n in range(size)]
            record = {"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def records(shelf: Path) -> tuple[str, str]:
    """(training, validation) files; 21 blocks of 16 tokens, or 25 rows: batches of 6 leave a ragged one."""
    return (
        write_records(shelf / "train.jsonl", rows=25, seed=1),
        write_records(shelf / "val.jsonl", rows=9, seed=2),
    )


TEMPLATES = ["--prompt", "{prompt}", "--completion", "{completion}"]
