"""A frozen base held in bfloat16 while it trains: no number changes by a bit, and float32 comes back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.matrix import launch_jobs
from test_invariance import make_argv
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config import cli
from trainer.distributed import engine as room
from trainer.distributed.frozen_bf16 import FrozenWeightCast
from trainer.model.build import build_model


def parse_settings(tiny_model: str, data_files: tuple[str, str], *flags: str) -> Any:
    return cli.parse_args([*make_argv(tiny_model, data_files, "lora", "completion"), *flags]).settings


def test_only_frozen_matmul_weights_are_cast_to_bf16_and_all_are_restored(tiny_model, data_files):
    model = build_model(parse_settings(tiny_model, data_files))
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    halves = FrozenWeightCast(model, keep_fp32_copy=True)
    half = {name for name, p in model.module.named_parameters() if p.dtype == torch.bfloat16}
    products = {
        f"{name}.weight" for name, layer in model.module.named_modules() if type(layer) is Conv1D
    }  # c_attn, c_proj, c_fc and c_proj of two blocks
    assert half == products
    assert len(half) == 8
    assert all(torch.equal(p, before[name].bfloat16()) for name, p in model.module.named_parameters() if name in half)
    halves.restore_fp32()
    for name, parameter in model.module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name


def test_restoring_a_frozen_cast_without_saved_weights_restores_the_dtype(tiny_model, data_files):
    model = build_model(parse_settings(tiny_model, data_files))
    FrozenWeightCast(model, keep_fp32_copy=False).restore_fp32()
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


def test_the_frozen_cast_leaves_weights_of_dora_layers_in_float32(tiny_model, data_files):
    model = build_model(parse_settings(tiny_model, data_files, "--adapter", "dora", "--lora-target-modules", "c_attn"))
    FrozenWeightCast(model, keep_fp32_copy=True)
    for layer in model.module.modules():
        if isinstance(layer, (Conv1D, nn.Linear)) and not layer.weight.requires_grad:
            adapted = layer.weight.shape == (16, 48)
            assert (layer.weight.dtype == torch.float32) == (adapted or layer is model.causal.get_output_embeddings())


def compute_losses(jobs: list[dict[str, Any]]) -> int:
    """On a rank: step losses, gradient norms and an evaluation, in bf16, with the base as the job says."""
    from trainer.data.dataset import load
    from trainer.data.sampler import step_batches, step_counts
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import destroy_process_group, init_distributed
    from trainer.model.build import load_config
    from trainer.training.evaluation import evaluate
    from trainer.training.run_plan import make_plan

    dist_context = init_distributed()
    for job in jobs:
        if not job["halves"]:
            room.FrozenWeightCast = lambda *_, **__: None  # type: ignore[assignment, misc]
        settings, data = cli.parse_args(job["flags"]).settings, load(Path(job["data"]))
        model = build_model(settings)
        plan = make_plan(settings, dist_context, data, model.metadata, load_config(settings.model))
        engine = Engine(dist_context, model, plan.deepspeed_config, settings.train, plan.precision)
        dtypes = {p.dtype for p in model.module.parameters()}
        assert (torch.bfloat16 in dtypes) == job["halves"]
        values = []
        for step in range(3):
            order = np.arange(len(data.train))
            micro_batches = step_batches(data.train, order, step, plan.schedule.batch, dist_context.rank, 0)
            num_target_tokens = step_counts(data.train, order, step, 6)[2]
            sums = [
                engine.forward_backward(micro_batch, step=step, num_target_tokens=num_target_tokens)
                for micro_batch in micro_batches
            ]
            step_result = engine.step(1e-2, sums)
            values += [step_result.loss_sum, step_result.grad_norm]
        values.append(evaluate(engine, data.val, 4).loss)
        engine.restore_fp32()
        assert {p.dtype for p in model.module.parameters()} == {torch.float32}
        if dist_context.rank == 0:
            np.save(Path(job["out"]) / job["name"], np.array(values))
    destroy_process_group()
    return 0


@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_the_frozen_cast_changes_no_loss_norm_or_evaluation_by_a_bit(zero, tiny_model, data_files, data_dir, tmp_path):
    words = [*make_argv(tiny_model, data_files, "lora", "completion"), "--precision", "bf16", "--ds-config", zero]
    jobs = [
        {"name": name, "halves": name == "halves", "flags": words, "data": str(data_dir), "out": str(tmp_path)}
        for name in ("halves", "whole")
    ]
    launch_jobs(2, jobs, tmp_path / "log", compute_losses)
    halves, whole = (np.load(tmp_path / f"{name}.npy") for name in ("halves", "whole"))
    assert len(halves) == 7
    assert halves.tolist() == whole.tolist()
