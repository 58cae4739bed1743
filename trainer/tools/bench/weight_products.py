"""The matrix products of a step with the model's weights, bare: the time that the machine itself takes for them."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.model.build import TrainableModel
from trainer.tools.trial_engine import device_seconds

MAX_OUTPUT_BYTES = 2**27  # of one product; over more rows it is several


def count_layer_shapes(model: TrainableModel) -> Counter[tuple[int, int, bool]]:
    """How many layers map so many inputs to so many outputs, by whether they train; before ZeRO shards them."""
    shapes: Counter[tuple[int, int, bool]] = Counter()
    for layer in model.causal.modules():
        if isinstance(layer, (Conv1D, nn.Linear)):
            num_in, num_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
            shapes[num_in, num_out, layer.weight.requires_grad] += 1
    return shapes


class WeightProducts:
    """For each layer the product forward, the gradient of its input and, where it trains, that of its weight."""

    def __init__(
        self, layer_shapes: Counter[tuple[int, int, bool]], num_tokens: int, dtype: torch.dtype, device: torch.device
    ):
        """`num_tokens`: of this rank's step; `dtype`: in which the step's products are computed."""
        self.device = device
        self.products: list[tuple[Callable[[], torch.Tensor], float]] = []  # each with how often a step has it
        for (num_in, num_out, is_trained), num_layers in layer_shapes.items():
            num_rows = min(num_tokens, max(1, MAX_OUTPUT_BYTES // (4 * max(num_in, num_out))))
            x, weight, grad = (
                torch.randn(size, dtype=dtype, device=device)
                for size in ((num_rows, num_in), (num_in, num_out), (num_rows, num_out))
            )
            for left, right in [(x, weight), (grad, weight.T), (x.T, grad)][: 3 if is_trained else 2]:
                output = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=device)
                product = partial(torch.mm, left, right, out=output)
                self.products.append((product, num_layers * num_tokens / num_rows))

    def seconds(self) -> float:
        """The time of all of them once; each is repeated as often as a step has it."""
        return sum(
            times_per_step * device_seconds(product, self.device, max(1, round(times_per_step)))
            for product, times_per_step in self.products
        )
