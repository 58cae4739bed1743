"""What the check of an exported folder finds, and that its process ends with the run's."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from trainer.export.verify import verify_folder
from trainer.training.checkpoint import Checkpoint


def test_verification_of_a_folder_that_cannot_be_loaded_fails_without_a_crash(tmp_path):
    logits, cpu = np.ones((1, 1, 1)), torch.device("cpu")
    source = Checkpoint(folder=tmp_path, metadata={"progress": {"step": 1, "val_step": 0}, "precision": "fp32"})
    verification = verify_folder(tmp_path, source, input_ids=np.zeros((1, 1)), logits=logits, is_tied=True, device=cpu)
    assert len(verification.problems) == 1
    assert verification.summary.startswith("CHECK FAILED: it could not be loaded again: ")


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
