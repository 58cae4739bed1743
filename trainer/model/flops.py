"""Floating-point operations of a training step, by formula: matrix products only, two operations for each weight.

Per token, a product with a weight of w entries takes 2w forward, 2w for the gradient of its input and 2w for that of
the weight. A gradient is counted only where it is computed: a frozen weight has none, and nothing before the first
trained weight has one. Attention over T positions takes 4 T d forward and 8 T d backward a token and block (d: width of
all heads; no saving by the causal mask). What activation checkpointing computes again is counted; embeddings,
normalisation and the optimizer are not.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.model.build import TrainableModel

_IN_BLOCK = re.compile(r"(?:^|\.)(?:h|layers|blocks|layer)\.(\d+)\.")
_PEFT_PART = re.compile(r"\.(?:base_layer|lora_A\..*|lora_B\..*|lora_magnitude_vector.*)$")


@dataclass(frozen=True, kw_only=True)
class _Product:
    """A matrix product of the forward, once a token. `stage`: layers that read the same tensor have the same."""

    num_weights: int
    is_trained: bool
    stage: int
    block: int | None
    reads_adapter: bool = False  # whether its input is an adapter's own inner product, which always has a gradient


def count_step_flops(
    model: TrainableModel, *, num_rows: int, sequence_length: int, activation_checkpointing: bool = False
) -> int:
    """Operations of one forward and backward over `num_rows` rows of `sequence_length` tokens, padding included."""
    num_tokens = num_rows * sequence_length
    products, attention_stages = _list_products(model)
    attention = 4 * sequence_length * _attention_width(model) * num_tokens
    forward = sum(2 * product.num_weights for product in products) * num_tokens + attention * len(attention_stages)
    # with checkpointing transformers lets the embedded tokens require a gradient, or the first block had none
    first_stage = -1 if activation_checkpointing else _first_trained_stage(model, products)
    backward = num_tokens * sum(2 * p.num_weights * _num_gradients(p, first_stage) for p in products)
    backward += 2 * attention * sum(stage >= first_stage for stage in attention_stages)
    recompute = 0  # the blocks' forward again
    if activation_checkpointing:
        in_blocks = [product for product in products if product.block is not None]
        last_weights = 0 if _has_dropout(model) else sum({p.block: p.num_weights for p in in_blocks}.values())
        recompute = 2 * (sum(product.num_weights for product in in_blocks) - last_weights) * num_tokens
        recompute += attention * len(attention_stages)
    return forward + backward + recompute


def count_training_flops(
    model: TrainableModel, *, lengths: NDArray[np.int64], global_batch: int, activation_checkpointing: bool
) -> int:
    """Operations of an average optimizer step over all ranks, examples of these lengths (int64 [n], tokens).

    Padding is left out, and so is what a row of packed examples computes across them.
    """
    counts = [
        count_step_flops(model, num_rows=1, sequence_length=n, activation_checkpointing=activation_checkpointing)
        for n in (1, 2)
    ]
    quadratic = (counts[1] - 2 * counts[0]) // 2  # of a n + b n^2: products of weights, and attention
    linear, rows = counts[0] - quadratic, lengths.astype(np.float64)
    return round(global_batch * (linear * rows.mean() + quadratic * (rows**2).mean()))


def _num_gradients(product: _Product, first_stage: int) -> int:
    """How many of (the gradient of the weight, that of the input) are computed."""
    return product.is_trained + (product.stage > first_stage or product.reads_adapter)


def _list_products(model: TrainableModel) -> tuple[list[_Product], list[int]]:
    """(the linear layers in the order of the forward, output layer last; of each attention the stage of its inputs)."""
    output_layer = model.causal.get_output_embeddings()
    layers = [
        (name, layer)
        for name, layer in model.causal.named_modules()
        if isinstance(layer, (Conv1D, nn.Linear)) and layer is not output_layer
    ]
    names = list(dict.fromkeys(_PEFT_PART.sub("", name) for name, _ in layers))
    output_projections = {_attention_of(name): name for name in names if _attention_of(name)}  # the last of each
    stages: dict[str, int] = {}
    for name in names:
        is_input_projection = _attention_of(name) is not None and name not in output_projections.values()
        is_beside_another = stages and is_input_projection and _attention_of(name) == _attention_of(list(stages)[-1])
        stages[name] = max(stages.values(), default=-1) + (not is_beside_another)
    products = [_product(name, layer, stages[_PEFT_PART.sub("", name)]) for name, layer in layers]
    if isinstance(output_layer, nn.Linear):
        products.append(_product("", output_layer, len(names)))
    return products, [stages[name] - 1 for name in output_projections.values()]


def _product(name: str, layer: nn.Module, stage: int) -> _Product:
    match = _IN_BLOCK.search(name)
    is_linear = isinstance(layer, nn.Linear)  # a packed weight holds fewer numbers than it is multiplied with
    return _Product(
        num_weights=layer.in_features * layer.out_features if is_linear else int(layer.weight.numel()),
        is_trained=layer.weight.requires_grad,
        stage=stage,
        block=int(match[1]) if match else None,
        reads_adapter=".lora_B." in name,
    )


def _attention_of(name: str) -> str | None:
    """The name of the attention that a layer belongs to, None for one of the MLP."""
    match = re.match(r"(.*?\.\w*(?:attn|attention)\w*)\.", name)
    return match[1] if match else None


def _first_trained_stage(model: TrainableModel, products: list[_Product]) -> int:
    """The stage from which on gradients are computed; -1 where embeddings or the first norms are trained."""
    for module in model.causal.modules():
        if not isinstance(module, (Conv1D, nn.Linear)) and any(p.requires_grad for p in module.parameters(False)):
            return -1
    return min((product.stage for product in products if product.is_trained), default=len(products))


def _has_dropout(model: TrainableModel) -> bool:
    """Whether a dropout follows the last product of a block: its mask has to be drawn again, and so the product."""
    return any(
        layer.p > 0 for n, layer in model.causal.named_modules() if type(layer) is nn.Dropout and "lora" not in n
    )


def _attention_width(model: TrainableModel) -> int:
    """Width of all heads of a block's attention together."""
    config = model.causal.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_size * config.num_attention_heads)
