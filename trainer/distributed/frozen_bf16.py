"""Frozen weights in bfloat16, where autocast would make such a copy of each in every forward and keep it.

The numbers are the same to the bit: a product under autocast rounds its weight first, and so does this, once.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.model.build import TrainableModel


def cast_frozen_weights(model: TrainableModel) -> list[nn.Module]:
    """Round every frozen float32 weight that only goes into products; returns the layers that have them.

    The float32 values are gone: a run is exported from its checkpoint and the base as it was before training.
    """
    layers = [layer for layer in find_frozen_layers(model) if layer.weight.dtype == torch.float32]
    for layer in layers:
        layer.weight.data = layer.weight.detach().to(torch.bfloat16)
    return layers


def find_frozen_layers(model: TrainableModel) -> list[nn.Module]:
    """Layers with a frozen weight, but the output layer, whose weight may be the embedding's, and those of DoRA,
    which takes its norms."""
    excluded = {model.causal.get_output_embeddings()} | {
        layer.base_layer for layer in model.module.modules() if len(getattr(layer, "lora_magnitude_vector", None) or ())
    }
    return [
        layer
        for layer in model.module.modules()
        if type(layer) in (Conv1D, nn.Linear) and layer not in excluded and not layer.weight.requires_grad
    ]
