"""A few steps beside a run: what `--find-batch`, `doctor.py` and bench share."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.data.prepare import prepare
from trainer.distributed.engine import Engine
from trainer.distributed.launch_environment import without_launcher
from trainer.distributed.machine import find_free_port, peak_memory_bytes
from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed
from trainer.model.build import get_max_positions, load_config
from trainer.model.lora import adopt_adapter
from trainer.tools.processes import failure_reason, start_process
from trainer.tracking.wandb_logger import check_loggers
from trainer.training.run_plan import RunPlan, build_planned_model, make_plan, validate_early

Measure = Callable[[dict[str, Any], DistContext], Iterator[dict[str, Any]]]


def run_job(
    measure: Measure, job: dict[str, Any], world_size: int, *, timeout_seconds: float = float("inf")
) -> tuple[list[dict[str, Any]], list[int] | None, str]:
    """Call `measure(job, dist_context)` on so many ranks, all of which must yield alike. (What rank 0 yielded, with
    `peak_memory_bytes` of the rank that needs most; the ranks' exit codes, None where the time was over; why it failed,
    "" where it did not.) A rank that fails ends the others; all have ended on return."""
    env = without_launcher(os.environ) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port())}
    env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory(prefix="job-") as scratch:
        answer_file, folders = Path(scratch, "answers"), [Path(scratch, f"rank-{rank}") for rank in range(world_size)]
        answer_file.touch()
        ranks: list[BaseProcess] = []
        try:
            for rank, folder in enumerate(folders):
                own = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
                args = (measure, job, answer_file)
                ranks.append(start_process(_run_rank, args, folder, env | own, torch.cuda.is_available()))
            while (running := [rank for rank in ranks if rank.exitcode is None]) and time.monotonic() < deadline:
                if any(rank.exitcode for rank in ranks):
                    break
                wait([rank.sentinel for rank in running], min(1.0, deadline - time.monotonic()))
            is_late = bool(running) and not any(rank.exitcode for rank in ranks)
            exit_codes = None if is_late else [rank.exitcode or 0 for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
        answers = [json.loads(line) for line in answer_file.read_text(encoding="utf-8").splitlines()]
        failed = next((rank for rank, code in enumerate(exit_codes or [1]) if code), None)
        return answers, exit_codes, "" if failed is None else failure_reason(folders[failed] / "log")


def _run_rank(measure: Measure, job: dict[str, Any], answer_file: Path) -> None:
    dist_context = init_distributed()
    try:
        for numbers in measure(job, dist_context):
            peak = max(dist_context.all_gather_object(peak_memory_bytes(dist_context.device)))
            if dist_context.rank == 0:
                with open(answer_file, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**numbers, "peak_memory_bytes": peak}) + "\n")
    finally:
        dist_context.watchdog.close()
        destroy_process_group()


def plan_run(settings: Settings, dist_context: DistContext) -> tuple[RunPlan, PreparedDataset]:
    """The plan of a run and its data, as launch/train.py would make them; UserError for what it would refuse."""
    settings = adopt_adapter(settings)
    validate_early(settings, dist_context)
    check_loggers(settings.output)
    data = prepare(
        settings.data,
        model=settings.model.model,
        global_batch=settings.train.global_batch,
        max_positions=get_max_positions(load_config(settings.model)),
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return make_plan(settings, dist_context, data), data


def start_trial(settings: Settings, data: PreparedDataset, dist_context: DistContext) -> tuple[RunPlan, Engine]:
    """The plan of a run of these settings and its engine."""
    plan = make_plan(settings, dist_context, data)
    model = build_planned_model(plan)
    return plan, Engine(dist_context, model, plan.deepspeed_config, plan.settings.train, plan.execution)
