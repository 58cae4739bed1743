"""Threads of a run do not spin for long, and Arrow gives memory back, unless the user has said otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[3] / "launch"
CODE = """
import atexit, os, sys
sys.path.insert(0, sys.argv[1])
sys.modules["trainer.run"] = sys.modules["trainer.tools.doctor.doctor"] = None  # in place of what takes seconds
import {script}
sys.argv = ["{script}.py", "--mode", "full"]
try:
    {script}.main()
except ImportError:
    print(*(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "ARROW_DEFAULT_MEMORY_POOL")))
    print(*(name in sys.modules for name in ("torch", "pyarrow")))
"""


@pytest.mark.parametrize("script", ["train", "doctor"])
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "2000 system"),
        ({"GOMP_SPINCOUNT": "7"}, "7 system"),
        ({"OMP_WAIT_POLICY": "passive"}, "None system"),
        ({"ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}, "2000 mimalloc"),
    ],
)
def test_spin_and_arrows_pool_are_set_before_they_are_read_unless_the_user_set_them(script, variables, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ARROW_DEFAULT_MEMORY_POOL")
    environ = {k: v for k, v in os.environ.items() if k not in names} | variables
    answer = subprocess.run(
        [sys.executable, "-c", CODE.format(script=script), str(LAUNCH)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.stdout.split() == [*expected.split(), "False", "False"], answer.stderr
