"""Whether a faster forward and backward gives what the eager one gave on the same rows, with the same dropout masks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, compress

import torch
from torch import Tensor

# Relative differences between a faster call and the eager one of the same rows. Replayed kernels are the same, but
# some add in any order (atomics), and a compiler adds in another: float32 rounds sums of some thousand terms to about
# 1e-6; of bf16 the outputs differ by one of 2**-8, and the gradients' elements from those of fp32 by 4e-3 to 7e-3 (seen
# on a CPU, GPT-2 of 2 to 12 layers; as much between eager and compiled steps).
MAX_DIFFERENCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 5e-3}
NUM_SAMPLES = 64  # elements of each gradient that are compared one by one
# Of the whole gradient; a smaller one may be nothing but rounding, as that of OPT's key bias, which is 0 by its formula
# (1e-8 of the whole in bf16): its norm alone is compared.
MIN_SAMPLED_SHARE = 1e-4


@dataclass(frozen=True)
class Measured:
    """What a call is compared by: its loss, every gradient's norm, and some elements of each over its mean size."""

    loss: float
    grad_norm: float
    grad_norms: tuple[float, ...]
    samples: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, row_losses: Tensor, grads: Sequence[Tensor | None]) -> "Measured":
        """Of row losses [rows] and gradients; waits for the device."""
        present = [gradient for gradient in grads if gradient is not None]
        norms = [float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) for gradient in present]
        samples = []
        for gradient, norm in zip(present, norms, strict=True):
            root_mean_square = norm / math.sqrt(gradient.numel()) or 1.0
            elements = gradient.detach().flatten()[:: max(1, gradient.numel() // NUM_SAMPLES)][:NUM_SAMPLES]
            samples.append(tuple((elements.double() / root_mean_square).tolist()))
        return cls(float(row_losses.double().sum()), math.hypot(*norms), tuple(norms), tuple(samples))

    @property
    def is_finite(self) -> bool:
        """Whether there is anything to compare with."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def relative_difference(self, other: "Measured") -> float:
        """The largest of three: of the losses, of a gradient's norm over that of all, and of the sampled elements as
        vectors; NaN where one is, infinity where the other has not the same gradients.

        Of the sampled elements each rounds its own: what counts is how far both are from their middle.
        """
        if list(map(len, self.samples)) != list(map(len, other.samples)):
            return math.inf
        scale = self.grad_norm or 1.0
        is_sampled = [norm >= MIN_SAMPLED_SHARE * scale for norm in self.grad_norms]
        own, others = (list(chain(*compress(measured.samples, is_sampled))) for measured in (self, other))
        pairs = zip(self.grad_norms, other.grad_norms, strict=True)
        differences = [
            abs(self.loss - other.loss) / (abs(self.loss) or 1.0),
            *(abs(a - b) / scale for a, b in pairs),
            math.dist(own, others) / 2 / (math.hypot(*own) or 1.0),
        ]
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def __str__(self) -> str:
        return f"loss {self.loss:.6g} and gradient norm {self.grad_norm:.6g}"


def root_cause(error: BaseException) -> str:
    """The first line of the operation that failed: what ends after it, as a capture does, complains of it, too."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0] or type(error).__name__


def get_rng_state(device: torch.device) -> Tensor:
    """Where the device's generator stands."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Put the device's generator there."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


@contextmanager
def unchanged_rng(device: torch.device) -> Iterator[None]:
    """Leave the generator as it was found: what is drawn inside is drawn again afterwards."""
    state = get_rng_state(device)
    try:
        yield
    finally:
        set_rng_state(device, state)
