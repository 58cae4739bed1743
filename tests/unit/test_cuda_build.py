"""The product under the CUDA build of torch, which installs and imports without a GPU: imports, and forward and update
of tensors that have a device, a shape and a type, but no data. Skipped under a CPU build; `pip install torch` of the
registry gives the other one."""

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import trainer
from trainer.config import cli
from trainer.distributed.memory import count_pass_memory, materialize, prepare_loss
from trainer.distributed.stepper import PlainStepper
from trainer.model import loss as loss_module
from trainer.model.build import build_model

pytestmark = [
    pytest.mark.cuda_build,
    pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of torch"),
]


def test_every_module_imports_and_every_name_of_cuda_that_the_product_uses_is_there():
    names = [module.name for module in pkgutil.walk_packages(trainer.__path__, "trainer.")]
    assert len(names) > 100
    for name in names:
        importlib.import_module(name)
    names = ["CUDAGraph", "graph", "default_generators", "current_stream", "set_stream", "Event", "graph_pool_handle"]
    assert [name for name in (*names, "OutOfMemoryError") if not hasattr(torch.cuda, name)] == []
    # of the state and the memory that a failed capture leaves behind
    assert hasattr(torch.Generator, "clone_state")
    assert hasattr(torch.Generator, "graphsafe_set_state")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", ["--mode full", "--mode lora", "--mode lora --adapter dora"])
def test_forward_and_update_keep_device_and_types_and_their_memory_is_counted(
    flags, precision, tiny_model, monkeypatch
):
    """The memory of tensors without data, for which torch 2.11 has no sum in float32 of 16-bit products."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # as with a GPU
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", 16 * 4 * 97)  # pieces, whose products are added
    settings = cli.parse_args(f"{flags} --preset demo --model {tiny_model} --block-size 16".split()).settings
    casts = "lora" in flags and precision == "bf16"
    form: Any = {"precision": precision, "is_gpu": True, "casts_frozen": casts}
    assert count_pass_memory(settings, micro_batch_size=2, row_length=16, **form).peak > 0
    module, _ = prepare_loss(build_model(settings, on_meta=True), **form)
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(module, "cuda")
        params = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(params, fused=True)
        context: Any = SimpleNamespace(device=torch.device("cuda", 0), world_size=1, rank=0)
        stepper = PlainStepper(context, optimizer, module, params, 1.0, skips_on_device=True)
        ids = torch.zeros(2, 16, dtype=torch.long, device="cuda")
        loss_sum, row_losses = module(ids, ids)  # its backward would ask the driver for the device
        assert (loss_sum.device.type, loss_sum.requires_grad) == ("cuda", True)
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        grad_norm, _ = stepper.optimizer_step(torch.isfinite(row_losses).all())
        assert (row_losses.device.type, row_losses.dtype) == ("cuda", torch.float32)
        assert grad_norm.device.type == "cuda"
        steps = [optimizer.state[parameter]["step"] for parameter in params]
        assert {step.device.type for step in steps} == {"cuda"}, "a step count of the host would be waited for"
