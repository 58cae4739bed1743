"""What test_methods.py and test_families.py hold of a run: it learns, resumes bitwise and exports what was trained."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from helpers.matrix import assert_resumed_bitwise, launch_jobs, read_job_result
from trainer.export.export_cli import export_checkpoint
from trainer.export.verify import LOGITS_BOUND

STOP_STEP = 2  # the step after which the run is stopped


def launch_whole_and_resumed(world_size: int, jobs: Iterable[dict[str, Any]], *, jobs_per_launch: int = 8) -> None:
    """Each job, and once more from STOP_STEP."""
    again = ({**job, "name": f"{job['name']}-again", "resume": [job["name"], STOP_STEP]} for job in jobs)
    launch_jobs(world_size, [*jobs, *again], jobs_per_launch=jobs_per_launch)


def assert_promises(job: dict[str, Any], *, loss_tolerance: float = 1e-6, merges: bool = False) -> dict[str, Any]:
    """Assert all three of a job that was launched, `merges`: of its merged folder too; returns its run.json."""
    out, name = Path(job["out"]), job["name"]
    losses = [record["loss"] for record in read_job_result(out, name)[0] if record["kind"] == "eval"]
    assert losses[-1] < losses[0], (name, losses)
    assert_resumed_bitwise(out, name, f"{name}-again", STOP_STEP)
    for merge in (False, True) if merges else (False,):
        result = export_checkpoint(out / name, data_folder=job["data"], merge=merge)
        numbers = re.search(
            r"logits differ by at most (\S+?)(?: \(the largest is (\S+)\))?, validation loss (\S+) \(recorded (\S+)\)",
            result["summary"],
        )
        assert numbers is not None, (name, result)
        difference, largest, loss, recorded = (float(number or 1) for number in numbers.groups())
        assert difference <= LOGITS_BOUND * max(1.0, largest) * (10 if merge else 1), (name, result)
        assert loss == pytest.approx(recorded, rel=loss_tolerance), (name, result)
        others = [p for p in result["problems"] if not p.startswith(("validation loss", "logits differ"))]
        assert others == [], name
    print(f"{name}: {losses[0]:.4f} -> {losses[-1]:.4f}; {result['summary']}")
    return json.loads((out / name / "run.json").read_text())
