"""The matrix products of a step with the model's weights, bare: the time that the machine itself takes for them."""

import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.model.build import TrainableModel

MAX_OUTPUT_BYTES = 2**27  # of one product; over more rows it is several


def count_layer_shapes(model: TrainableModel) -> Counter[tuple[int, int, bool]]:
    """How many layers map so many inputs to so many outputs, by whether they train; before ZeRO shards them."""
    layers = [layer for layer in model.causal.modules() if isinstance(layer, (Conv1D, nn.Linear))]
    return Counter((*_in_out(layer), layer.weight.requires_grad) for layer in layers)


class WeightProducts:
    """For each layer the product forward, the gradient of its input and, where it trains, that of its weight."""

    def __init__(
        self, layer_shapes: Counter[tuple[int, int, bool]], num_tokens: int, dtype: torch.dtype, device: torch.device
    ):
        """`num_tokens`: of this rank's step; `dtype`: in which the step's products are computed."""
        self.products: list[tuple[Callable[[], torch.Tensor], float]] = []  # each with how often a step has it
        for (num_in, num_out, is_trained), num_layers in layer_shapes.items():
            num_rows = min(num_tokens, max(1, MAX_OUTPUT_BYTES // (4 * max(num_in, num_out))))
            x, weight, grad = (
                torch.randn(size, dtype=dtype, device=device)
                for size in ((num_rows, num_in), (num_in, num_out), (num_rows, num_out))
            )
            pairs = [(x, weight), (grad, weight.T), *([(x.T, grad)] if is_trained else [])]
            for left, right in pairs:
                output = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=device)
                self.products.append((_product(left, right, output), num_layers * num_tokens / num_rows))

    def seconds(self, synchronize: Callable[[], None]) -> float:
        """The time of all of them once; each is repeated as often as a step has it."""
        total = 0.0
        for product, times_per_step in self.products:
            num_repeats = max(1, round(times_per_step))
            synchronize()
            start_time = time.perf_counter()
            for _ in range(num_repeats):
                product()
            synchronize()
            total += (time.perf_counter() - start_time) * times_per_step / num_repeats
        return total


def _in_out(layer: nn.Module) -> tuple[int, int]:
    shape = layer.weight.shape
    return (shape[0], shape[1]) if isinstance(layer, Conv1D) else (shape[1], shape[0])


def _product(left: torch.Tensor, right: torch.Tensor, output: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: torch.mm(left, right, out=output)
