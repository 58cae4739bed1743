"""Every faster way to compute a step gives the plain way's numbers: one case for each field of the execution plan."""

import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.engines import joined_ranks
from helpers.launch_ranks import run_on_ranks
from helpers.matrix import (
    NUM_STEPS,
    RunDifference,
    launch_jobs,
    make_argv,
    make_job,
    read_job_result,
    run_job,
    run_jobs,
)
from helpers.process_groups import reproducible_records

from trainer.distributed.execution import NUM_WARMUP_CALLS


def run_with_stand_in_graphs(jobs: list[dict[str, Any]]) -> int:
    """`matrix.run_jobs`; what a GPU would record is done again at each replay."""
    from test_cuda_graphs import FakeCapturedGraph

    from trainer.distributed import execution

    execution.CapturedGraph = FakeCapturedGraph  # type: ignore[misc, assignment]
    return run_jobs(jobs)


def run_with_a_failed_recording(jobs: list[dict[str, Any]]) -> int:
    """The same with a recording that fails on rank 1 alone: its steps are eager beside recorded ones."""
    if os.environ["RANK"] == "0":
        return run_with_stand_in_graphs(jobs)
    fail_to_record("out of memory")
    return run_jobs(jobs)


def run_without_memory_beside_graphs(jobs: list[dict[str, Any]]) -> int:
    """The same, where an evaluation (rank 1) and eager micro-batches find no memory: alone, one that adds to others."""
    from test_cuda_graphs import FakeCapturedGraph

    from trainer.distributed import execution

    execution.CapturedGraph = FakeCapturedGraph  # type: ignore[misc, assignment]
    engine_class, init = import_module("deepspeed").DeepSpeedEngine, execution.CUDAGraphRunner.__init__
    forward, is_evaluation = engine_class.forward, os.environ["RANK"] == "1"

    def init_without_memory(self: Any, stepper: Any, **options: Any) -> None:
        call = forward if is_evaluation else stepper.backward

        def call_without_memory(*inputs: Any) -> Any:
            is_adding = stepper.trainable_params[0].grad is not None
            result = call(*inputs)
            if self.captured and (is_adding or os.environ["WORLD_SIZE"] == "2"):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        init(self, stepper, **options)
        if is_evaluation:
            engine_class.forward = call_without_memory
        else:
            stepper.backward = call_without_memory

    execution.CUDAGraphRunner.__init__ = init_without_memory  # type: ignore[method-assign, assignment]
    with joined_ranks() as context:
        for job in jobs:
            engine = run_job(context, job).engine
            engine.fall_back(99)
            reasons = [change["reason"] for change in engine.plan_changes]
            assert len(reasons) == bool(job["execution"]), (os.environ["RANK"], reasons)
            assert all(reason.endswith("no memory: CUDA out of memory") for reason in reasons), reasons
    return 0


def fail_to_record(reason: str) -> None:
    from trainer.distributed import execution

    def fail(*_: Any) -> None:
        raise RuntimeError(reason)

    execution.CapturedGraph = fail  # type: ignore[misc, assignment]


def run_with_small_buckets(jobs: list[dict[str, Any]]) -> int:
    """`matrix.run_jobs` with buckets of 2 KiB, of which nearly all must leave while a backward runs."""
    from trainer.distributed import stepper

    finish_overlap, shares = stepper.GradientBuckets.finish_overlap, []

    def finish_and_count(self: Any) -> None:
        shares.append(len(self._work) / len(self._buckets))
        finish_overlap(self)

    stepper.MIN_BUCKET_BYTES["gloo"] = 2**11
    stepper.GradientBuckets.finish_overlap = finish_and_count  # type: ignore[method-assign]
    code = run_jobs(jobs)
    print(shares)
    return code or int(not sum(shares) > 0.8 * len(shares) > 0)


class FastPath(NamedTuple):
    """A way to compute a step that is faster than the plain one."""

    flags: str  #: of both modes unless they name one
    plain: dict[str, Any]  #: fields of the execution plan that make it plain
    is_exact: bool  #: the same operations in the same order; else another order of the sums
    ranks: tuple[int, ...]  #: all on two and three ranks with small buckets
    target: Callable[..., int] | None = None  #: what runs the jobs

    @property
    def modes(self) -> list[str]:
        return [self.flags.split()[1]] if self.flags.startswith("--mode") else ["full", "lora"]

    def job_name(self, mode: str, fields: dict[str, Any]) -> str:
        return re.sub(r"[^\w.-]+", "_", f"{mode} {self.flags} {fields}")

    def runner(self, ranks: int) -> Callable[..., int]:
        return self.target or (run_with_small_buckets if ranks > 1 else run_jobs)


NO_OVERLAP, GRAPHS = {"overlaps_reduction": False}, {"cuda_graphs": True, "overlaps_reduction": False}
LONG = "--ds-config zero0 --max-steps 9"
BF16, FLOAT32_BASE = "--mode lora --precision bf16", {"frozen_dtype": "float32"}
PATHS = {
    "buckets": FastPath("--ds-config zero0", NO_OVERLAP, True, (2,)),
    "buckets, another order of three": FastPath(f"--mode full {LONG}", NO_OVERLAP, False, (3,)),
    "finite check on the device": FastPath("--mode full --ds-config zero0", {"finite_check": "host"}, False, (1, 2)),
    "two steps in flight": FastPath("--mode lora --ds-config zero0", {"steps_in_flight": 2}, True, (1, 2)),
    "frozen base in bfloat16": FastPath(BF16, FLOAT32_BASE, True, (2,)),
    "frozen base in bfloat16, zero2": FastPath(f"{BF16} --ds-config zero2", FLOAT32_BASE, True, (2,)),
    "graphs, by a stand-in": FastPath(LONG, GRAPHS, False, (1, 2), run_with_stand_in_graphs),
    "a recording that fails on one rank": FastPath(
        f"--mode lora {LONG}", GRAPHS, False, (2,), run_with_a_failed_recording
    ),
    "no memory beside graphs": FastPath(f"--mode full {LONG}", GRAPHS, False, (1, 2), run_without_memory_beside_graphs),
}
CASES = [
    pytest.param(path, ranks, id=f"{name}, {ranks} rank{'s' * (ranks > 1)}")
    for name, path in PATHS.items()
    for ranks in path.ranks
]


@pytest.fixture(scope="module")
def results(tiny_model: str, data_files: tuple[str, str], data_dir: Path, tmp_path_factory: Any) -> Callable[..., Path]:
    """The folder of results of a path's jobs: all that share its ranks and target run together, each once."""
    folders: dict[Any, Path] = {}

    def run(path: FastPath, ranks: int) -> Path:
        target = path.runner(ranks)
        if (target, ranks) not in folders:
            folders[target, ranks] = out = tmp_path_factory.mktemp("paths")
            jobs = {}
            for other in PATHS.values():
                for mode, fields in itertools.product(other.modes, ({}, other.plain)):
                    if ranks in other.ranks and other.runner(ranks) is target:
                        argv = [*make_argv(tiny_model, data_files, mode, "completion"), "--micro-batch", "1"]
                        flags, name = [*argv, *other.flags.split()], other.job_name(mode, fields)
                        jobs[name] = make_job(out, name, flags, data=data_dir, execution=fields)
            launch_jobs(ranks, list(jobs.values()), out / "log", target)
        return folders[target, ranks]

    return run


@pytest.mark.parametrize(("path", "ranks"), CASES)
def test_a_fast_path_gives_the_records_and_weights_of_the_plain_one(path, ranks, results):
    out = results(path, ranks)
    for mode in path.modes:
        planned, weights = read_job_result(out, path.job_name(mode, {}))
        other, other_weights = read_job_result(out, path.job_name(mode, path.plain))
        assert len([row for row in planned if row["kind"] == "step"]) >= NUM_STEPS
        if path.is_exact:
            assert reproducible_records(planned) == reproducible_records(other)
            assert all(np.array_equal(weights[key], other_weights[key]) for key in weights)
        else:
            difference = RunDifference.between((planned, weights), (other, other_weights))
            assert difference.is_rounding(), difference


def train_with_failing_capture(argv: list[str]) -> int:
    """A whole run whose plan records graphs, on a device that cannot."""
    from helpers.launch_ranks import run_train_script

    from trainer.training import run_plan

    original = run_plan.make_execution_plan
    fail_to_record("operation not permitted when stream is capturing")
    run_plan.make_execution_plan = lambda *args, **kwargs: replace(original(*args, **kwargs), cuda_graphs=True)
    return run_train_script(argv)


def test_a_fallback_is_an_event_and_run_json_keeps_every_plan(tiny_model, data_files, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = [*make_argv(tiny_model, data_files, "full", "blocks"), "--max-steps", "8", "--output-dir", str(out)]
    assert run_on_ranks(1, train_with_failing_capture, argv, log=log) == 0, log.read_text()
    planned, fallback = json.loads((out / "run.json").read_text())["execution"]
    assert (planned["step"], planned["path"], planned["reason"]) == (0, "graphs", "as planned")
    assert fallback["path"] == "eager"
    ragged = 1  # of the first epoch's steps: a shape of its own
    assert fallback["step"] == NUM_WARMUP_CALLS + ragged + 1, "the step in which it failed is done eagerly"
    assert "stream is capturing" in fallback["reason"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (event,) = [row for row in records if row.get("event") == "execution"]
    assert event["message"] == fallback["reason"]
    assert len([row for row in records if row["kind"] == "step"]) == 8
