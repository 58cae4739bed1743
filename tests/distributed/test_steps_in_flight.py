"""Steps that are asked for before the numbers of those before them are read, as on a GPU: nothing else changes."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import joined_ranks, start_engine
from helpers.matrix import launch_jobs, make_argv, make_job
from safetensors.torch import load_file

from trainer.config.errors import TrainingError
from trainer.distributed.engine import Engine
from trainer.tracking.records import EvalRecord, EventRecord, Record, StepRecord
from trainer.training.checkpoint import STATE_FILE, resolve_checkpoint
from trainer.training.loop import train


def count_launches() -> list[int]:
    """A list of one number: how many steps were asked for from here on."""
    num_launches, launch_update = [0], Engine.launch_update

    def launch_and_count(self: Any, *args: Any, **kwargs: Any) -> Any:
        num_launches[0] += 1
        return launch_update(self, *args, **kwargs)

    Engine.launch_update = launch_and_count  # type: ignore[method-assign]
    return num_launches


@pytest.fixture
def make_completion_job(tiny_model: str, data_files: tuple[str, str], tmp_path: Path) -> Any:
    """A function: the job of that name with these flags."""

    def make(name: str, *flags: str, **options: Any) -> dict[str, Any]:
        argv = [*make_argv(tiny_model, data_files, "full", "completion"), "--micro-batch", "1", "--eval-every", "never"]
        return make_job(tmp_path, name, [*argv, *flags], **options)

    return make


def checkpoint_folder(job: dict[str, Any]) -> Path:
    return Path(job["out"]) / job["name"] / "checkpoints"


def train_in_flight(job: dict[str, Any], dist_context: Any, should_stop: Callable[[], bool]) -> Iterator[Record]:
    """The records of a run in which one more step is under way than is read."""
    run = start_engine({**job, "execution": {"steps_in_flight": 2}}, dist_context)
    manager = run.checkpoint_manager(checkpoint_folder(job))
    return train(run.engine, run.data, run.plan.schedule, run.state, manager, should_stop)


def run_non_finite_jobs(jobs: list[dict[str, Any]]) -> int:
    """On a rank: the numbers of the job's step are not finite; the one after it is asked for already."""
    num_launches, original = count_launches(), Engine.forward_backward
    with joined_ranks() as dist_context:
        for job in jobs:
            num_launches[0], last_good = 0, job["bad"] - 1

            def forward_backward(self: Any, *args: Any, step: int, last_good: int = last_good, **kwargs: Any) -> Any:
                loss_sum = original(self, *args, step=step, **kwargs)
                return loss_sum * math.nan if step == last_good and dist_context.rank == 0 else loss_sum

            Engine.forward_backward = forward_backward  # type: ignore[method-assign]
            records: list[Any] = []
            message = f"step {job['bad']}: loss nan; the weights are those after step {last_good};"
            with pytest.raises(TrainingError, match=message):  # noqa: PT012  # what comes before the error is kept
                for record in train_in_flight(job, dist_context, lambda: False):
                    records.append(record)
            assert [row.step for row in records if isinstance(row, StepRecord)] == list(range(1, last_good + 1))
            assert isinstance(records[-1], EventRecord)
            assert records[-1].event == "not_finite"
            assert num_launches[0] == job["bad"] + 1
    return 0


def test_a_non_finite_step_in_flight_is_found_late_and_has_changed_no_weight(make_completion_job):
    """Neither has the one that was asked for after it: the checkpoint is that before the bad one."""
    jobs = [make_completion_job(f"bad-{bad}", "--save-every", "never", bad=bad) for bad in (2, 4)]
    whole_job = make_completion_job("whole", "--save-every", "1")
    launch_jobs(2, jobs, target=run_non_finite_jobs)
    launch_jobs(2, [whole_job])
    for job in jobs:
        good, weights = (
            load_file(resolve_checkpoint(checkpoint_folder(which), name).folder / STATE_FILE)
            for which, name in ((whole_job, f"step-{job['bad'] - 1}"), (job, "latest"))
        )
        assert good.keys() == weights.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in good.items())


def run_stopped_job(jobs: list[dict[str, Any]]) -> int:
    """On a rank: a signal comes while the fourth step is asked for."""
    num_launches = count_launches()
    with joined_ranks() as dist_context:
        records: list[Any] = list(train_in_flight(jobs[0], dist_context, lambda: num_launches[0] >= 4))
        steps = [row.step for row in records if isinstance(row, StepRecord)]
        assert steps == list(range(1, num_launches[0] + 1)), "what was asked for is told of"
        assert records[-1].event == "interrupted"
        assert not [row for row in records if isinstance(row, EvalRecord) and row.step]
        assert resolve_checkpoint(checkpoint_folder(jobs[0]), "latest").step == records[-1].step == len(steps) < 9
    return 0


def test_a_stop_waits_for_the_step_in_flight_and_saves_it(make_completion_job):
    launch_jobs(2, [make_completion_job("one", "--save-every", "never")], target=run_stopped_job)
