"""What the runs on real ranks share."""

from pathlib import Path

import pytest
from helpers.engines import prepare_data
from helpers.matrix import make_argv


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    """Flags of a run on completion rows; most files have their own."""
    return make_argv(tiny_model, data_files, "full", "completion")


@pytest.fixture(scope="module")
def data_dir(argv: list[str]) -> Path:
    """The data of these flags, in the cache."""
    return prepare_data(argv)
