"""Frozen weights in bfloat16, where autocast would make such a copy of each in every forward and keep it.

The numbers are the same to the bit: a product under autocast rounds its weight first, and so does this, once. What
was rounded off is put back when training is over.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.model.build import TrainableModel


class FrozenWeightCast:
    """The float32 weights of a frozen base beside their halves in the model; in host memory, of one rank."""

    def __init__(self, model: TrainableModel, *, keep_fp32_copy: bool):
        """Round every frozen weight that only goes into products; `keep_fp32_copy` what it was, on the host."""
        self.layers = [layer for layer in find_frozen_layers(model) if layer.weight.dtype == torch.float32]
        self.fp32_weights: list[Tensor] = []
        for layer in self.layers:
            if keep_fp32_copy:
                self.fp32_weights.append(layer.weight.detach().cpu())
            layer.weight.data = layer.weight.detach().to(torch.bfloat16)

    def restore_fp32(self) -> None:
        """Float32 again: as it was where that was kept, else of the same rounded values."""
        for index, layer in enumerate(self.layers):
            weight = self.fp32_weights[index] if self.fp32_weights else layer.weight.detach().float()
            layer.weight.data = weight.to(layer.weight.device)
        self.layers, self.fp32_weights = [], []


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
