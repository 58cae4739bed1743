"""A few steps beside a run: what `--find-lr`, `--find-batch`, `doctor.py` and bench share."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.files import write_atomically
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.data.prepare import prepare
from trainer.distributed.engine import Engine
from trainer.distributed.machine import peak_memory_bytes
from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed
from trainer.model.adapter_files import adopt_adapter
from trainer.model.build import build_model, get_max_positions, load_config
from trainer.tools.processes import end_with_parent
from trainer.tracking.optional_loggers import check_loggers
from trainer.tracking.silence import silence_libraries
from trainer.training.run_plan import RunPlan, build_planned_model, make_plan, validate_early

FINDER_FILES = ("find-lr.json", "find-lr.png", "find-batch.json", "prove.json")  # a run may begin beside them


def run_rank(measure: Callable[[dict[str, Any], DistContext], Iterator[dict[str, Any]]]) -> None:
    """Be one rank of a job that `run_job` has started; all ranks must yield alike.

    What `measure(job, dist_context)` yields on rank 0 are the job's answers, each with `peak_memory_bytes` of the rank
    that needs most.
    """
    end_with_parent()
    silence_libraries()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    dist_context = init_distributed(job.get("device"))
    try:
        for numbers in measure(job, dist_context):
            peak = max(dist_context.all_gather_object(peak_memory_bytes(dist_context.device)))
            if dist_context.rank == 0:
                with open(job["answer"], "a", encoding="utf-8") as file:
                    file.write(json.dumps({**numbers, "peak_memory_bytes": peak}) + "\n")
    finally:
        dist_context.watchdog.close()
        destroy_process_group()


def plan_run(settings: Settings, dist_context: DistContext) -> tuple[RunPlan, PreparedDataset]:
    """The plan of a run and its data, as launch/train.py would make them; UserError for what it would refuse."""
    settings = adopt_adapter(settings)
    validate_early(settings, dist_context)
    check_loggers(settings.output)
    model_config = load_config(settings.model)
    data = prepare(
        settings.data,
        model=settings.model.model,
        global_batch=settings.train.global_batch,
        max_positions=get_max_positions(model_config),
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    model = build_model(settings, on_meta=True)
    return make_plan(settings, dist_context, data, model.metadata, model_config), data


def start_trial(settings: Settings, data: PreparedDataset, dist_context: DistContext) -> tuple[RunPlan, Engine]:
    """The plan of a run of these settings and its engine."""
    model_info = build_model(settings, on_meta=True).metadata
    plan = make_plan(settings, dist_context, data, model_info, load_config(settings.model))
    model = build_planned_model(plan)
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
