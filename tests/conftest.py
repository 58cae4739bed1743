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


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once; the data cache of every test lives there too."""
    folder = tmp_path_factory.mktemp("shelf")
    os.environ["TRAINER_CACHE"] = str(folder / "cache")
    return folder


@pytest.fixture(scope="session")
def tiny(shelf: Path) -> str:
    """A folder with a random GPT-2 of two layers, without dropout; weights large enough for a gradient worth clipping."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(shelf / "tiny")
    return str(shelf / "tiny")


def write_ids(path: Path, *, rows: int, seed: int, length: tuple[int, int]) -> str:
    """A JSONL of token ids with a pattern to learn: every row counts upwards from its start, with noise."""
    dice = random.Random(seed)
    with open(path, "w") as file:
        for _ in range(rows):
            size, start = dice.randint(*length), dice.randrange(1, VOCABULARY)
            ids = [1 + (start + n + dice.randrange(2)) % (VOCABULARY - 1) for n in range(size)]
            file.write(json.dumps({"input_ids": ids}) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def ids(shelf: Path) -> tuple[str, str]:
    """(training, validation) files of token ids; blocks of 16 give 21 examples: batches of 4 leave a ragged one."""
    return (
        write_ids(shelf / "train.jsonl", rows=28, seed=1, length=(6, 18)),
        write_ids(shelf / "val.jsonl", rows=9, seed=2, length=(6, 18)),
    )
