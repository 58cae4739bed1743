"""A tiny GPT-2 and tiny data, made once per session from seeds."""

import os
from pathlib import Path

import pytest
from helpers.gpu_visibility import hide_gpus

hide_gpus()  # before anything is imported that counts them, and before the server that ranks are forked from
from helpers.tiny_inputs import make_tiny_gpt2, write_records  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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


@pytest.fixture(scope="session")
def data_files(session_dir: Path) -> tuple[str, str]:
    """(training, validation) files; 21 blocks of 16 tokens, or 25 rows: batches of 6 leave a ragged one."""
    return (
        write_records(session_dir / "train.jsonl", num_records=25, seed=1),
        write_records(session_dir / "val.jsonl", num_records=9, seed=2),
    )
