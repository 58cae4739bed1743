"""Every faster way to compute a step gives the plain way's numbers: one case for each field of the execution plan."""

import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import joined_ranks, start_engine
from helpers.launch_ranks import run_on_ranks
from helpers.matrix import NUM_STEPS, RunDifference, launch_jobs, make_argv, make_job, read_job_result, run_jobs
from helpers.process_groups import reproducible_records

from trainer.distributed.cuda_graphs import NUM_WARMUP_CALLS
from trainer.model.cpu_attention import Dropout

EXACT = "exact"  # the same operations in the same order
ROUNDED = "rounded"  # another order of the sums
#: name: (flags, of both modes unless they name one; fields of the plan that make it plain; bound; ranks: all on two and
#: three ranks with small buckets)
PATHS: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "buckets": ("--ds-config zero0", {"overlaps_reduction": False}, EXACT, (2,)),
    "buckets, another order of three": (
        "--mode full --ds-config zero0 --max-steps 9",
        {"overlaps_reduction": False},
        ROUNDED,
        (3,),
    ),
    "finite check on the device": ("--mode full --ds-config zero0", {"finite_check": "host"}, ROUNDED, (1, 2)),
    "two steps in flight": ("--mode lora --ds-config zero0", {"steps_in_flight": 2}, EXACT, (1, 2)),
    "frozen base in bfloat16": ("--mode lora --precision bf16", {"frozen_dtype": "float32"}, EXACT, (2,)),
    "frozen base in bfloat16, zero2": (
        "--mode lora --precision bf16 --ds-config zero2",
        {"frozen_dtype": "float32"},
        EXACT,
        (2,),
    ),
    "graphs, by a stand-in": (
        "--ds-config zero0 --max-steps 9",
        {"cuda_graphs": True, "overlaps_reduction": False},
        ROUNDED,
        (1, 2),
    ),
    "a recording that fails on one rank": (
        "--mode lora --ds-config zero0 --max-steps 9",
        {"cuda_graphs": True, "overlaps_reduction": False},
        ROUNDED,
        (2,),
    ),
}


def run_with_stand_in_graphs(jobs: list[dict[str, Any]]) -> int:
    """`matrix.run_jobs`; what a GPU would record is done again at each replay."""
    from test_cuda_graphs import FakeCapturedGraph

    from trainer.distributed import cuda_graphs

    cuda_graphs.CapturedGraph = FakeCapturedGraph  # type: ignore[misc, assignment]
    return run_jobs(jobs)


def run_with_a_failed_recording(jobs: list[dict[str, Any]]) -> int:
    """The same with a recording that fails on rank 1 alone: its steps are eager beside recorded ones."""
    from trainer.distributed import cuda_graphs

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    if os.environ["RANK"] == "0":
        return run_with_stand_in_graphs(jobs)
    cuda_graphs.CapturedGraph = fail  # type: ignore[misc, assignment]
    return run_jobs(jobs)


def run_with_small_buckets(jobs: list[dict[str, Any]]) -> int:
    """`matrix.run_jobs` with buckets of 2 KiB, of which nearly all must leave while a backward runs."""
    from trainer.distributed import stepper

    launched = {"in the backward": 0, "after it": 0}
    reduce, launch_next = stepper.GradientBuckets.reduce, stepper.GradientBuckets._launch_next
    place = ["in the backward"]

    def reduce_after_it(self: Any) -> Any:
        place[0] = "after it"
        try:
            return reduce(self)
        finally:
            place[0] = "in the backward"

    def count_launch(self: Any) -> None:
        launched[place[0]] += 1
        launch_next(self)

    stepper.MIN_BUCKET_BYTES["gloo"] = 2**11
    stepper.GradientBuckets.reduce = reduce_after_it  # type: ignore[method-assign]
    stepper.GradientBuckets._launch_next = count_launch  # type: ignore[method-assign]
    code = run_jobs(jobs)
    print(launched)
    return code or int(not launched["in the backward"] > max(50, 5 * launched["after it"]))


def target_of(name: str, ranks: int) -> Callable[..., int]:
    """What runs the jobs of a path, on so many ranks."""
    special = {
        "graphs": run_with_stand_in_graphs,
        "a recording that fails on one rank": run_with_a_failed_recording,
    }
    return special.get(name.partition(",")[0], run_with_small_buckets if ranks > 1 else run_jobs)


def job_name(flags: str, mode: str, fields: dict[str, Any]) -> str:
    return re.sub(r"[^\w.-]+", "_", f"{mode} {flags} {fields}")


@pytest.fixture(scope="module")
def results(tiny_model: str, data_files: tuple[str, str], data_dir: Path, tmp_path_factory: Any) -> Callable[..., Path]:
    """The folder of results of a path's jobs: all that share its ranks and target run together, each once."""
    folders: dict[Any, Path] = {}

    def run(name: str, ranks: int) -> Path:
        target = target_of(name, ranks)
        key = (target.__name__, ranks)
        if key not in folders:
            folders[key] = out = tmp_path_factory.mktemp("paths")
            jobs = {}
            for other, (flags, fields, _, numbers) in PATHS.items():
                if ranks in numbers and target_of(other, ranks) is target:
                    for mode, changed in itertools.product(modes_of(flags), ({}, fields)):
                        argv = [*make_argv(tiny_model, data_files, mode, "completion"), "--micro-batch", "1"]
                        job = job_name(flags, mode, changed)
                        jobs[job] = make_job(out, job, [*argv, *flags.split()], data=data_dir, execution=changed)
            launch_jobs(ranks, list(jobs.values()), out / "log", target)
        return folders[key]

    return run


def modes_of(flags: str) -> list[str]:
    return [flags.split()[1]] if flags.startswith("--mode") else ["full", "lora"]


def cases() -> list[Any]:
    return [
        pytest.param(name, ranks, id=f"{name}, {ranks} rank{'s' * (ranks > 1)}")
        for name in PATHS
        for ranks in PATHS[name][3]
    ]


@pytest.mark.parametrize(("name", "ranks"), cases())
def test_a_fast_path_gives_the_records_and_weights_of_the_plain_one(name, ranks, results):
    flags, fields, bound, _ = PATHS[name]
    out = results(name, ranks)
    for mode in modes_of(flags):
        planned, weights = read_job_result(out, job_name(flags, mode, {}))
        other, other_weights = read_job_result(out, job_name(flags, mode, fields))
        assert len([row for row in planned if row["kind"] == "step"]) >= NUM_STEPS
        if bound == EXACT:
            assert reproducible_records(planned) == reproducible_records(other)
            assert all(np.array_equal(weights[key], other_weights[key]) for key in weights)
            continue
        difference = RunDifference.between((planned, weights), (other, other_weights))
        assert difference.is_rounding(lr_ratio=4), difference  # LoRA+'s rate of B


def check_engines(jobs: list[dict[str, Any]]) -> int:
    """On a rank: an engine has installed what its plan says, and nothing else."""
    with joined_ranks() as context:
        for job in jobs:
            run = start_engine(job, context)
            plan, module = run.plan, run.model.module
            assert run.engine.plan == plan.execution
            assert plan.to_metadata(run_id="x", wandb={})["execution"][0]["path"] == plan.execution.path
            assert plan.execution.blockwise_attention == job["expected"], job
            assert any(isinstance(layer, Dropout) for layer in module.modules()) == job["expected"], job
            has_bf16 = torch.bfloat16 in {p.dtype for p in module.parameters()}
            assert has_bf16 == (plan.execution.frozen_dtype == "bfloat16"), job
    return 0


def test_an_engine_runs_what_its_plan_records(tiny_model, data_files, data_dir, tmp_path):
    """Also where only the adapters have a dropout (`--dropout 0 --lora-dropout 0.1`)."""
    blockwise = ("--mode full --dropout 0.1", "--mode lora --dropout 0.1", "--mode lora --dropout 0 --lora-dropout 0.1")
    others = ("--ds-config zero1", "--ds-config zero2", "--ds-config zero3", "--adapter rslora", "--adapter pissa")
    others += ("--adapter dora", "--quant nf4", "--precision bf16")
    jobs = []
    for flags in (*blockwise, "--mode full", *(f"--mode lora {other}" for other in others)):
        argv = [*make_argv(tiny_model, data_files, "full", "completion"), *flags.split()]
        jobs.append(make_job(tmp_path, "engine", argv, data=data_dir, expected=flags in blockwise))
    launch_jobs(1, jobs, tmp_path / "log", check_engines)


def train_with_failing_capture(argv: list[str]) -> int:
    """A whole run whose plan records graphs, on a device that cannot."""
    from helpers.launch_ranks import run_train_script

    from trainer.distributed import cuda_graphs
    from trainer.training import run_plan

    def fail(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    original = run_plan.make_execution_plan
    cuda_graphs.CapturedGraph = fail  # type: ignore[misc, assignment]
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
