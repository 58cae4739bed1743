"""How steps are run: decided once, from settings, model and device alone; what goes to a device; and a
capture that fails, on a stand-in for the device."""

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


# --- a CUDA graph's capture that fails: generator, stream and allocator are put back ---


class FakeState:
    """Of CUDA's generator: drawing from one that is capturing, while nothing captures, raises."""

    def __init__(self, offset: int = 0):
        self.offset, self.is_capturing = offset, False


class FakeCudaDevice:
    """The default generator, the current stream and the allocator, as torch 2.11 leaves them when a capture fails.

    `torch.cuda.graph` asks for the end of the capture first; where that raises, neither the allocator's and the
    generator's epilogue nor the return to the stream before is reached, and the graph's end does not release its pool.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.state, self.stream, self.gives_to_pool, self.pool_users = FakeState(), "main", False, 0
        patch.setattr(torch.cuda, "default_generators", [self])
        patch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate)
        patch.setattr(torch._C, "_cuda_releasePool", self.release_pool)

    def end_allocate(self, index: int, pool: str) -> None:
        if not self.gives_to_pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.gives_to_pool = False

    def release_pool(self, index: int, pool: str) -> None:
        self.pool_users -= 1

    def clone_state(self) -> FakeState:
        return FakeState(self.state.offset)

    def graphsafe_set_state(self, state: FakeState) -> None:
        self.state = state

    def dropout(self) -> None:
        if self.state.is_capturing and self.stream == "main":
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 4

    def capture(self, failing: str) -> None:
        self.stream = "side"
        if failing == "begin":
            raise RuntimeError("capture_begin failed")
        self.state.is_capturing = self.gives_to_pool = True
        self.pool_users += 1
        self.dropout()
        try:
            if failing == "inside":
                raise RuntimeError("operation not permitted when stream is capturing")
            if failing == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if failing in ("inside", "end"):
                raise RuntimeError("operation failed due to a previous error during capture")
            self.end_allocate(0, "pool")
            self.release_pool(0, "pool")  # as the graph that had its end does when it is dropped
            self.state.is_capturing, self.stream = False, "main"


@pytest.mark.parametrize("failing", ["begin", "inside", "end", "memory"])
def test_after_a_capture_that_fails_anywhere_the_next_dropout_draws_as_if_there_had_been_none(failing, monkeypatch):
    device = FakeCudaDevice(monkeypatch)
    device.dropout()
    with pytest.raises(RuntimeError), execution._restored_on_failure(torch.device("cuda", 0), "pool"):
        device.capture(failing)
    device.dropout()
    assert (device.state.offset, device.stream) == (8, "main")
    assert (device.gives_to_pool, device.pool_users) == (False, 0), "its memory can be had again"
