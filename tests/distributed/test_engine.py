"""The ZeRO file and DeepSpeed's dict, as pure functions; how weights are placed under ZeRO 3."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.any_inputs import JSON_VALUES, check_inputs, many_inputs
from helpers.engines import joined_ranks, plan_run, prepare_data
from helpers.launch_ranks import run_on_ranks
from helpers.tiny_inputs import tiny_argv
from hypothesis import strategies as st

from trainer.config.batch_config import BatchConfig
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.distributed.deepspeed_config import DS_CONFIG_DIR, build_deepspeed_config, read_deepspeed_file
from trainer.distributed.engine import place_model
from trainer.distributed.memory import PassMemory, choose_deepspeed_file, count_frozen, estimate_memory
from trainer.model.loss import CausalLMLoss

GIB = 2**30
GPT2 = 124_439_808  # parameters of the card's model


def write_config(folder: Path, content: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def zero_config(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


# --- the files that are taken ---


@pytest.mark.parametrize("name", DS_CONFIG_NAMES)
def test_every_shipped_zero_file_is_accepted_and_holds_zero_only(name):
    read = read_deepspeed_file(name)
    assert list(read.content) == ["zero_optimization"]
    assert read.name == name
    assert read.stage == int(name.removeprefix("zero")[0])
    assert read.offloads_optimizer == name.endswith("_offload")
    assert {path.stem for path in DS_CONFIG_DIR.glob("*.json")} == set(DS_CONFIG_NAMES)


def test_a_zero_file_may_be_a_path_and_is_named_by_its_stem(tmp_path):
    read = read_deepspeed_file(str(write_config(tmp_path, zero_config(stage=2, reduce_bucket_size=1000))))
    assert (read.name, read.stage, read.offloads_optimizer, read.reason) == ("mine", 2, False, "asked for")


# --- the files that are refused ---


#: Content of the file, as text or as keys of zero_optimization beside others of the file; what the line says.
MISTAKES = [
    ("[]", "expected an object with the key zero_optimization"),
    ('{"zero_optimization": 3}', "expected an object with the key zero_optimization"),
    ('{"zero_optimization": {"stage": 1, "stage": 2}}', "the key 'stage' occurs twice"),
    ('{"zero_optimization": ', "not JSON"),
    ('{"zero_optimization": {"reduce_bucket_size": 1e999}}', "the number 1e999 is larger than any float"),
    (zero_config(stage=1) | {"optimizer": 1}, "unknown key optimizer; batch, optimizer"),
    (zero_config(strict=True), "unknown key zero_optimization.strict"),
    (zero_config(stage=2, offload_optimizer={"pin": 1}), "unknown key zero_optimization.offload_optimizer.pin"),
    (zero_config(stage=3, max_live_parameters=1, stage3_max_live_parameters=2), "a second name for a key"),
    (zero_config(stage=4), "zero_optimization.stage 4: expected 0, 1, 2 or 3"),
    (zero_config(stage=2, reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size -1: input should be greater"),
    (zero_config(stage=2, reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size is "auto"'),
    (zero_config(stage=2, offload_param={"device": "cpu"}), "offload_param needs stage 3 or more, not 2"),
    (zero_config(stage=3, offload_param={"device": "nvme"}), "offload_param.device nvme: expected cpu or none"),
    (zero_config(stage=1, overlap_comm=True), "zero_optimization.overlap_comm true needs stage 2 or 3, not 1"),
    (zero_config(stage=1, round_robin_gradients=True), "zero_optimization.round_robin_gradients"),
]


@pytest.mark.parametrize(("content", "expected_message"), MISTAKES)
def test_a_mistake_in_a_zero_file_is_one_line_that_names_file_and_key(content, expected_message, tmp_path):
    path = write_config(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_deepspeed_file(str(path))
    message = str(caught.value)
    assert message.startswith(f"--ds-config {path}: ")
    assert expected_message in message
    assert "\n" not in message
    assert "type=" not in message, "pydantic's own words for programmers"


def test_a_missing_zero_file_is_refused_with_the_shipped_names():
    with pytest.raises(UserError, match=r"missing: .* \(No such file.*; expected zero0, .* or a path to a JSON file"):
        read_deepspeed_file("missing")


NAMES = "stage offload_optimizer offload_param device reduce_bucket_size overlap_comm sub_group_size zero_optimization "
NAMES += "train_batch_size gradient_clipping pin_memory"
KEYS = st.sampled_from(NAMES.split())
OBJECTS = st.dictionaries(KEYS, JSON_VALUES | st.dictionaries(KEYS, JSON_VALUES, max_size=3), max_size=4)
CONTENTS = (
    st.binary(max_size=40)
    | st.builds(lambda zero, rest: json.dumps({**rest, "zero_optimization": zero}).encode(), OBJECTS, OBJECTS)
    | st.integers(1, 3000).map(lambda depth: b'{"zero_optimization":' * depth + b"{}" + b"}" * depth)
)


@many_inputs(100)
def test_any_content_of_a_zero_file_is_taken_or_refused_in_one_line(num_inputs, tmp_path):
    path = tmp_path / "any.json"

    def check(content):
        path.write_bytes(content)
        message = f"--ds-config {path}: "
        try:
            read_deepspeed_file(str(path))
        except UserError as error:
            message = str(error)
        assert message.startswith(f"--ds-config {path}: ")
        assert "\n" not in message

    check_inputs(num_inputs, check, CONTENTS)


# --- DeepSpeed's dict ---


@pytest.mark.parametrize("name", DS_CONFIG_NAMES)
def test_no_deepspeed_key_comes_from_both_sides_and_the_zero_file_is_unchanged(name):
    read = read_deepspeed_file(name)
    batch = BatchConfig(micro_batch_size=4, gradient_accumulation_steps=3, world_size=2)
    config = build_deepspeed_config(read, batch=batch, max_grad_norm=0.5, precision="bf16")
    assert {key: config[key] for key in read.content} == read.content
    assert config["timers"] == {"throughput": {"enabled": False}}, "it waits for the device twice a step"
    assert config["gradient_accumulation_steps"] == 1, "the loss is divided once, by us"
    assert config["gradient_clipping"] == (0.5 if read.stage else 0.0)
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & set(config), "bf16 is autocast over float32 weights"
    assert build_deepspeed_config(read, batch=batch, max_grad_norm=0.5, precision="fp16")["fp16"] == {"enabled": True}


# --- the choice where none was named ---


FULL_GPT2 = {"parameters": GPT2, "trainable": GPT2, "lora_targets": []}
FULL_1_5B = {"parameters": 1_540_000_000, "trainable": 1_540_000_000, "lora_targets": []}
LORA_7B = {"parameters": 7_000_000_000, "trainable": 20_000_000, "lora_targets": ["all"]}
ACTIVATIONS = 2 * GIB  # of a test's rank, beside its state


def choose(ranks: int, memory: int | None, model: dict[str, Any], precision: str = "bf16", **options: Any) -> Any:
    def estimate_bytes(file: Any) -> float:
        halved = count_frozen(model) if precision == "bf16" and file.stage < 3 else 0
        passes = PassMemory(cast_weights=halved)
        estimate = estimate_memory(model, passes, file, ranks, precision=precision, is_gpu=True)
        return ACTIVATIONS + estimate.weights + estimate.gradients + estimate.optimizer

    return choose_deepspeed_file(
        model_info=model,
        world_size=ranks,
        device_memory_bytes=memory,
        precision=precision,
        estimate_bytes=estimate_bytes,
        **options,
    )


PACKED_7B = {**LORA_7B, "frozen_bytes": 4_000_000_000}
CHOICES = [
    (1, None, FULL_GPT2, "bf16", {}, "zero0"),  # a CPU
    (1, 4, FULL_GPT2, "bf16", {}, "zero2_offload"),  # 1.9 GiB of state and 2 of activations, of 3.6
    (1, 80, FULL_1_5B, "bf16", {}, "zero0"),  # 22.9 GiB of state
    (1, 80, LORA_7B, "bf16", {}, "zero0"),  # 13 GiB of frozen weights in bfloat16
    (8, 24, FULL_1_5B, "bf16", {}, "zero2"),  # (4 + 16 / 8) x 1.54 billion bytes = 8.6 GiB
    (8, 16, FULL_1_5B, "bf16", {}, "zero3"),
    (2, 24, LORA_7B, "bf16", {}, "zero3"),
    (2, 24, PACKED_7B, "bf16", {}, "zero0"),  # counted at its own size
    (1, None, FULL_GPT2, "fp16", {}, "zero1"),  # zero0 has no loss scale
    (8, 16, LORA_7B, "bf16", {"stages": (0, 1, 2)}, "zero2"),  # int8, and dora on packed weights, refuse ZeRO 3
]


@pytest.mark.parametrize(("ranks", "gib", "model", "precision", "options", "expected"), CHOICES)
def test_the_default_zero_file_follows_what_a_rank_would_hold(ranks, gib, model, precision, options, expected):
    chosen = choose(ranks, gib and gib * GIB, model, precision, **options)
    assert chosen.name == expected
    assert chosen.reason not in ("", "asked for")


def check_plan_and_placement(argv: list[str], data: str) -> int:
    """On a rank: the ZeRO files that are chosen; before DeepSpeed makes its engine of ZeRO 3, no weight is whole."""
    with joined_ranks() as context:
        for flags, expected in (("", "zero0"), ("--optim adamw8bit", "zero0"), ("--ds-config zero1", "zero1")):
            plan = plan_run([*argv, *flags.split()], context, on_meta=True).plan
            assert plan.deepspeed_file.name == expected, flags
        planned = plan_run([*argv, "--ds-config", "zero3"], context, data)
        params = list(planned.model.module.parameters())
        sizes = [p.numel() for p in params]
        loss_module = CausalLMLoss(planned.model.causal, None)
        assert place_model(loss_module, planned.model, planned.plan.deepspeed_config, context) == ""
        whole = [p for p in params if p.numel() > 1]  # a weight that is elsewhere has one element or none
        assert not whole, [tuple(p.shape) for p in whole]
        assert [p.ds_tensor.numel() for p in params] == [-(-size // context.world_size) for size in sizes]
    return 0


def test_cpu_ranks_get_zero_0_and_zero_3_places_each_weight_in_parts_before_the_next_one(
    tiny_model, data_files, tmp_path
):
    argv = tiny_argv(tiny_model, data_files, "--mode full --block-size 16 --global-batch 2")
    log = tmp_path / "log"
    assert run_on_ranks(2, check_plan_and_placement, argv, str(prepare_data(argv)), log=log) == 0, log.read_text()
