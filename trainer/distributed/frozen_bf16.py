"""Frozen weights in bfloat16, where autocast would make such a copy of each in every forward and keep it.

The numbers are the same to the bit: a product under autocast rounds its weight first, and so does this, once. What
was rounded off is put back when training is over.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.model.build import Model


def holds_halves(*, precision: str, stage: int, adapters: bool, packed: bool) -> bool:
    """Whether a run's frozen base is held so: under ZeRO-3 it is divided in float32, a packed one is smaller still."""
    return precision == "bf16" and stage < 3 and adapters and not packed


class Halves:
    """The float32 weights of a frozen base beside their halves in the model; in host memory, of one rank."""

    def __init__(self, model: Model, *, keep: bool):
        """Round every frozen weight that only goes into products; `keep` what it was, on the host."""
        self.layers = list(_layers(model))
        self.whole: list[Tensor] = []
        for layer in self.layers:
            if keep:
                self.whole.append(layer.weight.detach().cpu())
            layer.weight.data = layer.weight.detach().to(torch.bfloat16)

    def put_back(self) -> None:
        """Float32 again: as it was where that was kept, else of the same rounded values."""
        for number, layer in enumerate(self.layers):
            whole = self.whole[number] if self.whole else layer.weight.detach().float()
            layer.weight.data = whole.to(layer.weight.device)
        self.layers, self.whole = [], []


def _layers(model: Model) -> list[nn.Module]:
    """Layers with a frozen weight, but the output layer, whose weight may be the embedding's, and those of DoRA,
    which takes its norms."""
    output = model.causal.get_output_embeddings()
    normed = {
        layer.base_layer for layer in model.module.modules() if len(getattr(layer, "lora_magnitude_vector", None) or ())
    }
    return [
        layer
        for layer in model.module.modules()
        if type(layer) in (Conv1D, nn.Linear)
        and layer is not output
        and layer not in normed
        and not layer.weight.requires_grad
        and layer.weight.dtype == torch.float32
    ]
