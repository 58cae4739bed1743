"""A few steps beside a run: what `--find-lr`, `--find-batch`, `doctor.py --prove` and bench share."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed, peak_memory_bytes
from trainer.model.build import build_model, load_config
from trainer.tools.worker_processes import end_with_parent
from trainer.tracking.silence import silence_libraries
from trainer.training.run_plan import RunPlan, make_plan

FINDER_FILES = ("find-lr.json", "find-lr.png", "find-batch.json", "prove.json")  # a run may begin beside them


@contextlib.contextmanager
def join_job(job_file: str) -> Iterator[tuple[dict[str, Any], DistContext]]:
    """A job that `run_job` has started, on one of its ranks, which have joined."""
    end_with_parent()
    silence_libraries()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    dist_context = init_distributed(job.get("device"))
    try:
        yield job, dist_context
    finally:
        dist_context.watchdog.close()
        destroy_process_group()


def write_answer(job: Mapping[str, Any], dist_context: DistContext, numbers: Mapping[str, Any]) -> None:
    """Append rank 0's numbers to the job's answers, with the peak memory of the rank that needs most; all must call."""
    peak = max(dist_context.all_gather_object(peak_memory_bytes(dist_context.device)))
    if dist_context.rank == 0:
        with open(job["answer"], "a", encoding="utf-8") as file:
            file.write(json.dumps({**numbers, "peak_memory_bytes": peak}) + "\n")


def start_trial(settings: Settings, data: PreparedDataset, dist_context: DistContext) -> tuple[RunPlan, Engine]:
    """The plan of a run of these settings and its engine."""
    model = build_model(settings, with_fingerprint=False, device=dist_context.device)
    plan = make_plan(settings, dist_context, data, model.metadata, load_config(settings.model))
    return plan, Engine(dist_context, model, plan.deepspeed_config, plan.settings.train, plan.execution)


def write_result(name: str, plan: RunPlan, content: Mapping[str, Any]) -> Path:
    """Write what was measured to the run folder as JSON, with the settings and data that it was measured for.

    UserError where it cannot be written there.
    """
    facts = {
        "format": 1,
        "mode": plan.settings.mode,
        "settings": plan.settings.as_dict(),
        "resolved": plan.resolved(),
        "data": plan.data_info["fingerprint"],
        **content,
    }
    folder = Path(plan.settings.run_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        message = f"{folder}: cannot write there: {error.strerror}; name another folder with --output-dir"
        raise UserError(message) from error
    return folder / name
