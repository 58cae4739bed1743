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

from trainer.config.schema import ModelSettings

#: LLM.int8() computes input columns with a value above it apart (6.0 by default). Which columns those are depends on
#: the rows that share a forward, and so would every loss; 0 turns it off. Models of GPT-2's sizes lose little by it:
#: such outliers appear at 6.7 billion weights (arXiv 2208.07339, section 4).
INT8_THRESHOLD = 0.0


def quantize(causal: PreTrainedModel, settings: ModelSettings, device: torch.device) -> None:
    """Pack the weight of every Conv1D and Linear but the output layer, in place; they move to `device`."""
    output = causal.get_output_embeddings()
    for name, layer in list(causal.named_modules()):
        if isinstance(layer, (Conv1D, nn.Linear)) and layer is not output:
            parent, _, child = name.rpartition(".")
            setattr(causal.get_submodule(parent), child, _packed(layer, settings, device))
    # peft looks here for which kind of layer it adapts.
    causal.is_loaded_in_8bit = settings.quant == "int8"
    causal.is_loaded_in_4bit = settings.quant != "int8"


def _packed(layer: nn.Module, settings: ModelSettings, device: torch.device) -> nn.Module:
    """The layer with its weight as [out, in], packed; Conv1D keeps it the other way round."""
    import bitsandbytes as bnb  # takes seconds: only where it is needed

    weight: Tensor = layer.weight.detach()
    weight = (weight.T if isinstance(layer, Conv1D) else weight).contiguous()
    rows, columns = weight.shape
    with torch.device("meta"):
        new = (
            bnb.nn.Linear8bitLt(
                columns, rows, layer.bias is not None, has_fp16_weights=False, threshold=INT8_THRESHOLD
            )
            if settings.quant == "int8"
            else bnb.nn.Linear4bit(
                columns, rows, layer.bias is not None, compress_statistics=settings.quant_double,
                quant_type=settings.quant,
            )
        )  # fmt: skip
    new.bias = layer.bias
    if settings.quant == "int8":
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        new.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=settings.quant_double, quant_type=settings.quant,
            module=new,
        )  # fmt: skip
        _keep_honest(new)
    return new.to(device).requires_grad_(False)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the 4-bit layers compute in `dtype`; left alone they take that of the first input they see."""
    for layer in _four_bit(model):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def keep_honest(model: nn.Module) -> None:
    """Keep 4-bit layers from another arithmetic in evaluation than in training.

    On processors with AVX512-BF16 bitsandbytes packs them anew at the first evaluation, computes in bf16 from then
    on, and gives their input no gradient any more.
    """
    for layer in _four_bit(model):
        _keep_honest(layer)


def _keep_honest(layer: Any) -> None:
    layer.support_avx512bf16_for_cpu = False


def _four_bit(model: nn.Module) -> Iterator[Any]:
    """bitsandbytes' own layers; peft has one of the same name around each."""
    for layer in model.modules():
        if type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes"):
            yield layer


def held_bytes(model: nn.Module) -> int:
    """Bytes of the frozen weights as they are held, with the scales of packed ones."""
    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            state = getattr(parameter, "quant_state", None)
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])] if state is not None else []
            scales += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
            total += sum(t.numel() * t.element_size() for t in (parameter, *scales))
    return total


def will_hold_bytes(model: nn.Module, output: nn.Module | None, settings: ModelSettings) -> int:
    """What `held_bytes` will be of a model that is not packed yet, from the shapes of its weights alone."""
    packed = {
        id(layer.weight): layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
        for layer in model.modules()
        if isinstance(layer, (Conv1D, nn.Linear)) and layer is not output
    }
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum(_packed_bytes(p.numel(), packed[id(p)], settings) if id(p) in packed else p.numel() * 4 for p in frozen)


def _packed_bytes(elements: int, rows: int, settings: ModelSettings) -> int:
    """Of one weight: int8 has a float32 scale for each row, the 4-bit kinds one for each block of 64 elements.

    Packed doubly, those scales are bytes with a float32 scale for each 256 of them.
    """
    if settings.quant == "int8":
        return elements + 4 * rows
    blocks = -(-elements // 64)
    scales = blocks + 4 * -(-blocks // 256) if settings.quant_double else 4 * blocks
    return -(-elements // 2) + scales


def as_transformers_says_it(settings: ModelSettings, model: nn.Module) -> dict[str, Any]:
    """The arguments of transformers' BitsAndBytesConfig that pack a base as `model`'s is."""
    if settings.quant == "int8":
        return {"load_in_8bit": True, "llm_int8_threshold": INT8_THRESHOLD}
    compute = next((layer.compute_dtype for layer in _four_bit(model)), None) or torch.float32
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": settings.quant,
        "bnb_4bit_use_double_quant": settings.quant_double,
        "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
    }  # fmt: skip
