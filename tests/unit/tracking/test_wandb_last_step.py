"""The last step that an earlier process logged to W&B is read back from what wandb-core prints of its file."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.tracking import wandb_logger

ROW = '{{"history": {{"item": {{"_step": {}}}}}}}'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [([ROW.format(3), "{}", ROW.format(7)], 7), ([], -1), ([ROW.format(3), '{"_step": broken'], -1)],
    ids=["steps", "nothing", "a broken line"],
)
def test_the_last_step_is_read_and_no_thread_stays(lines: list[str], expected: int, tmp_path: Path) -> None:
    """A timer left behind holds the process at its end."""
    core = tmp_path / "bin" / "wandb-core"
    core.parent.mkdir()
    core.write_text("#!/bin/sh\ncat <<'END'\n" + "".join(f"{line}\n" for line in lines) + "END\n")
    core.chmod(0o755)
    file = tmp_path / "wandb" / "offline-run-1-mine" / "run-mine.wandb"
    file.parent.mkdir(parents=True)
    file.touch()
    wandb = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    assert wandb_logger._last_step(wandb, tmp_path, "mine") == expected
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)
