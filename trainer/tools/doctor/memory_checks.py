"""Memory per rank under every ZeRO file, before anything runs, against what the device has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import DS_NAMES
from trainer.distributed.deepspeed_config import ZeroFile, read_zero_file
from trainer.distributed.memory_estimate import Estimate, Load, Shape
from trainer.model.build import load_config
from trainer.tools.doctor.check_result import ERROR, WARNING, Check, fine, judged, size
from trainer.training.memory_check import available, estimate, free_host, load_of, needed
from trainer.training.run_plan import Plan

TIGHT = 0.9  # of the memory; above it the allocator's gaps may not fit


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ZeRO file and what a rank would hold under it."""

    name: str
    chosen: bool
    estimate: Estimate
    device: float  #: bytes on the device (on processors: of memory), all in all
    host: float  #: bytes of the host's memory beside them, where there is a GPU
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values, bytes."""
        held = self.estimate.state
        return {
            "ds_config": self.name, "chosen": self.chosen, "fits": self.fits, "weights": held.weights,
            "gradients": held.gradients, "optimizer": held.optimizer, "activations": self.estimate.activations,
            "logits": self.estimate.logits, "gathered": self.estimate.gathered, "peak": self.device, "host": self.host,
        }  # fmt: skip


def rows(plan: Plan, width: int) -> list[Row]:
    """Every ZeRO file of this program, and the plan's own where that is another."""
    files = [read_zero_file(name) for name in DS_NAMES]
    files += [plan.zero] if plan.zero.name not in DS_NAMES else []
    return [_row(plan, zero, load_of(plan, width), available(plan)) for zero in files]


def _row(plan: Plan, zero: ZeroFile, load: Load, limit: float) -> Row:
    made = estimate(plan, zero, load)
    device, host = needed(plan, made)
    fits = device <= limit and host <= free_host(plan)
    return Row(name=zero.name, chosen=zero.name == plan.zero.name, estimate=made, device=device, host=host, fits=fits)


def check(plan: Plan, table: list[Row]) -> Iterator[Check]:
    """Whether the chosen file fits, and what would, where it does not."""
    chosen = next(row for row in table if row.chosen)
    limit = available(plan)
    what = "a GPU" if plan.world.device.type == "cuda" else f"free memory for each of {plan.world.local_size}"
    found = f"{chosen.name}: {size(chosen.device)} at most, {size(limit)} {what}"
    fitting = [row.name for row in table if row.fits]
    remedy = (
        f"--ds-config {fitting[0]} would fit"
        if fitting
        else "lower --micro-batch, pass --checkpoint-activations, or take --mode lora or a smaller model"
    )
    if not chosen.fits:
        yield Check(level=ERROR, what="memory", found=found, remedy=f"{remedy}; --micro-batch 1 needs the least")
        return
    yield judged(
        chosen.device > TIGHT * limit,
        WARNING,
        "memory",
        found,
        "lower --micro-batch: so close to the limit it may not fit",
    )
    biggest = max(
        (("activations", chosen.estimate.activations), ("logits", chosen.estimate.logits),
         ("weights", chosen.estimate.state.weights), ("optimizer state", chosen.estimate.state.optimizer)),
        key=lambda part: part[1],
    )  # fmt: skip
    yield fine("largest", f"{biggest[0]}, {size(biggest[1])}")
    if not Shape.of(load_config(plan.settings.model)).exact:
        yield fine("formula", "made for GPT-2; this model is counted as if it were one, take it for an order of size")
