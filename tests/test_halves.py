"""A frozen base held in bfloat16 while it trains: no number changes by a bit, and float32 comes back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cells import on_cells
from test_ways import arguments, prepared  # noqa: F401
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config import cli
from trainer.distributed import engine as room
from trainer.distributed.frozen_bf16 import Halves
from trainer.model.build import build


def settings(tiny: str, records: tuple[str, str], *more: str) -> Any:
    return cli.read([*arguments(tiny, records, "lora", "completion"), *more]).settings


def test_only_frozen_weights_that_go_into_products_are_halved_and_all_come_back(tiny, records):
    model = build(settings(tiny, records))
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    halves = Halves(model, keep=True)
    half = {name for name, p in model.module.named_parameters() if p.dtype == torch.bfloat16}
    products = {
        f"{name}.weight" for name, layer in model.module.named_modules() if type(layer) is Conv1D
    }  # c_attn, c_proj, c_fc and c_proj of two blocks
    assert half == products
    assert len(half) == 8
    assert all(torch.equal(p, before[name].bfloat16()) for name, p in model.module.named_parameters() if name in half)
    halves.put_back()
    for name, parameter in model.module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name


def test_a_rank_that_keeps_nothing_gets_the_type_back(tiny, records):
    model = build(settings(tiny, records))
    Halves(model, keep=False).put_back()
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


def test_dora_takes_norms_of_its_weights_so_they_stay(tiny, records):
    model = build(settings(tiny, records, "--adapter", "dora", "--lora-targets", "c_attn"))
    Halves(model, keep=True)
    for layer in model.module.modules():
        if isinstance(layer, (Conv1D, nn.Linear)) and not layer.weight.requires_grad:
            adapted = layer.weight.shape == (16, 48)
            assert (layer.weight.dtype == torch.float32) == (adapted or layer is model.causal.get_output_embeddings())


def losses(jobs: list[dict[str, Any]]) -> int:
    """On a rank: step losses, gradient norms and an evaluation, in bf16, with the base as the job says."""
    from trainer.data.dataset import load
    from trainer.data.sampler import step_batches, step_counts
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import leave_world, start_world
    from trainer.model.build import load_config
    from trainer.training.loop import evaluate
    from trainer.training.run_plan import make_plan

    world = start_world()
    for job in jobs:
        if not job["halves"]:
            room.Halves = lambda *_, **__: None  # type: ignore[assignment, misc]
        chosen, data = cli.read(job["flags"]).settings, load(Path(job["data"]))
        model = build(chosen)
        plan = make_plan(chosen, world, data, model.facts, load_config(chosen.model))
        engine = Engine(world, model, plan.deepspeed, chosen.train, plan.precision)
        types = {p.dtype for p in model.module.parameters()}
        assert (torch.bfloat16 in types) == job["halves"]
        seen = []
        for number in range(3):
            order = np.arange(len(data.train))
            micros = step_batches(data.train, order, number, plan.course.batch, world.rank, 0)
            counted = step_counts(data.train, order, number, 6)[2]
            sums = [engine.accumulate(micro, step=number, counted=counted) for micro in micros]
            done = engine.step(1e-2, sums)
            seen += [done.nll, done.grad_norm]
        seen.append(evaluate(engine, data.val, 4)[0])
        engine.put_back()
        assert {p.dtype for p in model.module.parameters()} == {torch.float32}
        if world.rank == 0:
            np.save(Path(job["out"]) / job["name"], np.array(seen))
    leave_world()
    return 0


@pytest.mark.parametrize("zero", ["zero0", "zero2"])
def test_losses_norms_and_evaluations_are_the_same_to_the_bit(zero, tiny, records, prepared, tmp_path):  # noqa: F811
    words = [*arguments(tiny, records, "lora", "completion"), "--precision", "bf16", "--ds-config", zero]
    jobs = [
        {"name": name, "halves": name == "halves", "flags": words, "data": str(prepared), "out": str(tmp_path)}
        for name in ("halves", "whole")
    ]
    on_cells(2, jobs, tmp_path / "log", losses)
    halves, whole = (np.load(tmp_path / f"{name}.npy") for name in ("halves", "whole"))
    assert len(halves) == 7
    assert halves.tolist() == whole.tolist()
