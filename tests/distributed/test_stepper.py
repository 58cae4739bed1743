"""Steps under every ZeRO file: which are recorded, what one that is not finite changes, what stays alive after one."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import StartedRun, joined_ranks, start_engine
from helpers.matrix import launch_jobs, make_argv, make_job

from trainer.config import cli
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.data.sampler import step_batches, step_counts
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.process_group import simulated_context
from trainer.distributed.stepper import NonFiniteError
from trainer.training.run_plan import validate_early, validate_stage


def test_graphs_need_a_gpu_zero_0_and_settings_that_can_be_recorded():
    for flags in ("--quant nf4", "--activation-checkpointing"):
        with pytest.raises(UserError, match="--execution graphs: not with"):
            cli.parse_args(["--mode", "lora", *flags.split(), "--execution", "graphs"])
    graphs = cli.parse_args(["--mode", "full", "--execution", "graphs"]).settings
    with pytest.raises(UserError, match="--execution graphs: CUDA graphs need a GPU; expected auto or eager"):
        validate_early(graphs, simulated_context(1))
    with pytest.raises(UserError, match="--execution graphs: its steps are eager under ZeRO 1; expected"):
        validate_stage(graphs, read_deepspeed_file("zero1"))


# --- a step that is not finite ---


def check_non_finite_refused(jobs: list[dict[str, Any]]) -> int:
    """On a rank: a step that is not finite on rank 0 raises everywhere and changes no weight and no moment."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            for step in range(2):
                take_step(run, step)
            before = {name: tensor.clone() for name, tensor in run.engine.state.iter_state_dict()}
            buckets = getattr(run.engine.stepper, "buckets", None)
            for bad in job["bad"]:
                with pytest.raises(NonFiniteError, match=bad):
                    take_step(run, 2, bad)
                after = dict(run.engine.state.iter_state_dict())
                assert all(torch.equal(after[name], value) for name, value in before.items()), (job["name"], bad)
                if buckets and buckets.is_overlapping:  # what is on its way needs its memory
                    buckets.finish_overlap()
            run.engine.release_memory()
            assert not buckets or buckets.flat.untyped_storage().size() == 0, job["name"]
    return 0


def take_step(run: StartedRun, step: int, bad: str | None = None) -> None:
    """Forward, backward and update; `bad`: what is not finite on rank 0."""
    engine, train = run.engine, run.data.train
    rank, order = engine.dist_context.rank, np.arange(len(train))
    micro_batches = step_batches(train, order, step, run.plan.schedule.batch, rank)
    num_target_tokens = step_counts(train, order, step, 6)[1]
    factor = math.inf if bad == "gradient" and rank == 0 else 1.0
    hook = next(iter(engine.trainable_params.values())).register_hook(lambda gradient: gradient * factor)
    sums = []
    for micro_batch in micro_batches:
        if (buckets := getattr(engine.stepper, "buckets", None)) and micro_batch is micro_batches[-1]:
            buckets.is_overlapping = True
        sums.append(engine.forward_backward(micro_batch, step=step, num_target_tokens=num_target_tokens))
    hook.remove()
    if bad == "loss" and rank == 0:
        sums[0] = sums[0] * math.nan
    engine.launch_update(1e-3, sums)()


def test_a_step_that_is_not_finite_changes_nothing(tiny_model, data_files, data_dir, tmp_path):
    """A loss that is NaN with finite gradients as well, and a gradient alone."""
    jobs = []
    for zero, by in (("zero0", "device"), *((zero, "host") for zero in DS_CONFIG_NAMES)):
        flags = [*make_argv(tiny_model, data_files, "full", "completion"), "--ds-config", zero, "--micro-batch", "1"]
        bad = ["loss", "gradient"] if by == "host" else ["gradient"]
        options = {"execution": {"finite_check": by}, "bad": bad}
        jobs.append(make_job(tmp_path, f"{zero}-{by}", flags, data=data_dir, **options))
    launch_jobs(2, jobs, tmp_path / "log", check_non_finite_refused)


# --- nothing of a step's graph stays alive ---


def check_grad_nodes(jobs: list[dict[str, Any]]) -> int:
    """On a rank: how many weights keep the node that adds their gradient from one step to the next. Such a node belongs
    to the stream that it was made on. Recording a CUDA graph on another stream fails then."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            for step in range(2):
                take_step(run, step)
            params = list(run.engine.trainable_params.values())
            for parameter in params:
                add_node(parameter).metadata["is_kept"] = True
            num_kept = sum("is_kept" in add_node(parameter).metadata for parameter in params)
            assert (num_kept > 0) == job["keeps"], (job["name"], num_kept, len(params))
    return 0


def add_node(parameter: torch.Tensor) -> Any:
    """The node that adds a gradient to a weight: a new one where nothing has kept the last."""
    grad_fn = parameter.expand_as(parameter).grad_fn
    assert grad_fn is not None
    return grad_fn.next_functions[0][0]


def test_no_node_that_adds_a_gradient_outlives_its_step_under_zero_0(tiny_model, data_files, data_dir, tmp_path):
    """DeepSpeed keeps them under ZeRO 1, by which one sees that this can fail."""
    jobs = []
    for zero, mode in itertools.product(("zero0", "zero1"), ("full", "lora")):
        flags = [*make_argv(tiny_model, data_files, mode, "completion"), "--ds-config", zero]
        jobs.append(make_job(tmp_path, f"{zero} {mode}", flags, data=data_dir, keeps=zero == "zero1"))
    launch_jobs(2, jobs, tmp_path / "log", check_grad_nodes)
