"""The two ways of a gradient leave the same numbers, and neither lets one that is not finite touch the weights."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engines import StartedRun, joined_ranks, start_engine
from helpers.matrix import launch_jobs, make_argv

from trainer.config import cli
from trainer.config.batch_config import BatchConfig
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.data.sampler import step_batches, step_counts
from trainer.distributed.deepspeed_config import build_deepspeed_config, read_deepspeed_file
from trainer.distributed.process_group import simulated_context
from trainer.distributed.steppers import NonFiniteError, supports_native_stepper
from trainer.training.plan_validation import validate_early, validate_stage


def is_native(zero: str, ranks: int, precision: str = "fp32", **extra_keys: Any) -> bool:
    batch = BatchConfig(micro_batch_size=1, gradient_accumulation_steps=1, world_size=1)
    config = build_deepspeed_config(read_deepspeed_file(zero), batch=batch, max_grad_norm=1.0, precision="fp32")
    return supports_native_stepper({**config, **extra_keys}, world_size=ranks, precision=precision)


def test_the_native_stepper_is_chosen_for_zero_files_without_deepspeed_hooks():
    assert [name for name in DS_CONFIG_NAMES if is_native(name, 1)] == ["zero0", "zero1", "zero2"]
    assert [name for name in DS_CONFIG_NAMES if is_native(name, 2)] == ["zero0", "zero1"]
    assert not is_native("zero1", 1, "fp16"), "the loss scale is DeepSpeed's"
    assert not is_native("zero1", 2, communication_data_type="bf16")
    assert is_native("zero0", 4, wall_clock_breakdown=True), "there is no other way"
    unknown_key = {"stage": 1, "parameter_alignment": True}
    assert not is_native("zero1", 2, zero_optimization=unknown_key)


def test_graphs_need_a_gpu_zero_0_and_settings_that_can_be_recorded():
    for flags in ("--quant nf4", "--activation-checkpointing"):
        with pytest.raises(UserError, match="--execution graphs: not with"):
            cli.parse_args(["--mode", "lora", *flags.split(), "--execution", "graphs"])
    graphs = cli.parse_args(["--mode", "full", "--execution", "graphs"]).settings
    with pytest.raises(UserError, match="--execution graphs: CUDA graphs need a GPU; expected auto or eager"):
        validate_early(graphs, simulated_context(1, "cpu"))
    with pytest.raises(UserError, match="--execution graphs: steps of ZeRO 1 are eager; expected --ds-config zero0"):
        validate_stage(graphs, read_deepspeed_file("zero1"))


def check_non_finite_refused(jobs: list[dict[str, Any]]) -> int:
    """On a rank: a step whose gradient is not finite on rank 0 raises everywhere and changes nothing."""
    with joined_ranks() as dist_context:
        for job in jobs:
            run = start_engine(job, dist_context)
            outcomes = [try_step(run, step, job["bad"] if step == 2 else None) for step in range(4)]
            assert outcomes == ["taken", "taken", f"{job['says']} True", "taken"], (job["name"], outcomes)
            weights = {name: tensor.numpy().copy() for name, tensor in run.engine.state.gather_weights()}
            if dist_context.rank == 0:
                np.savez(Path(job["out"]) / f"{job['name']}.npz", **weights)
    return 0


def try_step(run: StartedRun, step: int, bad: str | None) -> str:
    """taken; or the word for what was not finite, and whether the state is as it was. `bad`: made so on rank 0."""
    engine, train = run.engine, run.data.train
    rank, order = engine.dist_context.rank, np.arange(len(train))
    micro_batches = step_batches(train, order, step % 3, run.plan.schedule.batch, rank)
    num_target_tokens = step_counts(train, order, step % 3, 6)[1]
    factor = math.inf if bad == "gradient" and rank == 0 else 1.0
    hook = next(iter(engine.trainable_params.values())).register_hook(lambda gradient: gradient * factor)
    state_before = {name: tensor.clone() for name, tensor in engine.state.iter_state_dict()} if bad else {}
    sums = []
    for micro_batch in micro_batches:
        if micro_batch is micro_batches[-1]:
            engine.stepper.reduce_during_backward()
        sums.append(engine.forward_backward(micro_batch, step=step, num_target_tokens=num_target_tokens))
    hook.remove()
    if bad == "loss" and rank == 0:
        sums[0] = sums[0] * math.nan
    try:
        engine.launch_update(1e-3, sums)()
    except NonFiniteError as error:
        engine.stepper.discard_step()
        state_after = dict(engine.state.iter_state_dict())
        is_unchanged = all(bool((state_after[name] == value).all()) for name, value in state_before.items())
        return f"{str(error).split()[0]} {is_unchanged}"
    return "taken"


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.sweep), 2])
def test_a_non_finite_gradient_changes_no_weight_or_moment_and_the_next_step_is_taken(
    ranks, tiny_model, data_files, data_dir, tmp_path
):
    jobs = [
        {
            "name": f"{zero}-{by}-{bad}",
            "execution": {"finite_check": by},
            "bad": bad,
            "data": str(data_dir),
            "out": str(tmp_path),
            "says": "loss" if (by, bad) == ("host", "loss") else "gradient",
            "flags": [*make_argv(tiny_model, data_files, "full", "completion"), "--ds-config", zero],
        }
        for zero in ("zero0", "zero1")
        for by, bad in (("device", "gradient"), ("host", "gradient"), ("host", "loss"))
    ]
    launch_jobs(ranks, jobs, tmp_path / "log", check_non_finite_refused)
    for zero in ("zero0", "zero1"):  # the step after it is not disturbed by what was on its way
        by_gradient, by_loss = (dict(np.load(tmp_path / f"{zero}-host-{bad}.npz")) for bad in ("gradient", "loss"))
        assert all(np.array_equal(by_loss[name], weight) for name, weight in by_gradient.items())
