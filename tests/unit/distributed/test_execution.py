"""How steps are run is decided once, from settings, model and device alone; what of a base is held in bfloat16."""

import torch
from helpers.engines import plan_execution
from helpers.matrix import make_argv
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config import cli
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
