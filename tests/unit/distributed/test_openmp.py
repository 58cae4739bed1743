"""Threads of a run do not spin for long, unless the user has said how they wait."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[3] / "launch"
CODE = """
import atexit, os, sys
sys.path.insert(0, sys.argv[1])
sys.modules["trainer.run"] = sys.modules["trainer.tools.doctor.doctor_cli"] = None  # in place of what takes seconds
import {script}
sys.argv = ["{script}.py", "--mode", "full"]
try:
    {script}.main()
except ImportError:
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize("script", ["train", "doctor"])
@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
)
def test_a_short_spin_is_set_before_torch_is_imported_unless_the_user_set_one(script, variables, expected):
    environ = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | variables
    answer = subprocess.run(
        [sys.executable, "-c", CODE.format(script=script), str(LAUNCH)], env=environ, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert answer.stdout.split() == [expected, "False"], answer.stderr
