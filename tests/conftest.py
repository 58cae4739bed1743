"""A tiny GPT-2 and tiny data, made once per session from seeds."""

import gc
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from helpers.gpu_visibility import hide_gpus

gc.disable()  # until all is imported, which makes many objects and no garbage
hide_gpus()  # before anything is imported that counts them, and before the server that ranks are forked from
from trainer.distributed.launch_environment import set_library_environment, without_launcher  # noqa: E402
from trainer.tracking.silence import silence_libraries  # noqa: E402

set_library_environment()  # as each program does
silence_libraries()  # before they are imported, here and by the server
from helpers.tiny_inputs import make_tiny_gpt2, write_records  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(wrapper=True)
def pytest_xdist_auto_num_workers() -> Iterator[int]:
    """One more than there are cores: while a test waits for what it has stopped, frozen or killed, another goes on."""
    count = yield
    return count if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else count + 1


def pytest_configure(config: pytest.Config) -> None:
    """Where most tests need ranks, the server of this worker is forked before there are threads and filters."""
    is_worker = hasattr(config, "workerinput") or not config.getoption("numprocesses")
    if is_worker and not all("unit" in Path(name).parts for name in config.args):
        import_module("helpers.launch_ranks").fork_server()


def pytest_collection_finish() -> None:
    """The garbage collector need not look through what is imported again and again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def nobodys_rank() -> Iterator[None]:
    """What DeepSpeed leaves in the environment of a process that it has joined to a group ends with the test."""
    yield
    for name in set(os.environ) - set(without_launcher(os.environ)):
        del os.environ[name]


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once; the data cache of every test lives there too."""
    folder = tmp_path_factory.mktemp("shelf")
    os.environ["TRAINER_CACHE"] = str(folder / "cache")
    return folder


@pytest.fixture(scope="session")
def tiny_model(session_dir: Path) -> str:
    """A folder with a random GPT-2 of two layers, without dropout, and a tokenizer of one token a word. Its weights are
    large enough for a gradient worth clipping."""
    return make_tiny_gpt2(session_dir / "tiny", dropout=0.0)


@pytest.fixture(scope="session")
def data_files(session_dir: Path) -> tuple[str, str]:
    """(training, validation) files; 21 blocks of 16 tokens, or 25 rows: batches of 6 leave a ragged one."""
    return (
        write_records(session_dir / "train.jsonl", num_records=25, seed=1),
        write_records(session_dir / "val.jsonl", num_records=9, seed=2),
    )


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a comparison's time is matplotlib's."""
    from trainer.report import plots

    monkeypatch.setattr(plots, "_render_svg", lambda draw, name, title, size: "<svg></svg>")
