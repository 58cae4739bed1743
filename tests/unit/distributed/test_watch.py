"""The stacks of a run that hung stay, also of a rank whose collective fails because a hung one has ended."""

import contextlib
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer.distributed.watch import Watchdog


@pytest.mark.parametrize(
    ("hangs", "fails", "is_kept"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_stacks_are_kept_where_a_run_hung_and_then_failed(hangs, fails, is_kept, tmp_path: Path):
    """Without a failure the whole process was suspended and went on."""
    watchdog = Watchdog(0, ["host"], dist.HashStore())
    with contextlib.suppress(ConnectionError), watchdog.watch_for_hangs(0.3, tmp_path):
        time.sleep(0.6 * hangs)
        if fails:
            raise ConnectionError("Connection closed by peer")
    watchdog.close()
    stacks = {path.name: path.read_text() for path in tmp_path.glob("stacks/*")}
    assert list(stacks) == ["rank-0.txt"] * is_kept
    assert all("Timeout" in text for text in stacks.values())
    assert (tmp_path / "stacks").exists() == is_kept
