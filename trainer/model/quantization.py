"""A frozen base in 4 or 8 bits: what `--quant` does to a model, and how others repeat it. A door to bitsandbytes.

Each layer is packed on the device that it computes on, one at a time, from the float32 weights. The output layer and
the embeddings stay as they are, as transformers has it.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.settings import ModelSettings

#: LLM.int8() computes input columns with a value above it apart. Which those are depends on the rows that share a
#: forward, and so would every loss; 0 turns it off. Outliers appear at 6.7 billion weights (arXiv 2208.07339, 4).
INT8_THRESHOLD = 0.0


def quantize(causal: PreTrainedModel, settings: ModelSettings, device: torch.device) -> None:
    """Pack the weight of every Conv1D and Linear but the output layer, in place; they move to `device`."""
    from transformers.integrations import replace_with_bnb_linear  # imports bitsandbytes: only where it is needed

    layers = _packable_layers(causal)
    output_names = [name for name, layer in causal.named_modules() if layer is causal.get_output_embeddings()]
    replace_with_bnb_linear(causal, output_names, BitsAndBytesConfig(**bitsandbytes_config_kwargs(settings, causal)))
    for name, layer in layers.items():
        packed: Any = causal.get_submodule(name)
        weight = layer.weight.detach().float()
        weight = (weight.T if isinstance(layer, Conv1D) else weight).contiguous()  # [out, in]
        packed.weight = type(packed.weight)(weight, requires_grad=False, **vars(packed.weight))
        packed.bias = layer.bias
        packed.to(device).requires_grad_(False)
    disable_avx512_repacking(causal)
    # peft looks here for which kind of layer it adapts.
    causal.is_loaded_in_8bit = settings.quant == "int8"
    causal.is_loaded_in_4bit = settings.quant != "int8"


def _packable_layers(causal: PreTrainedModel) -> dict[str, Any]:
    output, kinds = causal.get_output_embeddings(), (Conv1D, nn.Linear)
    return {n: m for n, m in causal.named_modules() if isinstance(m, kinds) and m is not output}


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    for layer in _iter_4bit_layers(model):
        layer.compute_dtype = dtype


def disable_avx512_repacking(model: nn.Module) -> None:
    """Keep 4-bit layers as they are: on processors with AVX512-BF16 bitsandbytes packs them anew at the first
    evaluation, computes in bf16 from then on, and gives their input no gradient any more."""
    for layer in _iter_4bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def _iter_4bit_layers(model: nn.Module) -> Iterator[Any]:
    """bitsandbytes' own layers; peft has one of the same name around each."""
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes"):
            yield layer


def count_quantized_bytes(causal: PreTrainedModel, settings: ModelSettings) -> int:
    """Bytes of a base in float32 once it is packed, from shapes alone: int8 has a float32 scale for each row, the
    4-bit kinds one for each 64 elements; packed doubly, those are bytes with a float32 scale for each 256 of them."""
    num_bytes = sum(4 * parameter.numel() for parameter in causal.parameters())
    for layer in _packable_layers(causal).values():
        num_elements, num_blocks = layer.weight.numel(), math.ceil(layer.weight.numel() / 64)
        scale_bytes = num_blocks + 4 * math.ceil(num_blocks / 256) if settings.quant_double else 4 * num_blocks
        packed_bytes = math.ceil(num_elements / 2) + scale_bytes
        if settings.quant == "int8":
            packed_bytes = num_elements + 4 * layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
        num_bytes += packed_bytes - 4 * num_elements
    return num_bytes


def bitsandbytes_config_kwargs(settings: ModelSettings, model: nn.Module) -> dict[str, Any]:
    """The arguments of transformers' BitsAndBytesConfig that pack a base as `model`'s is."""
    if settings.quant == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": INT8_THRESHOLD}
    compute_dtype = next((layer.compute_dtype for layer in _iter_4bit_layers(model)), torch.float32)
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": settings.quant,
        "bnb_4bit_use_double_quant": settings.quant_double,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
