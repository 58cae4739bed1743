"""Names inside DeepSpeed that this project uses: an upgrade that moves one shows here."""

import inspect
import sys
from importlib import import_module
from typing import Any

import torch
from helpers.engines import joined_ranks, prepare_data, start_engine
from helpers.launch_ranks import run_on_ranks
from helpers.tiny_inputs import tiny_argv

from trainer.distributed import deepspeed_internals


def test_deepspeed_reads_its_list_of_operators_where_we_empty_it():
    """An empty list keeps DeepSpeed from compiling collectives at the first run on processors."""
    assert "deepspeed.ops.__compatible_ops__.get(" in inspect.getsource(import_module("deepspeed.comm.torch"))


def check_engines(argv: list[str], data: str) -> int:
    """On a rank: what is read of DeepSpeed's objects; then an engine's finalizer, which imports nothing."""
    with joined_ranks() as context:
        for name in ("zero0", "zero1", "zero2_offload", "zero3"):
            check_engine(name, start_engine({"flags": [*argv, "--ds-config", name], "data": data}, context).engine)
    return 0


def check_engine(name: str, engine: Any) -> None:
    deepspeed_engine, zero_optimizer = engine.deepspeed_engine, engine.optimizer
    first = next(iter(engine.trainable_params.values()))
    if name != "zero0":
        stage = int(name[4])
        assert deepspeed_engine.zero_optimization_stage() == stage
        assert isinstance(zero_optimizer.optimizer, torch.optim.AdamW)
        assert deepspeed_internals.flat_partitions(zero_optimizer, stage)
    if name in ("zero1", "zero2_offload"):
        assert zero_optimizer._hp_optimizer_states_linked is False
        assert callable(zero_optimizer._lazy_init_hp_params_optimizer_state)
    if name == "zero3":
        assert first.ds_tensor.ds_numel * engine.dist_context.world_size >= first.ds_numel
        assert tuple(first.ds_shape) != tuple(first.shape)
        assert first.ds_status.name in ("AVAILABLE", "NOT_AVAILABLE")
    modules_before = set(sys.modules)
    deepspeed_engine.__del__()
    assert set(sys.modules) == modules_before, set(sys.modules) - modules_before


def test_deepspeed_engines_have_the_attributes_that_we_read_and_end_without_an_import(tiny_model, data_files, tmp_path):
    """In the middle of another import that would make the other one fail: KeyError in importlib, up to Python 3.12."""
    argv = tiny_argv(tiny_model, data_files, "--mode full --block-size 16 --global-batch 2")
    log = tmp_path / "log"
    assert run_on_ranks(1, check_engines, argv, str(prepare_data(argv)), log=log) == 0, log.read_text()
