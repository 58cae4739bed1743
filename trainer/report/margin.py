"""How much worse than full is still good enough: the margin of a comparison and of a study."""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from trainer.config.errors import UserError
from trainer.report.paired_interval import Matrix, margin_contrast

if TYPE_CHECKING:
    from trainer.report.record_losses import MatchedLosses

MarginKind = Literal["share", "nats", "bits_per_byte"]
#: (suffix, kind, what a number with it is multiplied by, and must stay under)
_UNITS: tuple[tuple[str, MarginKind, float, float], ...] = (
    ("%", "share", 0.01, 100),
    ("nats", "nats", 1.0, math.inf),
    ("bpb", "bits_per_byte", 1.0, math.inf),
)


@dataclass(frozen=True, kw_only=True)
class Margin:
    """A share of what full gained over the base, nats per token, or bits per byte."""

    kind: MarginKind = "share"
    value: float = 0.02

    def describe(self, gained: float | None = None) -> str:
        """`2 % of what full gained (0.0400)`; `gained` in nats per token, None where unknown."""
        if self.kind == "share":
            amount = "" if gained is None else f" ({self.value * gained:.4f})"
            return f"{100 * self.value:g} % of what full gained{amount}"
        return f"{self.value:g} {'nats per token' if self.kind == 'nats' else 'bits per byte'}"

    def why_not(self, losses: "MatchedLosses") -> str:
        """Why these losses cannot be held against it, "" where they can."""
        if self.kind == "share" and losses.base is None:
            return "the base's losses of these records are not there"
        if self.kind == "bits_per_byte" and not losses.has_bytes:
            return "the bytes of these records are not known; give the margin in nats"
        return ""

    def contrast(self, losses: "MatchedLosses") -> Matrix:
        """LoRA's excess beyond the margin in nats, (seeds, units): below 0 is inside. `why_not` must have no reason."""
        if self.kind == "share":  # what full gained is an estimate too: its error is part of the contrast
            assert losses.base is not None
            return margin_contrast(losses.lora, losses.full, losses.base, self.value)
        allowed = self.value * (losses.targets if self.kind == "nats" else np.log(2) * losses.num_bytes)
        return np.asarray(losses.lora - losses.full - allowed, dtype=np.float64)


def parse_margin(text: str) -> Margin:
    """A number above 0 with its unit, as `2%`, `0.01nats` or `0.005bpb`; UserError otherwise."""
    for suffix, kind, factor, limit in _UNITS:
        number = text.removesuffix(suffix).rstrip()
        if number != text and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", number) and 0 < float(number) < limit:
            return Margin(kind=kind, value=float(number) * factor)
    raise UserError(f"--margin {text}: expected a number above 0 and its unit, such as 2%, 0.01nats or 0.005bpb")
