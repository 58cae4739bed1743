"""A frozen base held in bfloat16 while it trains: what is rounded and what is not."""

import torch
from helpers.matrix import make_argv
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config import cli
from trainer.distributed.frozen_bf16 import cast_frozen_weights
from trainer.model.build import TrainableModel, build_model


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
