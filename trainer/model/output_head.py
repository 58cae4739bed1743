"""How a causal LM makes logits of its last hidden states: a layer, and what its architecture does to them afterwards.

Found by structure, for any architecture whose head is that; `CausalLMLoss.verify` holds it against the model's own.
Gain: that of linear_cross_entropy.py, for architectures other than GPT-2.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class OutputHead:
    """Logits are soft_cap * tanh(scale * layer(hidden) / soft_cap), without the tanh where `soft_cap` is None."""

    layer: nn.Module
    scale: float = 1.0  #: Cohere's `logit_scale`, 1 / `logits_scaling` of Granite
    soft_cap: float | None = None  #: Gemma 2 (arXiv 2408.00118, section 2)

    @property
    def is_plain_linear(self) -> bool:
        """Whether the layer is a matrix product with its weight at hand: not an adapter's, nor under ZeRO-3."""
        weight = getattr(self.layer, "weight", None)
        return type(self.layer) is nn.Linear and not hasattr(weight, "ds_id")

    @property
    def changes_logits(self) -> bool:
        """Whether anything comes after the layer."""
        return self.scale != 1.0 or self.soft_cap is not None

    def shape_(self, logits: Tensor) -> Tensor | None:
        """Scale and cap the layer's output in its own place; returns the derivative where it is no constant."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.soft_cap is None:
            return None
        logits.div_(self.soft_cap).tanh_()
        derivative = 1 - logits.square()
        logits.mul_(self.soft_cap)
        return derivative

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden [..., d] -> logits [..., vocabulary]."""
        logits = self.layer(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def find_output_head(causal: PreTrainedModel) -> OutputHead | None:
    """The head that the model's structure and configuration name; None where logits come in another way."""
    layer, config = causal.get_output_embeddings(), causal.config.get_text_config()
    if layer is None or causal.base_model is causal:
        return None
    scale = _number(config, "logit_scale") or 1 / (_number(config, "logits_scaling") or 1.0)
    return OutputHead(layer, scale, _number(config, "final_logit_softcapping"))


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else None
