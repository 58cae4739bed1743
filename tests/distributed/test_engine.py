"""The ZeRO file and DeepSpeed's dict, as pure functions; and the names inside DeepSpeed that this project relies on."""

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import joined_ranks, plan_run, prepare_data, start_engine
from helpers.launch_ranks import run_on_ranks
from helpers.tiny_inputs import tiny_argv

from trainer.config.batch_config import BatchConfig
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.distributed import deepspeed_config as zero_file
from trainer.distributed.deepspeed_config import (
    DS_CONFIG_DIR,
    build_deepspeed_config,
    choose_deepspeed_file,
    read_deepspeed_file,
)
from trainer.distributed.device_copy import place_model
from trainer.distributed.memory_estimate import ParamCounts
from trainer.distributed.process_group import peak_memory_bytes
from trainer.model.loss import CausalLMLoss

GIB = 2**30
GPT2, ADAPTERS = 124_439_808, 1_179_648  # parameters of the card's model, and of its default adapters


def write_config(folder: Path, content: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def zero_config(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


# --- the files of this project ---


@pytest.mark.parametrize("name", DS_CONFIG_NAMES)
def test_every_shipped_zero_file_is_accepted_and_holds_zero_only(name):
    read = read_deepspeed_file(name)
    assert list(read.content) == ["zero_optimization"]
    assert read.name == name
    assert read.stage == int(name.removeprefix("zero")[0])
    assert read.offloads_optimizer == name.endswith("_offload")


def test_the_names_of_ds_config_are_the_shipped_files():
    assert {path.stem for path in DS_CONFIG_DIR.glob("*.json")} == set(DS_CONFIG_NAMES)


# --- a file of the user's ---


def test_a_zero_file_may_be_a_path_and_is_named_by_its_stem(tmp_path):
    path = write_config(tmp_path, zero_config(stage=2, reduce_bucket_size=1000) | {"communication_data_type": "fp32"})
    read = read_deepspeed_file(str(path))
    assert (read.name, read.stage, read.offloads_optimizer, read.reason) == ("mine", 2, False, "asked for")


def test_documented_keys_of_zero_stage_3_are_accepted(tmp_path):
    """DeepSpeed's fields are called otherwise inside."""
    documented = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    path = write_config(tmp_path, zero_config(stage=3, **{f"stage3_{name}": 0 for name in documented}))
    assert read_deepspeed_file(str(path)).stage == 3


@pytest.mark.parametrize(
    ("content", "expected_message"),
    [
        ({"zero_optimisation": {}}, "expected an object with the key zero_optimization"),
        ([], "expected an object with the key zero_optimization"),
        ({"zero_optimization": 3}, "expected an object with the key zero_optimization"),
        (zero_config(stage=1) | {"zero": 1}, "unknown key zero;"),
        (zero_config(stage=1, stages=1), "unknown key zero_optimization.stages"),
        (
            zero_config(stage=2, offload_optimizer={"device": "cpu", "pin": 1}),
            "unknown key zero_optimization.offload_optimizer.pin",
        ),
        (zero_config(stage=4), "zero_optimization.stage 4: expected 0, 1, 2 or 3"),
        (
            zero_config(stage=2, reduce_bucket_size=-1),
            "zero_optimization.reduce_bucket_size -1: input should be greater",
        ),
        (zero_config(stage="auto"), 'zero_optimization.stage is "auto"'),
        (
            zero_config(stage=2, offload_optimizer={"device": "auto"}),
            'zero_optimization.offload_optimizer.device is "auto"',
        ),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "key stage stands there twice"),
        ('{"zero_optimization": {}, "zero_optimization": {}}', "key zero_optimization stands there twice"),
        (zero_config(stage=3, max_live_parameters=1, stage3_max_live_parameters=2), "under two of its names"),
        ('{"zero_optimization": ', "not JSON"),
        ("", "not JSON"),
        (zero_config(stage=0, offload_optimizer={"device": "cpu"}), "offload_optimizer needs stage 1 or more, not 0"),
        (zero_config(stage=0) | {"aio": {}}, "aio is without effect under stage 0"),
        (zero_config(stage=2, offload_param={"device": "cpu"}), "offload_param needs stage 3 or more, not 2"),
        (zero_config(stage=3, offload_param={"device": "nvme"}), "offload_param.device nvme: expected cpu or none"),
        (zero_config(stage=1, round_robin_gradients=True), "zero_optimization.round_robin_gradients is refused"),
        (zero_config(stage=1) | {"prescale_gradients": True}, "prescale_gradients is refused"),
    ],
)
def test_a_mistake_in_a_zero_file_is_one_line_that_names_file_and_key(content, expected_message, tmp_path):
    path = write_config(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_deepspeed_file(str(path))
    message = str(caught.value)
    assert message.startswith(f"--ds-config {path}: ")
    assert expected_message in message
    assert "\n" not in message
    assert "type=" not in message, "pydantic's own words for programmers"


@pytest.mark.parametrize("key", zero_file._KEYS_SET_BY_FLAGS)
def test_a_zero_file_key_that_the_settings_decide_is_refused_by_name(key, tmp_path):
    path = write_config(tmp_path, zero_config(stage=1) | {key: 1})
    with pytest.raises(UserError, match=f"{key} comes from the flags, not from this file; take it out"):
        read_deepspeed_file(str(path))


def test_a_missing_zero_file_is_refused_with_the_shipped_names(tmp_path):
    with pytest.raises(UserError, match=r"no such file; pass zero0, zero1, .* or a path to a JSON file"):
        read_deepspeed_file(str(tmp_path / "none.json"))


def test_an_offload_that_is_null_is_no_offload(tmp_path):
    path = write_config(tmp_path, zero_config(stage=2, offload_optimizer=None))
    assert not read_deepspeed_file(str(path)).offloads_optimizer


# --- DeepSpeed's dict ---


@pytest.mark.parametrize("name", DS_CONFIG_NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_deepspeed_key_comes_from_both_sides_and_the_zero_file_is_unchanged(name, precision):
    read = read_deepspeed_file(name)
    batch = BatchConfig(micro_batch_size=4, gradient_accumulation_steps=3, world_size=2)
    config = build_deepspeed_config(read, batch=batch, max_grad_norm=0.5, precision=precision)
    ours = set(config) - set(read.content)
    assert ours <= set(zero_file._KEYS_SET_BY_FLAGS) | {"wall_clock_breakdown"}
    assert {key: config[key] for key in read.content} == read.content
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 1, "the loss is divided once, by us"
    assert config["gradient_clipping"] == (0.5 if read.stage else 0.0)
    assert ("fp16" in config) == (precision == "fp16")
    assert "bf16" not in config, "bf16 is autocast over float32 weights"
    assert not {"optimizer", "scheduler"} & set(config)
    assert json.loads(json.dumps(config)) == config, "it goes into run.json"


# --- the choice where none was named ---


@pytest.mark.parametrize(
    ("ranks", "memory", "trainable", "expected"),
    [
        (1, None, GPT2, "zero0"),
        (2, None, GPT2, "zero1"),
        (1, 80 * GIB, GPT2, "zero0"),
        (1, 6 * GIB, GPT2, "zero2_offload"),  # 16 x 124M bytes = 1.85 GiB is more than a quarter of it
        (1, 6 * GIB, ADAPTERS, "zero0"),  # 4 x 124M + 16 x 1.2M = 0.48 GiB
        (8, 24 * GIB, GPT2, "zero1"),
        (8, 4 * GIB, GPT2, "zero2"),  # (8 + 12/8) x 124M = 1.10 GiB is, (4 + 16/8) x 124M = 0.70 GiB is not more
        (8, 2 * GIB, GPT2, "zero3"),
    ],
)
def test_the_default_zero_file_follows_the_state_that_a_rank_would_hold(ranks, memory, trainable, expected):
    counts = ParamCounts(frozen=GPT2 if trainable == ADAPTERS else GPT2 - trainable, trainable=trainable)
    chosen = choose_deepspeed_file(counts=counts, world_size=ranks, device_memory_bytes=memory, precision="bf16")
    assert chosen.name == expected
    assert chosen.reason
    assert chosen.reason != "asked for"


def test_the_default_zero_file_counts_a_quantized_base_at_its_own_size():
    whole, packed = (
        ParamCounts(frozen=1_557_611_200, trainable=9_830_400, quantized_bytes=b) for b in (None, 1_100_000_000)
    )
    chosen = [
        choose_deepspeed_file(counts=c, world_size=1, device_memory_bytes=16 * GIB, precision="bf16").name
        for c in (whole, packed)
    ]
    assert chosen == ["zero2_offload", "zero0"]


def test_fp16_never_gets_stage_0_which_has_no_loss_scale():
    counts = ParamCounts(frozen=0, trainable=GPT2)
    chosen = choose_deepspeed_file(counts=counts, world_size=1, device_memory_bytes=None, precision="fp16")
    assert chosen.stage == 1


# --- what we rely on inside DeepSpeed: an upgrade that moves it shows here ---


def test_deepspeed_reads_its_list_of_operators_where_we_empty_it():
    """An empty list keeps DeepSpeed from compiling collectives at the first run on processors."""
    assert "deepspeed.ops.__compatible_ops__.get(" in inspect.getsource(import_module("deepspeed.comm.torch"))


def check_engines(argv: list[str], data: str) -> int:
    """On a rank: what is read of DeepSpeed's objects; then an engine's finalizer, which imports nothing."""
    with joined_ranks() as context:
        for name in ("zero0", "zero1", "zero3"):
            check_engine(name, start_engine({"flags": [*argv, "--ds-config", name], "data": data}, context).engine)
    return 0


def check_engine(name: str, engine: Any) -> None:
    assert engine.deepspeed_engine.skipped_steps == 0
    assert callable(engine.deepspeed_engine.get_global_grad_norm)
    first = next(iter(engine.trainable_params.values()))
    if name == "zero1":
        mapping = first._hp_mapping
        for address in (mapping.get_hp_fragment_address(), mapping.lp_fragment_address):
            assert (address.start, address.numel) == (0, first.numel())
        assert len(engine.optimizer.bit16_groups) == len(engine.optimizer.single_partition_of_fp32_groups) == 1
    if name == "zero3":
        assert first.ds_tensor.ds_numel * engine.dist_context.world_size >= first.ds_numel
        assert tuple(first.ds_shape) != tuple(first.shape)
        assert engine.optimizer.fp32_partitioned_groups_flat
    if name != "zero0":
        assert isinstance(engine.optimizer.optimizer, torch.optim.AdamW)
    modules_before = set(sys.modules)
    engine.deepspeed_engine.__del__()
    assert set(sys.modules) == modules_before, set(sys.modules) - modules_before


def check_sharded_placement(argv: list[str], data: str) -> int:
    """On a rank: before DeepSpeed's engine is made no weight is whole, and a part of each is here."""
    with joined_ranks() as context:
        planned = plan_run([*argv, "--ds-config", "zero3"], context, data)
        params = list(planned.model.module.parameters())
        sizes = [p.numel() for p in params]
        loss_module = CausalLMLoss(planned.model.causal, None)
        assert place_model(loss_module, planned.model, planned.plan.deepspeed_config, context.device) == ""
        whole = [p for p in params if p.numel() > 1]  # a weight that is elsewhere has one element or none
        assert not whole, [tuple(p.shape) for p in whole]
        assert [p.ds_tensor.numel() for p in params] == [-(-size // context.world_size) for size in sizes]
    return 0


def test_zero_3_places_each_weight_in_parts_before_the_next_one(tiny_model, data_files, tmp_path):
    argv = tiny_argv(tiny_model, data_files, "--mode full --block-size 16 --global-batch 2")
    log = tmp_path / "log"
    assert run_on_ranks(2, check_sharded_placement, argv, str(prepare_data(argv)), log=log) == 0, log.read_text()


def test_deepspeed_engines_have_the_attributes_that_we_read_and_end_without_an_import(tiny_model, data_files, tmp_path):
    """In the middle of another import that would make the other one fail: KeyError in importlib, up to Python 3.12."""
    argv = tiny_argv(tiny_model, data_files, "--mode full --block-size 16 --global-batch 2")
    log = tmp_path / "log"
    assert run_on_ranks(1, check_engines, argv, str(prepare_data(argv)), log=log) == 0, log.read_text()


def test_the_peak_of_a_process_is_its_own_and_not_that_of_who_started_it():
    ballast = torch.ones(5 * 2**26)  # 1.25 GiB
    ask = "import torch; from trainer.distributed.process_group import *; print(peak_memory_bytes(torch.device('cpu')))"
    process = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=True)
    assert 2**26 < int(process.stdout) < 2**30
    assert peak_memory_bytes(torch.device("cpu")) > ballast.nbytes
