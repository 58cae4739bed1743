"""What the runs on real ranks share."""

from pathlib import Path

import pytest
from helpers.engines import prepare_data
from helpers.matrix import make_argv


@pytest.fixture(scope="module")
def data_dir(tiny_model: str, data_files: tuple[str, str], session_dir: Path) -> Path:
    """The tiny data as completion rows, in the cache."""
    return prepare_data(make_argv(tiny_model, data_files, "full", "completion"))
