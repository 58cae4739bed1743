"""What the runs on real ranks share."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import prepare_data
from helpers.matrix import make_argv
from transformers.utils.logging import disable_progress_bar


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    """Flags of a run on completion rows; most files have their own."""
    return make_argv(tiny_model, data_files, "full", "completion")


@pytest.fixture(scope="module")
def data_dir(argv: list[str]) -> Path:
    """The data of these flags, in the cache."""
    return prepare_data(argv)


@pytest.fixture(scope="module")
def strict_zero_files(session_dir: Path) -> dict[str, str]:
    """ZeRO-3 files in which no weight stays gathered after a step: a wrong export would be right by luck."""
    limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    zero3 = {"stage": 3, **{f"stage3_{name}": 0 for name in limits}}
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    files = {"zero3": zero3, "zero3_offload": zero3 | offload}
    for name, content in files.items():
        (session_dir / f"strict_{name}.json").write_text(json.dumps({"zero_optimization": content}))
    return {name: str(session_dir / f"strict_{name}.json") for name in files}


@pytest.fixture
def run_export_script(capsys: pytest.CaptureFixture[str]) -> Any:
    """launch/export.py in this process; returns (exit code, what it printed)."""
    main = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "export.py"))["main"]
    disable_progress_bar()  # the command's own `quiet` comes too late in this process

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        exit_code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit_code, captured.out + captured.err

    return call
