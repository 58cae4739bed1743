"""A frozen base in 4 or 8 bits: what `--quant` does to a model, and how others repeat it. A door to bitsandbytes.

Each layer is packed on the device that it computes on, one at a time, from the float32 weights. The output layer and
the embeddings stay as they are, as transformers has it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.config.settings import ModelSettings

#: LLM.int8() computes input columns with a value above it apart (6.0 by default). Which columns those are depends on
#: the rows that share a forward, and so would every loss; 0 turns it off. Models of GPT-2's sizes lose little by it:
#: such outliers appear at 6.7 billion weights (arXiv 2208.07339, section 4).
INT8_THRESHOLD = 0.0


def quantize(causal: PreTrainedModel, settings: ModelSettings, device: torch.device) -> None:
    """Pack the weight of every Conv1D and Linear but the output layer, in place; they move to `device`."""
    output_layer = causal.get_output_embeddings()
    for name, layer in list(causal.named_modules()):
        if isinstance(layer, (Conv1D, nn.Linear)) and layer is not output_layer:
            causal.set_submodule(name, _quantize_layer(layer, settings, device))
    # peft looks here for which kind of layer it adapts.
    causal.is_loaded_in_8bit = settings.quant == "int8"
    causal.is_loaded_in_4bit = settings.quant != "int8"


def _quantize_layer(layer: nn.Module, settings: ModelSettings, device: torch.device) -> nn.Module:
    """The layer with its weight as [out, in], packed; Conv1D keeps it the other way round."""
    import bitsandbytes as bnb  # takes seconds: only where it is needed

    weight: Tensor = layer.weight.detach()
    weight = (weight.T if isinstance(layer, Conv1D) else weight).contiguous()
    out_features, in_features = weight.shape
    sizes = (in_features, out_features, layer.bias is not None)
    if settings.quant == "int8":
        with torch.device("meta"):
            quantized = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=INT8_THRESHOLD)
        quantized.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        kind = {"compress_statistics": settings.quant_double, "quant_type": settings.quant}
        with torch.device("meta"):
            quantized = bnb.nn.Linear4bit(*sizes, **kind)
        quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=quantized, **kind)
        disable_avx512_repacking(quantized)
    quantized.bias = layer.bias
    return quantized.to(device).requires_grad_(False)


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the 4-bit layers compute in `dtype`; left alone they take that of the first input they see."""
    for layer in _iter_4bit_layers(model):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def disable_avx512_repacking(model: nn.Module) -> None:
    """Keep 4-bit layers from another arithmetic in evaluation than in training.

    On processors with AVX512-BF16 bitsandbytes packs them anew at the first evaluation, computes in bf16 from then
    on, and gives their input no gradient any more.
    """
    for layer in _iter_4bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def _iter_4bit_layers(model: nn.Module) -> Iterator[Any]:
    """bitsandbytes' own layers; peft has one of the same name around each."""
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes"):
            yield layer


def count_frozen_bytes(model: nn.Module) -> int:
    """Bytes of the frozen weights as they are held, with the scales of packed ones."""
    tensors: list[Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            quant_state = getattr(parameter, "quant_state", None)
            tensors += [parameter] + ([quant_state.absmax] if quant_state else [])
            tensors += [quant_state.state2.absmax] if quant_state and quant_state.nested else []
            tensors += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
    return sum(t.numel() * t.element_size() for t in tensors)


def estimate_frozen_bytes(model: nn.Module, output_layer: nn.Module | None, settings: ModelSettings) -> int:
    """What `count_frozen_bytes` will be of a model that is not packed yet, from the shapes of its weights alone."""
    out_features = {
        id(layer.weight): layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
        for layer in model.modules()
        if isinstance(layer, (Conv1D, nn.Linear)) and layer is not output_layer
    }
    return sum(
        _quantized_bytes(p.numel(), out_features[id(p)], settings) if id(p) in out_features else p.numel() * 4
        for p in model.parameters()
        if not p.requires_grad
    )


def _quantized_bytes(num_elements: int, num_rows: int, settings: ModelSettings) -> int:
    """Of one weight: int8 has a float32 scale for each row, the 4-bit kinds one for each block of 64 elements.

    Packed doubly, those scales are bytes with a float32 scale for each 256 of them.
    """
    if settings.quant == "int8":
        return num_elements + 4 * num_rows
    num_blocks = -(-num_elements // 64)
    scale_bytes = num_blocks + 4 * -(-num_blocks // 256) if settings.quant_double else 4 * num_blocks
    return -(-num_elements // 2) + scale_bytes


def bitsandbytes_config_kwargs(settings: ModelSettings, model: nn.Module) -> dict[str, Any]:
    """The arguments of transformers' BitsAndBytesConfig that pack a base as `model`'s is."""
    if settings.quant == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": INT8_THRESHOLD}
    compute_dtype = next((layer.compute_dtype for layer in _iter_4bit_layers(model)), None) or torch.float32
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": settings.quant,
        "bnb_4bit_use_double_quant": settings.quant_double,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
