"""The two ways of a gradient leave the same numbers, and neither lets one that is not finite touch the weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.matrix import launch_jobs, make_argv

from trainer.config import cli
from trainer.config.batch_config import BatchConfig
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.config.settings import compile_blocker
from trainer.distributed.deepspeed_config import build_deepspeed_config, read_deepspeed_file
from trainer.distributed.process_group import simulated_context
from trainer.distributed.steppers import supports_native_stepper
from trainer.training.plan_validation import validate_early, validate_stage


def make_deepspeed_config(name: str, **extra_keys: Any) -> dict[str, Any]:
    batch = BatchConfig(micro_batch_size=1, gradient_accumulation_steps=1, world_size=1)
    return {
        **build_deepspeed_config(read_deepspeed_file(name), batch=batch, max_grad_norm=1.0, precision="fp32"),
        **extra_keys,
    }


def test_the_native_stepper_is_chosen_for_zero_files_without_deepspeed_hooks():
    direct = {
        size: [
            name
            for name in DS_CONFIG_NAMES
            if supports_native_stepper(make_deepspeed_config(name), world_size=size, precision="fp32")
        ]
        for size in (1, 2)
    }
    assert direct == {1: ["zero0", "zero1", "zero2"], 2: ["zero0", "zero1"]}
    assert not supports_native_stepper(make_deepspeed_config("zero1"), world_size=1, precision="fp16"), (
        "the loss scale is DeepSpeed's"
    )
    assert not supports_native_stepper(
        make_deepspeed_config("zero1", communication_data_type="bf16"), world_size=2, precision="fp32"
    )
    assert supports_native_stepper(
        make_deepspeed_config("zero0", wall_clock_breakdown=True), world_size=4, precision="fp32"
    ), "there is no other way"
    more = {"stage": 1, "parameter_alignment": True}
    assert not supports_native_stepper(
        make_deepspeed_config("zero1", zero_optimization=more), world_size=2, precision="fp32"
    ), "a key it does not know"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--objective completion --prompt {a} --completion {b}", "expected --objective blocks"),
        ("--quant nf4", "not with --quant"),
        ("--activation-checkpointing", "not with --activation-checkpointing"),
    ],
)
def test_settings_that_cannot_be_compiled_are_refused_with_the_flags_or_run_uncompiled(argv, message):
    with pytest.raises(UserError, match=f"--execution compile: .*{message}"):
        cli.parse_args(["--mode", "lora", *argv.split(), "--execution", "compile"])
    assert compile_blocker(cli.parse_args(["--mode", "lora", *argv.split()]).settings)


def test_graphs_need_a_gpu_and_settings_that_can_be_recorded():
    for flags in ("--quant nf4", "--activation-checkpointing"):
        with pytest.raises(UserError, match="--execution graphs: not with"):
            cli.parse_args(["--mode", "lora", *flags.split(), "--execution", "graphs"])
    graphs = cli.parse_args(["--mode", "full", "--execution", "graphs"]).settings
    with pytest.raises(UserError, match="--execution graphs: CUDA graphs need a GPU; expected auto, eager or compile"):
        validate_early(graphs, simulated_context(1, "cpu"))


def test_compilation_is_refused_under_zero_3():
    compiled = cli.parse_args(["--mode", "full", "--execution", "compile"]).settings
    with pytest.raises(UserError, match="--execution compile: not under ZeRO 3"):
        validate_stage(compiled, read_deepspeed_file("zero3"))


def check_non_finite_refused(jobs: list[dict[str, Any]]) -> int:
    """On a rank: a step whose gradient is not finite on rank 0 raises everywhere and changes nothing.

    Long: it runs in a fresh process and imports what it needs.
    """
    from trainer.data.dataset import load
    from trainer.data.sampler import step_batches, step_counts
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import destroy_process_group, init_distributed
    from trainer.distributed.steppers import NonFiniteError
    from trainer.model.build import build_model, load_config
    from trainer.training.run_plan import make_plan

    dist_context = init_distributed()
    for job in jobs:
        settings, data = cli.parse_args(job["flags"]).settings, load(Path(job["data"]))
        model = build_model(settings)
        plan = make_plan(settings, dist_context, data, model.metadata, load_config(settings.model))
        execution = replace(plan.execution, finite_check=job["finite_check"])
        engine = Engine(dist_context, model, plan.deepspeed_config, settings.train, execution)
        outcomes = []
        for step in range(4):
            order = np.arange(len(data.train))
            micro_batches = step_batches(data.train, order, step % 3, plan.schedule.batch, dist_context.rank, 0)
            num_target_tokens = step_counts(data.train, order, step % 3, 6)[2]
            is_bad_step = step == 2
            hook = next(iter(engine.trainable_params.values())).register_hook(
                lambda gradient, bad=is_bad_step and job["bad"] == "gradient": (
                    gradient * (math.inf if bad and dist_context.rank == 0 else 1.0)
                )
            )
            state_before = (
                {name: tensor.clone() for name, tensor in engine.state.iter_state_dict()} if is_bad_step else {}
            )
            sums = []
            for micro_batch in micro_batches:
                if micro_batch is micro_batches[-1]:
                    engine.stepper.reduce_during_backward()
                sums.append(engine.forward_backward(micro_batch, step=step, num_target_tokens=num_target_tokens))
            if is_bad_step and job["bad"] == "loss" and dist_context.rank == 0:
                sums[0] = sums[0] * math.nan
            hook.remove()
            try:
                engine.launch_update(1e-3, sums)()
                outcomes.append("taken")
            except NonFiniteError as error:
                engine.stepper.discard_step()
                state_after = dict(engine.state.iter_state_dict())
                is_unchanged = all(bool((state_after[name] == value).all()) for name, value in state_before.items())
                outcomes.append(f"{str(error).split()[0]} {is_unchanged}")
        assert outcomes == ["taken", "taken", f"{job['says']} True", "taken"], (job["name"], outcomes)
        weights = {name: tensor.numpy().copy() for name, tensor in engine.state.gather_weights()}
        if dist_context.rank == 0:
            np.savez(Path(job["out"]) / f"{job['name']}.npz", **weights)
    destroy_process_group()
    return 0


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.sweep), 2])
def test_a_non_finite_gradient_changes_no_weight_or_moment_and_the_next_step_is_taken(
    ranks, tiny_model, data_files, data_dir, tmp_path
):
    jobs = [
        {
            "name": f"{zero}-{by}-{bad}", "finite_check": by, "bad": bad, "data": str(data_dir), "out": str(tmp_path),
            "says": "loss" if (by, bad) == ("host", "loss") else "gradient",
            "flags": [*make_argv(tiny_model, data_files, "full", "completion"), "--ds-config", zero],
        }
        for zero in ("zero0", "zero1") for by, bad in (("device", "gradient"), ("host", "gradient"), ("host", "loss"))
    ]  # fmt: skip
    launch_jobs(ranks, jobs, tmp_path / "log", check_non_finite_refused)
    for zero in ("zero0", "zero1"):  # the step after it is not disturbed by what was on its way
        by_gradient, by_loss = (dict(np.load(tmp_path / f"{zero}-host-{bad}.npz")) for bad in ("gradient", "loss"))
        assert all(np.array_equal(by_loss[name], weight) for name, weight in by_gradient.items())
