"""What the tests of the report share."""

from pathlib import Path

import pytest
from helpers.fake_studies import MakeRun, run_maker


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes runs, one after the other: `make_run(mode, losses, ...)`."""
    return run_maker(tmp_path)
