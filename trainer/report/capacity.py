"""Whether adapters can hold what the data teach: a rule of thumb, for an expectation before or beside a measurement.

Trained weights store about two bits of knowledge each (Allen-Zhu and Li, arXiv 2404.05405, measured on synthetic facts
in whole models); the training targets carry at most their first-epoch loss in bits, the length of their code while the
model learns them. "LoRA Without Regret" (Thinking Machines, 2025) uses the two so: below capacity LoRA keeps up with
full fine-tuning, above it its curve falls behind.
"""

import math
from dataclasses import dataclass

BITS_PER_PARAMETER = 2.0
SOURCE = "rule of thumb: 2 bits a trained weight, arXiv 2404.05405, as in LoRA Without Regret"


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What `num_trained` weights hold beside what `num_targets` tokens at `first_epoch_loss` (nats) carry, in bits."""

    num_trained: int
    num_targets: int
    first_epoch_loss: float
    lora_rank: int | None = None  #: of the adapters, None where their weights do not grow with one

    @property
    def weight_bits(self) -> float:
        """What the trained weights can hold."""
        return BITS_PER_PARAMETER * self.num_trained

    @property
    def data_bits(self) -> float:
        """What the training targets carry at most."""
        return self.first_epoch_loss / math.log(2) * self.num_targets

    def describe(self, other_rank: int = 32) -> str:
        """`adapters hold 0.2 Mbit, the data 3.1 Mbit: expect a plateau; rank 32 holds 0.8 (rule of thumb: ...)`."""
        is_enough = self.weight_bits >= self.data_bits
        expectation = "no plateau for want of weights is expected" if is_enough else "expect a plateau"
        line = f"adapters hold {_mbit(self.weight_bits)} Mbit, the data {_mbit(self.data_bits)} Mbit: {expectation}"
        if self.lora_rank and other_rank > self.lora_rank and not is_enough:
            line += f"; rank {other_rank} holds {_mbit(self.weight_bits * other_rank / self.lora_rank)}"
        return f"{line} ({SOURCE})"


def _mbit(bits: float) -> str:
    """Millions of bits with one digit behind the point, two significant ones where that would be 0."""
    return f"{bits / 1e6:,.1f}" if bits >= 1e5 else f"{bits / 1e6:.2g}"
