"""What the runs on real ranks share."""

from pathlib import Path

import pytest
from test_invariance import make_argv

from trainer.config import cli


@pytest.fixture(scope="module")
def data_dir(tiny_model: str, data_files: tuple[str, str], session_dir: Path) -> Path:
    """The tiny data as completion rows, in the cache."""
    from trainer.data.dataset import prepare

    settings = cli.parse_args(make_argv(tiny_model, data_files, "full", "completion")).settings
    return prepare(settings.data, model=tiny_model, global_batch=6).folder
