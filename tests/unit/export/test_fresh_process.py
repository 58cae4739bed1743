"""The process that exports ends with the run that started it, which does not wait for one that hangs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.errors import TrainingError
from trainer.export.fresh_process import export_in_fresh_process


def test_the_exporting_process_ends_when_its_parent_is_gone(tmp_path):
    """At once: not only when it has imported what it needs, which can take minutes on a busy machine."""
    (tmp_path / "torch.py").write_text("import time; time.sleep(300)")
    place = [str(tmp_path), str(Path(__file__).parents[3])]
    line = [sys.executable, "-m", "trainer.export.fresh_process", "{}"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(place)}
    with subprocess.Popen(line, stdin=subprocess.PIPE, cwd=tmp_path, env=environ) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 1


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time; time.sleep(300)", r"the export stood still for 2 s \(--hang-timeout\)"),
        ("from trainer.config.errors import UserError; raise UserError('no room')", "no room"),
        ("import os; os.write(2, b'a warning'); os.kill(os.getpid(), 9)", "its process was killed by SIGKILL"),
    ],
)
def test_a_process_that_hangs_fails_or_is_killed_is_one_line(code, reason, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(code)
    monkeypatch.chdir(tmp_path)  # where `python -m` looks first
    with pytest.raises(TrainingError, match=f"model not written: {reason}"):
        export_in_fresh_process({"output_dir": "model"}, 2.0)
