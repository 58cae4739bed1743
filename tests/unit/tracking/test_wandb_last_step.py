"""The last step that an earlier process logged to W&B is read back from what wandb-core prints of its file."""

import threading
from types import SimpleNamespace

import pytest

from trainer.tracking import wandb_file, wandb_logger

ROW = '{{"history": {{"item": {{"_step": {}}}}}}}'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [([ROW.format(3), "{}", ROW.format(7)], 7), ([], -1), ([ROW.format(3), '{"_step": broken'], 3)],
    ids=["steps", "nothing", "a broken line"],
)
def test_the_last_step_is_read_and_no_thread_stays(lines: list[str], expected: int, tmp_path, monkeypatch) -> None:
    """A timer left behind holds the process at its end."""
    core = tmp_path / "bin" / "wandb-core"
    core.parent.mkdir()
    core.write_text("#!/bin/sh\ncat <<'END'\n" + "".join(f"{line}\n" for line in lines) + "END\n")
    core.chmod(0o755)
    file = tmp_path / "wandb" / "offline-run-1-mine" / "run-mine.wandb"
    file.parent.mkdir(parents=True)
    file.touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(wandb_file.importlib.util, "find_spec", lambda name: spec)
    assert wandb_logger._last_step(tmp_path, "mine") == expected
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)
