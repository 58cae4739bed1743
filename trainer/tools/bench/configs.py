"""What is measured: one program at one setting; needs no torch."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import DS_NAMES, MODES, PRECISIONS

PEERS = {
    "plain": "a plain PyTorch loop: the model's own loss, clip, fused AdamW",
    "hf": "Hugging Face Trainer, its defaults and the same numbers",
    "hf-compile": "the same with torch_compile",
    "hf-deepspeed": "the same through DeepSpeed with the ZeRO file",
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of the table."""

    program: str  #: ours, or one of PEERS
    mode: str
    batch: int  #: examples per step over all ranks
    zero: str | None  #: the ZeRO file; None: the program's own choice
    ranks: int = 1
    model: str = "gpt2"
    block_size: int = 1024
    precision: str = "fp32"
    device: str = "cpu"
    dropout: float | None = None  #: None: the model's own
    compile: str = "off"  #: of ours: whether its steps are compiled
    windows: int = 5  #: timed windows
    window: int = 4  #: steps of one window
    warmup: int = 3  #: steps before the first window

    @property
    def name(self) -> str:
        """As the table prints it."""
        parts = [self.program, self.zero, f"{self.ranks} ranks" if self.ranks > 1 else None, self.precision]
        return " ".join(part for part in (*parts, "compiled" if self.compile == "on" else None) if part)

    @property
    def steps(self) -> int:
        """Optimizer steps that it runs."""
        return self.warmup + self.windows * self.window

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.block_size

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a job or a result file."""
        return dataclasses.asdict(self)


def variants(
    *, modes: Sequence[str], batches: Sequence[int], zero: Sequence[str], against: Sequence[str], ranks: Sequence[int],
    precisions: Sequence[str] = ("fp32",), compiles: Sequence[str] = ("off",), common: Mapping[str, Any],
) -> list[Variant]:  # fmt: skip
    """Every combination, ours first within each mode and batch. UserError on a wrong name.

    Peers run on one rank and in the first precision.
    """
    _known("--precision", precisions, PRECISIONS)
    _known("--compile", compiles, ("on", "off"))
    _known("--modes", modes, MODES)
    _known("--ds", zero, DS_NAMES)
    _known("--against", against, tuple(PEERS))
    for number in (*batches, *ranks):
        if number < 1:
            raise UserError(f"--batches and --ranks: expected whole numbers from 1, got {number}")
    found = []
    for mode in modes:
        for batch in batches:
            if uneven := [n for n in ranks if batch % n]:
                raise UserError(f"--batches {batch}: does not divide over {uneven[0]} ranks")
            found += [
                Variant(
                    program="ours", mode=mode, batch=batch, zero=name, ranks=n, precision=precision, compile=compiled,
                    **common,
                )
                for precision, n, name, compiled in itertools.product(precisions, ranks, zero, compiles)
            ]  # fmt: skip
            for program in against:
                files = zero if program == "hf-deepspeed" else [None]
                found += [
                    Variant(program=program, mode=mode, batch=batch, zero=name, precision=precisions[0], **common)
                    for name in files
                ]
    return found


def _known(flag: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{flag} {name}: expected {', '.join(known)}")


def flops_per_token(*, mode: str, parameters: int, trainable: int, layers: int, width: int, block_size: int) -> float:
    """Floating-point operations that one token of training needs: PaLM, appendix B (arXiv 2204.02311).

    Every weight: 6 N + 12 L d T, for forward, and backward to activations and weights. With frozen weights the third
    of it that makes their gradients falls away: 4 N + 6 N_trainable + 12 L d T.
    """
    attention = 12 * layers * width * block_size
    return (6 * parameters if mode == "full" else 4 * parameters + 6 * trainable) + attention
