"""How steps are run: decided once, from settings, model and device alone; what goes to a device; and a
capture that fails, on a stand-in for the device."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.engines import plan_execution
from helpers.matrix import make_argv
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config import cli
from trainer.data.sampler import IGNORE_INDEX, MicroBatch
from trainer.distributed import execution
from trainer.distributed.engine import copy_to_device
from trainer.distributed.execution import cast_frozen_weights
from trainer.model import torch_internals
from trainer.model.build import TrainableModel, build_model


def test_a_gpu_records_graphs_and_keeps_two_steps_in_flight_and_a_cpu_does_neither():
    gpu, cpu = plan_execution(device="cuda"), plan_execution()
    assert (gpu.path, gpu.steps_in_flight, gpu.blockwise_attention) == ("graphs", 2, False)
    assert (cpu.path, cpu.steps_in_flight) == ("eager", 1)
    assert "eager (no GPU)" in cpu.describe()
    for flags, reason in (
        ("--execution eager", "--execution eager"),
        ("--quant nf4", "--quant"),
        ("--activation-checkpointing", "--activation-checkpointing"),
        ("--ds-config zero1", "ZeRO 1"),
        ("--ds-config zero3", "ZeRO 3"),
    ):
        plan = plan_execution(*flags.split(), device="cuda")
        assert (plan.path, plan.eager_reason) == ("eager", reason)
        assert f"eager ({reason})" in plan.describe()
    assert plan_execution("--optim", "adamw", device="cuda").steps_in_flight == 1, "its updates wait for the numbers"


def build(tiny_model: str, data_files: tuple[str, str], *flags: str) -> TrainableModel:
    return build_model(cli.parse_args([*make_argv(tiny_model, data_files, "lora", "completion"), *flags]).settings)


def test_only_frozen_matmul_weights_are_cast_to_bf16(tiny_model, data_files):
    model = build(tiny_model, data_files)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    cast_frozen_weights(model)
    half = {name for name, p in model.module.named_parameters() if p.dtype == torch.bfloat16}
    assert half == {f"{name}.weight" for name, layer in model.module.named_modules() if type(layer) is Conv1D}
    assert len(half) == 8, "c_attn, c_proj, c_fc and c_proj of two blocks"
    assert all(torch.equal(p, before[name].bfloat16()) for name, p in model.module.named_parameters() if name in half)


def test_the_frozen_cast_leaves_weights_of_dora_layers_in_float32(tiny_model, data_files):
    model = build(tiny_model, data_files, "--adapter", "dora", "--lora-target-modules", "c_attn")
    cast_frozen_weights(model)
    for layer in model.module.modules():
        if isinstance(layer, (Conv1D, nn.Linear)) and not layer.weight.requires_grad:
            adapted = layer.weight.shape == (16, 48)
            assert (layer.weight.dtype == torch.float32) == (adapted or layer is model.causal.get_output_embeddings())


# --- to a device ---


@pytest.mark.parametrize(
    ("width", "options", "expected"), [(20, (64, None), 64), (64, (64, None), 64), (65, (64, 100), 100), (20, (), 20)]
)
def test_recorded_rows_are_padded_to_a_multiple_with_labels_that_do_not_count(width, options, expected):
    ids = np.ones((2, width), dtype=np.int64)
    micro_batch = MicroBatch(input_ids=ids, labels=ids, tokens=2 * width, index=0)
    padded, labels = copy_to_device(micro_batch, torch.device("cpu"), *options)
    assert padded.shape == labels.shape == (2, expected)
    assert int((labels != IGNORE_INDEX).sum()) == 2 * width


def test_after_a_capture_that_fails_generator_stream_and_pool_are_put_back(monkeypatch):
    """It leaves the generator "capturing", the side stream current and the allocator giving to the pool."""
    generator, streams, released = Mock(), [], []
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "main")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch_internals, "release_capture_pool", lambda *place: released.append(place))
    with (
        pytest.raises(RuntimeError, match="capturing"),
        execution._restored_on_failure(torch.device("cuda", 0), "pool"),
    ):
        raise RuntimeError("operation not permitted when stream is capturing")
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)
    assert (streams, released) == (["main"], [(0, "pool")])
