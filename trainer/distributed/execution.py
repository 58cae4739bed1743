"""How steps are computed: one frozen plan, made by one function, passed to the engine, printed and recorded as it is.

A fallback while running is a new plan (`dataclasses.replace`) at a step boundary, with its reason.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trainer.config import choices
from trainer.config.settings import Settings
from trainer.distributed.process_group import DistContext
from trainer.model.build import TrainableModel
from trainer.model.loss import uses_gpu_form


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """How forward, backward and update are computed; none of it changes the numbers beyond rounding."""

    precision: str  #: fp32, or the type that autocast gives to products: bf16, fp16
    cuda_graphs: bool  #: forward and backward of shapes that come again are recorded and replayed
    eager_reason: str  #: why they are not; empty where they are
    blockwise_attention: bool  #: dropout, and GPT-2's attention with it, by `trainer.model.attention`
    packed_rows: bool  #: several examples share a row, which transformers' own attention masks from one another
    frozen_dtype: Literal["float32", "bfloat16"]  #: in which the frozen base is held
    chunked_loss: bool  #: logits are made and dropped in pieces; else all at once, by the model itself
    overlaps_reduction: bool  #: gradients are reduced over the ranks while the step's last backward runs
    finite_check: Literal["device", "host"]  #: who leaves out the update of a step that is not finite
    steps_in_flight: Literal[1, 2]  #: 2: a step is launched before the numbers of the one before it are read

    @property
    def path(self) -> str:
        return "graphs" if self.cuda_graphs else "eager"

    def describe(self) -> str:
        parts = [
            "CUDA graphs" if self.cuda_graphs else f"eager ({self.eager_reason})",
            "blockwise attention and dropout" * self.blockwise_attention,
            "packed rows" * self.packed_rows,
            "frozen weights in bfloat16" * (self.frozen_dtype == "bfloat16"),
            "whole logits" * (not self.chunked_loss),
            "gradients reduced during the backward" * self.overlaps_reduction,
            "one step ahead" * (self.steps_in_flight == 2),
        ]
        return ", ".join(filter(None, parts))

    def as_entry(self, step: int, reason: str) -> dict[str, Any]:
        """For run.json: from this step on, steps run by this plan."""
        return {"step": step, "reason": reason, "path": self.path, **asdict(self)}


def find_eager_reason(settings: Settings, *, is_gpu: bool, stage: int) -> str:
    """Why steps cannot be recorded as CUDA graphs; empty where they can, whatever `--execution` says."""
    if not is_gpu:
        return "no GPU"
    if stage:
        return f"ZeRO {stage}"
    if settings.data.packing:
        return "packed rows rarely have the same shape twice"
    return settings.graph_blocker


def holds_frozen_in_bf16(settings: Settings, *, precision: str, stage: int) -> bool:
    """Whether the frozen base is held in bfloat16. ZeRO 3 shards weights of one type."""
    is_multiplied = settings.lora.kind in get_args(choices.Adapter)  # another method may do more with its weights
    return precision == "bf16" and stage < 3 and settings.mode == "lora" and not settings.model.quant and is_multiplied


def make_execution_plan(
    settings: Settings, dist_context: DistContext, *, stage: int, precision: str, model_dropout: float
) -> ExecutionPlan:
    """The plan of a run. `stage`: of ZeRO; `model_dropout`: the largest dropout probability of the base model."""
    is_gpu = uses_gpu_form(dist_context.device)
    eager_reason = find_eager_reason(settings, is_gpu=is_gpu, stage=stage)
    if not eager_reason and settings.engine.execution == "eager":
        eager_reason = "--execution eager"
    dropout = max(model_dropout, settings.lora.dropout if settings.mode == "lora" else 0.0)
    is_guarded = stage == 0 and settings.train.optim == "adamw_fused"  # leaves an update out on the device's word
    return ExecutionPlan(
        precision=precision,
        cuda_graphs=not eager_reason,
        eager_reason=eager_reason,
        blockwise_attention=not (is_gpu or settings.data.packing) and dropout > 0,
        packed_rows=settings.data.packing,
        frozen_dtype="bfloat16" if holds_frozen_in_bf16(settings, precision=precision, stage=stage) else "float32",
        chunked_loss=True,  # until the model's own logits say otherwise
        overlaps_reduction=stage == 0 and dist_context.world_size > 1 and bool(eager_reason),
        finite_check="device" if is_guarded else "host",
        steps_in_flight=2 if is_gpu and is_guarded else 1,
    )


def cast_frozen_weights(model: TrainableModel) -> list[nn.Module]:
    """Round every frozen float32 weight that only goes into products to bfloat16; returns the layers that have them.

    Autocast would make such a copy of each in every forward, and keep it. The numbers are the same to the bit: a
    product under autocast rounds its weight first, and so does this, once. The float32 values are gone: a run is
    exported from its checkpoint and the base as it was before training.
    """
    layers = [layer for layer in find_frozen_layers(model) if layer.weight.dtype == torch.float32]
    for layer in layers:
        layer.weight.data = layer.weight.detach().to(torch.bfloat16)
    return layers


def find_frozen_layers(model: TrainableModel) -> list[nn.Module]:
    """Layers with a frozen weight, but the output layer, whose weight may be the embedding's, and those of DoRA,
    which takes its norms."""
    layers: list[Any] = list(model.module.modules())
    excluded = {layer.base_layer for layer in layers if len(getattr(layer, "lora_magnitude_vector", None) or ())}
    excluded.add(model.causal.get_output_embeddings())
    kinds = (Conv1D, nn.Linear)
    return [
        layer for layer in layers if type(layer) in kinds and layer not in excluded and not layer.weight.requires_grad
    ]
