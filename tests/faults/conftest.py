"""A short run of two ranks: what most of the faults happen to."""

from pathlib import Path

import pytest
from helpers.launch_ranks import train
from helpers.tiny_inputs import tiny_argv

STEPS = 8


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    """Its flags; a rank's part of a step is one micro-batch."""
    text = f"--mode full --block-size 16 --global-batch 6 --max-steps {STEPS} --eval-every 3 --save-every 2"
    return tiny_argv(tiny_model, data_files, f"{text} --save-total-limit 9 --ds-config zero2")


@pytest.fixture(scope="module")
def finished_run(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to; tests copy it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(argv, out=out, world_size=2)
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a test's run."""
    return tmp_path / "run"
