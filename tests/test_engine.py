"""The ZeRO file and DeepSpeed's dict, as pure functions; and the names inside DeepSpeed that this project relies on."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEMPLATES
from ranks import on_ranks

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.schema import DS_NAMES, Batch
from trainer.distributed import deepspeed_config as zero_file
from trainer.distributed.deepspeed_config import DS_FOLDER, choose_zero_file, deepspeed_dict, read_zero_file
from trainer.distributed.engine import Engine
from trainer.distributed.memory_estimate import Counts
from trainer.distributed.process_group import leave_world, peak_memory, planned_world, start_world

GIB = 2**30
GPT2, ADAPTERS = 124_439_808, 1_179_648  # parameters of the card's model, and of its default adapters


def write(folder: Path, content: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


# --- the files of this project ---


@pytest.mark.parametrize("name", DS_NAMES)
def test_every_shipped_file_is_accepted_and_holds_zero_only(name):
    read = read_zero_file(name)
    assert list(read.content) == ["zero_optimization"]
    assert read.name == name
    assert read.stage == int(name.removeprefix("zero")[0])
    assert read.offload == name.endswith("_offload")


def test_the_names_are_the_files():
    assert {path.stem for path in DS_FOLDER.glob("*.json")} == set(DS_NAMES)


# --- a file of the user's ---


def test_a_path_is_taken_and_named_by_its_stem(tmp_path):
    path = write(tmp_path, zero(stage=2, reduce_bucket_size=1000) | {"communication_data_type": "fp32"})
    read = read_zero_file(str(path))
    assert (read.name, read.stage, read.offload, read.reason) == ("mine", 2, False, "asked for")


def test_documented_names_of_stage_3_are_taken(tmp_path):
    """DeepSpeed's fields are called otherwise inside."""
    documented = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    path = write(tmp_path, zero(stage=3, **{f"stage3_{name}": 0 for name in documented}))
    assert read_zero_file(str(path)).stage == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimisation": {}}, "expected an object with the key zero_optimization"),
        ([], "expected an object with the key zero_optimization"),
        ({"zero_optimization": 3}, "expected an object with the key zero_optimization"),
        (zero(stage=1) | {"zero": 1}, "unknown key zero;"),
        (zero(stage=1, stages=1), "unknown key zero_optimization.stages"),
        (zero(stage=2, offload_optimizer={"device": "cpu", "pin": 1}),
         "unknown key zero_optimization.offload_optimizer.pin"),
        (zero(stage=4), "zero_optimization.stage 4: expected 0, 1, 2 or 3"),
        (zero(stage=2, reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size -1: input should be greater"),
        (zero(stage="auto"), 'zero_optimization.stage is "auto"'),
        (zero(stage=2, offload_optimizer={"device": "auto"}), 'zero_optimization.offload_optimizer.device is "auto"'),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "key stage stands there twice"),
        ('{"zero_optimization": {}, "zero_optimization": {}}', "key zero_optimization stands there twice"),
        (zero(stage=3, max_live_parameters=1, stage3_max_live_parameters=2), "under two of its names"),
        ('{"zero_optimization": ', "not JSON"),
        ("", "not JSON"),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "offload_optimizer needs stage 1 or more, not 0"),
        (zero(stage=0) | {"aio": {}}, "aio is without effect under stage 0"),
        (zero(stage=2, offload_param={"device": "cpu"}), "offload_param needs stage 3 or more, not 2"),
        (zero(stage=3, offload_param={"device": "nvme"}), "offload_param.device nvme: expected cpu or none"),
        (zero(stage=1, round_robin_gradients=True), "zero_optimization.round_robin_gradients is refused"),
        (zero(stage=1) | {"prescale_gradients": True}, "prescale_gradients is refused"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_file_and_key(content, said, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_zero_file(str(path))
    message = str(caught.value)
    assert message.startswith(f"--ds-config {path}: ")
    assert said in message
    assert "\n" not in message
    assert "type=" not in message, "pydantic's own words for programmers"


@pytest.mark.parametrize("key", zero_file._OURS)
def test_a_key_that_the_settings_decide_is_refused_by_name(key, tmp_path):
    path = write(tmp_path, zero(stage=1) | {key: 1})
    with pytest.raises(UserError, match=f"{key} comes from the flags, not from this file; take it out"):
        read_zero_file(str(path))


def test_a_file_that_is_not_there_lists_what_is(tmp_path):
    with pytest.raises(UserError, match=r"no such file; pass zero0, zero1, .* or a path to a JSON file"):
        read_zero_file(str(tmp_path / "none.json"))


def test_an_offload_that_is_null_is_no_offload(tmp_path):
    assert not read_zero_file(str(write(tmp_path, zero(stage=2, offload_optimizer=None)))).offload


# --- DeepSpeed's dict ---


@pytest.mark.parametrize("name", DS_NAMES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_key_comes_from_both_sides_and_the_file_is_left_as_it_is(name, precision):
    read = read_zero_file(name)
    batch = Batch(micro=4, accumulation=3, ranks=2)
    made = deepspeed_dict(read, batch=batch, clip=0.5, precision=precision)
    ours = set(made) - set(read.content)
    assert ours <= set(zero_file._OURS) | {"wall_clock_breakdown"}
    assert {key: made[key] for key in read.content} == read.content
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 1, "the loss is divided once, by us"
    assert made["gradient_clipping"] == (0.5 if read.stage else 0.0)
    assert ("fp16" in made) == (precision == "fp16")
    assert "bf16" not in made, "bf16 is autocast over float32 weights"
    assert "optimizer" not in made
    assert "scheduler" not in made
    assert json.loads(json.dumps(made)) == made, "it goes into run.json"


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
def test_the_choice_follows_the_state_that_a_rank_would_hold(ranks, memory, trainable, expected):
    counts = Counts(frozen=GPT2 if trainable == ADAPTERS else GPT2 - trainable, trainable=trainable)
    chosen = choose_zero_file(counts=counts, ranks=ranks, memory=memory, precision="bf16")
    assert chosen.name == expected
    assert chosen.reason
    assert chosen.reason != "asked for"


def test_a_packed_base_is_not_taken_for_a_whole_one():
    whole, packed = (Counts(frozen=1_557_611_200, trainable=9_830_400, packed_bytes=b) for b in (None, 1_100_000_000))
    chosen = [choose_zero_file(counts=c, ranks=1, memory=16 * GIB, precision="bf16").name for c in (whole, packed)]
    assert chosen == ["zero2_offload", "zero0"]


def test_ranks_of_one_processor_divide_nothing_for_they_hold_it_in_common():
    whole = Counts(frozen=0, trainable=GPT2)
    chosen = [
        choose_zero_file(counts=whole, ranks=2, memory=None, precision=precision, in_common=True)
        for precision in ("fp32", "bf16", "fp16")
    ]
    assert [file.name for file in chosen] == ["zero0", "zero0", "zero1"]
    assert "in common" in chosen[0].reason
    assert planned_world(2, "cpu").is_one_processor
    assert not planned_world(1, "cpu").is_one_processor
    assert not dataclasses.replace(planned_world(4, "cpu"), local_size=2).is_one_processor, "of two machines"


def test_fp16_never_gets_stage_0_which_has_no_loss_scale():
    assert choose_zero_file(counts=Counts(frozen=0, trainable=GPT2), ranks=1, memory=None, precision="fp16").stage == 1


# --- what we rely on inside DeepSpeed: an upgrade that moves it shows here ---


def test_the_list_of_operators_is_read_where_we_empty_it():
    """An empty list keeps DeepSpeed from compiling collectives at the first run on processors."""
    assert "deepspeed.ops.__compatible_ops__.get(" in inspect.getsource(import_module("deepspeed.comm.torch"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("safe_get_full_fp32_param", ["param"]),
        ("safe_get_full_optimizer_state", ["param", "optim_state_key"]),
        ("safe_set_local_optimizer_state", ["param", "value", "optim_state_key"]),
    ],
)
def test_the_functions_for_the_full_state_are_there(name, parameters):
    room = import_module("deepspeed.utils.tensor_fragment")
    assert list(inspect.signature(getattr(room, name)).parameters) == parameters


def test_a_fragment_says_where_it_lies():
    from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment

    assert {"lp_fragment_address"} <= {field.name for field in dataclasses.fields(tensor_fragment)}
    assert callable(tensor_fragment.get_hp_fragment_address)
    assert {"start", "numel"} <= {field.name for field in dataclasses.fields(fragment_address)}


def test_initialize_and_backward_take_the_arguments_we_pass():
    import deepspeed

    assert {"model", "optimizer", "config", "dist_init_required"} <= set(
        inspect.signature(deepspeed.initialize).parameters
    )
    assert re.search(r"def backward\(self, loss, .*scale_wrt_gas", inspect.getsource(deepspeed.DeepSpeedEngine))
    assert {"dist_backend", "verbose", "auto_mpi_discovery", "timeout"} <= set(
        inspect.signature(deepspeed.init_distributed).parameters
    )


def engines(arguments: list[str], data: str, names: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """On a rank: (name, world, engine) under each of these ZeRO files."""
    from trainer.data.dataset import load
    from trainer.model.build import build, load_config
    from trainer.training.run_plan import make_plan

    world = start_world()
    rows = load(Path(data))
    for name in names:
        settings = cli.read([*arguments, "--ds-config", name]).settings
        model = build(settings)
        plan = make_plan(settings, world, rows, model.facts, load_config(settings.model))
        yield name, world, Engine(world, model, plan.deepspeed, settings.train, plan.precision)
    leave_world()


def attributes(arguments: list[str], data: str) -> int:
    """On a rank: what the engine reads of DeepSpeed's objects under stages 1 and 3."""
    for name, world, made in engines(arguments, data, ("zero1", "zero3")):
        assert made.deepspeed.skipped_steps == 0
        assert callable(made.deepspeed.get_global_grad_norm)
        first = next(iter(made.trainable.values()))
        assert isinstance(made.optimizer.optimizer, torch.optim.AdamW)
        if name == "zero1":
            assert first._hp_mapping.get_hp_fragment_address().numel == first.numel()
            assert len(made.optimizer.bit16_groups) == len(made.optimizer.single_partition_of_fp32_groups) == 1
        else:
            assert first.ds_tensor.ds_numel * world.size >= first.ds_numel
            assert tuple(first.ds_shape) != tuple(first.shape)
            assert made.optimizer.fp32_partitioned_groups_flat
    return 0


def ends(arguments: list[str], data: str) -> int:
    """On a rank: the finalizer of an engine, which imports nothing."""
    ended = []
    for name, _, made in engines(arguments, data, ("zero0", "zero1", "zero3")):
        known = set(sys.modules)
        made.deepspeed.__del__()
        assert set(sys.modules) == known, set(sys.modules) - known
        ended.append(name)
    assert len(ended) == 3
    return 0


def alone(target: Callable[..., int], tiny: str, records: tuple[str, str], log: Path) -> None:
    """`target(arguments, data)` on one rank."""
    from trainer.data.dataset import prepare

    line = f"--mode full --model {tiny} --data {records[0]} --val-data {records[1]} --block-size 16 --global-batch 2"
    arguments = [*line.split(), *TEMPLATES]
    data = prepare(cli.read(arguments).settings.data, model=tiny, global_batch=2).folder
    assert on_ranks(1, target, arguments, str(data), log=log) == 0, log.read_text()


def test_what_we_read_of_its_engines_and_parameters_is_there(tiny, records, tmp_path):
    alone(attributes, tiny, records, tmp_path / "log")


def test_an_engine_that_the_garbage_collector_ends_does_not_import(tiny, records, tmp_path):
    # In the middle of another import that would make the other one fail: KeyError in importlib, up to Python 3.12.
    alone(ends, tiny, records, tmp_path / "log")


def test_the_peak_of_a_process_is_its_own_and_not_that_of_who_started_it():
    ballast = torch.ones(3 * 2**28)  # 3 GiB
    ask = "import torch; from trainer.distributed.process_group import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=True)
    assert 2**26 < int(done.stdout) < 2**31
    assert peak_memory(torch.device("cpu")) > ballast.nbytes
