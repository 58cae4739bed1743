"""Steps that are asked for before the numbers of those before them are read, as on a GPU: nothing else changes."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.matrix import launch_jobs, make_argv
from safetensors.torch import load_file

from trainer.config import cli
from trainer.config.errors import TrainingError
from trainer.data.dataset import load
from trainer.distributed import engine as engine_module
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import destroy_process_group, init_distributed
from trainer.model.build import build_model, load_config
from trainer.run import build_engine
from trainer.tracking.records import EvalRecord, EventRecord, StepRecord
from trainer.training import checkpoint
from trainer.training.checkpoint import CheckpointManager
from trainer.training.loop import train
from trainer.training.run_plan import make_plan
from trainer.training.train_state import TrainState

CallLog = list[tuple[str, int]]


def log_steps(call_log: CallLog) -> None:
    """From here on `call_log` says in which order numbers are copied from the device and read.

    A device works in order: a copy that is queued before the next step is launched does not wait for that step.
    """
    original_launch, original_copy = Engine.launch_update, engine_module.copy_to_host

    def launch_update(self: Any, *args: Any, **kwargs: Any) -> Any:
        call_log.append(("asked", sum(event == "asked" for event, _ in call_log)))
        return original_launch(self, *args, **kwargs)

    def copy_to_host(numbers: torch.Tensor) -> Any:
        index = sum(event == "copied" for event, _ in call_log)
        call_log.append(("copied", index))
        read = original_copy(numbers)
        return lambda: call_log.append(("read", index)) or read()

    Engine.launch_update = launch_update  # type: ignore[method-assign]
    engine_module.copy_to_host = copy_to_host


def reads_of_a_late_device(call_log: CallLog) -> list[tuple[int, int]]:
    """(step, steps launched by then) of each read, on a device that works in order, and only when it is waited for.

    It works up to the copy that is read: asserts that this is the step's own work and no kernel of the step after.
    """
    queue, reads = [], []
    for event, index in call_log:
        if event != "read":
            queue.append((event, index))
            continue
        process = queue[: queue.index(("copied", index)) + 1]
        assert sum(what == "asked" for what, _ in process) == index + 1, "a read waits for a later step"
        reads.append((index, sum(what == "asked" for what, _ in queue)))
    return reads


def completion_argv(tiny_model: str, data_files: tuple[str, str], *flags: str) -> list[str]:
    return [*make_argv(tiny_model, data_files, "full", "completion"), "--micro-batch", "1", *flags]


def prepare_job(job: dict[str, Any], dist_context: Any) -> tuple[Any, ...]:
    settings, data = cli.parse_args(job["flags"]).settings, load(Path(job["data"]))
    model = build_model(settings)
    plan = make_plan(settings, dist_context, data, model.metadata, load_config(settings.model))
    plan = replace(plan, execution=replace(plan.execution, steps_in_flight=2))
    engine, state = build_engine(plan, model, None)
    checkpoint_manager = CheckpointManager(
        Path(job["out"]) / job["name"], dist_context, save_total_limit=99, identity={"base": "test"}
    )
    return engine, data, plan.schedule, state, checkpoint_manager


def run_non_finite_jobs(jobs: list[dict[str, Any]]) -> int:
    """On a rank: the numbers of the job's step are not finite; the one after it is asked for already."""
    call_log: CallLog = []
    log_steps(call_log)
    original = Engine.forward_backward
    dist_context = init_distributed()
    for job in jobs:
        del call_log[:]
        bad_step = job["bad"] - 1

        def forward_backward(
            self: Any, micro_batch: Any, *, step: int, num_target_tokens: int, bad_step: int = bad_step
        ) -> Any:
            loss_sum = original(self, micro_batch, step=step, num_target_tokens=num_target_tokens)
            return loss_sum * math.nan if step == bad_step and dist_context.rank == 0 else loss_sum

        Engine.forward_backward = forward_backward  # type: ignore[method-assign]
        engine, data, schedule, state, checkpoint_manager = prepare_job(job, dist_context)
        records = []
        with pytest.raises(
            TrainingError, match=f"step {job['bad']}: loss nan; the weights are those after step {bad_step},"
        ):
            records += list(
                collect_records(train(engine, data, schedule, state, checkpoint_manager, lambda: False), records)
            )
        steps = [row.step for row in records if isinstance(row, StepRecord)]
        assert steps == list(range(1, bad_step + 1))
        assert isinstance(records[-1], EventRecord)
        assert records[-1].event == "not_finite"
        for index, num_launched in reads_of_a_late_device(call_log):
            assert num_launched == min(index + 2, job["bad"] + 1), "one more step is under way while this one is read"
        if dist_context.rank == 0:
            weights = {name: tensor.numpy().copy() for name, tensor in engine.state.gather_weights()}
            np.savez(Path(job["out"]) / f"{job['name']}.npz", **weights)
            (Path(job["out"]) / f"{job['name']}.json").write_text(json.dumps({"told": call_log}))
        else:
            list(engine.state.gather_weights())
    destroy_process_group()
    return 0


def collect_records(stream: Any, records: list[Any]) -> Any:
    """Everything that comes, kept even where the stream then raises."""
    for record in stream:
        records.append(record)
    return ()


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.sweep), 2])
def test_a_non_finite_step_in_flight_is_found_late_and_has_changed_no_weight(
    ranks,
    tiny_model,
    data_files,
    data_dir,
    tmp_path,
):
    """Neither has the one that was asked for after it: weights and the checkpoint are those before the bad one."""
    flag = ("--eval-every", "never", "--save-every", "never")
    jobs = [
        {"name": f"{zero}-{bad}", "bad": bad, "data": str(data_dir), "out": str(tmp_path),
         "flags": completion_argv(tiny_model, data_files, "--ds-config", zero, *flag)}
        for zero in ("zero0", "zero1") for bad in (2, 4)
    ]  # fmt: skip
    launch_jobs(ranks, jobs, tmp_path / "log", run_non_finite_jobs)
    every = [
        {"name": zero, "data": str(data_dir), "out": str(tmp_path),
         "flags": completion_argv(tiny_model, data_files, "--ds-config", zero, "--eval-every", "never",
             "--save-every", "1")}
        for zero in ("zero0", "zero1")
    ]  # fmt: skip
    launch_jobs(ranks, every, tmp_path / "log")
    for job in jobs:
        before, zero = job["bad"] - 1, job["name"].partition("-")[0]
        calls = json.loads((tmp_path / f"{job['name']}.json").read_text())["told"]
        last_launched = max(number for what, number in calls if what == "asked")
        assert last_launched == job["bad"], "one more, counted from zero"
        good = load_file(
            checkpoint.resolve_checkpoint(tmp_path / f"{zero}-checkpoints", f"step-{before}").folder
            / checkpoint.STATE_FILE
        )
        weights = load_file(
            checkpoint.resolve_checkpoint(tmp_path / job["name"], "latest").folder / checkpoint.STATE_FILE
        )
        assert good.keys() == weights.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in good.items())


def run_stopped_jobs(jobs: list[dict[str, Any]]) -> int:
    """On a rank: a signal comes while the fourth step is asked for."""
    call_log: CallLog = []
    log_steps(call_log)
    dist_context = init_distributed()
    for job in jobs:
        del call_log[:]
        engine, data, schedule, state, checkpoint_manager = prepare_job(job, dist_context)
        stream = train(
            engine,
            data,
            schedule,
            state,
            checkpoint_manager,
            lambda: sum(event == "asked" for event, _ in call_log) >= 4,
        )
        records = []
        while True:
            try:
                records.append(next(stream))
            except StopIteration as stop:
                last_state: TrainState = stop.value
                break
        steps = [row.step for row in records if isinstance(row, StepRecord)]
        assert steps == list(range(1, last_state.step + 1))
        assert len(steps) == sum(event == "asked" for event, _ in call_log), "what was asked for is told of"
        assert records[-1].event == "interrupted"
        assert not [row for row in records if isinstance(row, EvalRecord) and row.step]
        assert checkpoint.resolve_checkpoint(checkpoint_manager.folder, "latest").step == last_state.step < 9
    destroy_process_group()
    return 0


def test_a_stop_waits_for_the_step_in_flight_and_saves_it(tiny_model, data_files, data_dir, tmp_path):
    flag = completion_argv(tiny_model, data_files, "--eval-every", "never", "--save-every", "never")
    launch_jobs(
        2,
        [{"name": "one", "flags": flag, "data": str(data_dir), "out": str(tmp_path)}],
        tmp_path / "log",
        run_stopped_jobs,
    )
