"""Memory per rank under every ZeRO file, before anything runs, against what the device has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from trainer import engine, memory
from trainer.doctor.checks import ERROR, WARNING, Check, fine, judged, size
from trainer.engine import ZeroFile, read_zero_file
from trainer.loss import LARGEST_LOGITS
from trainer.memory import Counts, Estimate, Load, Shape
from trainer.model import load_config
from trainer.plan import Plan
from trainer.settings import DS_NAMES

TIGHT = 0.9  # of the memory; above it the allocator's gaps may not fit
PROGRAM = 700 * 2**20  # bytes; what a rank on a processor holds before it has a model: Python, torch, DeepSpeed


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


def load_of(plan: Plan, width: int, *, micro: int | None = None) -> Load:
    """What a rank of the plan feeds in one forward; `width`: tokens of the longest row."""
    settings, lora = plan.settings, plan.settings.mode == "lora"
    micro = micro or plan.course.batch.micro
    return Load(
        rows=micro, width=width, accumulation=plan.course.batch.global_batch // (micro * plan.world.size),
        precision=plan.precision, gpu=plan.world.device.type == "cuda", dropout=plan.dropout,
        adapter_rank=settings.lora.rank if lora else 0, adapter_dropout=settings.lora.dropout,
        adapted=tuple(plan.model["lora_targets"]), largest_logits=LARGEST_LOGITS,
    )  # fmt: skip


def estimate(plan: Plan, zero: ZeroFile, load: Load) -> Estimate:
    """The formula's answer for a rank of this plan under a ZeRO file."""
    return memory.estimate(
        Shape.of(load_config(plan.settings.model)), Counts.of(plan.model), load, stage=zero.stage,
        ranks=plan.world.size, optimizer_on_host=zero.optimizer_on_host, weights_on_host=zero.weights_on_host,
    )  # fmt: skip


def available(plan: Plan) -> float:
    """Bytes that one rank may use: its GPU's, or its share of the memory that is free now."""
    whole = engine.device_memory(plan.world.device)
    return float(whole) if whole is not None else psutil.virtual_memory().available / plan.world.local_size


def rows(plan: Plan, width: int) -> list[Row]:
    """Every ZeRO file of this program, and the plan's own where that is another."""
    files = [read_zero_file(name) for name in DS_NAMES]
    files += [plan.zero] if plan.zero.name not in DS_NAMES else []
    return [_row(plan, zero, load_of(plan, width), available(plan)) for zero in files]


def _row(plan: Plan, zero: ZeroFile, load: Load, limit: float) -> Row:
    made = estimate(plan, zero, load)
    gpu = load.gpu
    device = made.peak + (memory.CONTEXT if gpu else PROGRAM + made.state.host)
    host = made.state.host if gpu else 0.0
    fits = device <= limit and host <= psutil.virtual_memory().available / plan.world.local_size
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
        else "lower --micro-batch, or take --mode lora or a smaller model"
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
