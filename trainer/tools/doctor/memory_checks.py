"""Memory per rank under every ZeRO file, before anything runs, against what the device has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.distributed.deepspeed_config import DeepSpeedFile, read_deepspeed_file
from trainer.distributed.memory_estimate import MemoryEstimate, ModelDims, Workload
from trainer.model.build import load_config
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, format_bytes, make_result, ok_result
from trainer.training.memory_check import (
    available_bytes,
    build_workload,
    estimate_plan,
    free_host_bytes,
    required_bytes,
)
from trainer.training.run_plan import RunPlan

TIGHT_SHARE = 0.9  # of the memory; above it the allocator's gaps may not fit


@dataclass(frozen=True, kw_only=True)
class MemoryEstimateRow:
    """One ZeRO file and what a rank would hold under it."""

    name: str
    is_chosen: bool
    estimate: MemoryEstimate
    device_bytes: float  #: bytes on the device (on processors: of memory), all in all
    host_bytes: float  #: bytes of the host's memory beside them, where there is a GPU
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values, bytes."""
        state_memory = self.estimate.model_states
        return {
            "ds_config": self.name, "chosen": self.is_chosen, "fits": self.fits, "weights": state_memory.weights,
            "gradients": state_memory.gradients, "optimizer": state_memory.optimizer,
            "activations": self.estimate.activations,
            "logits": self.estimate.logits, "gathered": self.estimate.gathered, "peak": self.device_bytes,
            "host": self.host_bytes,
        }  # fmt: skip


def build_memory_table(plan: RunPlan, row_length: int) -> list[MemoryEstimateRow]:
    """Every ZeRO file of this program, and the plan's own where that is another."""
    deepspeed_files = [read_deepspeed_file(name) for name in DS_CONFIG_NAMES]
    deepspeed_files += [plan.deepspeed_file] if plan.deepspeed_file.name not in DS_CONFIG_NAMES else []
    return [
        _build_row(plan, deepspeed_file, build_workload(plan, row_length), available_bytes(plan))
        for deepspeed_file in deepspeed_files
    ]


def _build_row(
    plan: RunPlan, deepspeed_file: DeepSpeedFile, workload: Workload, limit_bytes: float
) -> MemoryEstimateRow:
    rank_estimate = estimate_plan(plan, deepspeed_file, workload)
    device_bytes, host_bytes = required_bytes(plan, rank_estimate)
    fits = device_bytes <= limit_bytes and host_bytes <= free_host_bytes(plan)
    return MemoryEstimateRow(
        name=deepspeed_file.name,
        is_chosen=deepspeed_file.name == plan.deepspeed_file.name,
        estimate=rank_estimate,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        fits=fits,
    )


def check_memory(plan: RunPlan, table: list[MemoryEstimateRow]) -> Iterator[CheckResult]:
    """Whether the chosen file fits, and what would, where it does not."""
    chosen_row = next(row for row in table if row.is_chosen)
    limit_bytes = available_bytes(plan)
    capacity_name = (
        "a GPU"
        if plan.dist_context.device.type == "cuda"
        else f"free memory for each of {plan.dist_context.local_world_size}"
    )
    message = (
        f"{chosen_row.name}: {format_bytes(chosen_row.device_bytes)} at most, {format_bytes(limit_bytes)} "
        f"{capacity_name}"
    )
    fitting_names = [row.name for row in table if row.fits]
    remedy = (
        f"--ds-config {fitting_names[0]} would fit"
        if fitting_names
        else "lower --micro-batch, pass --activation-checkpointing, or take --mode lora or a smaller model"
    )
    if not chosen_row.fits:
        yield CheckResult(
            level=ERROR, name="memory", message=message, remedy=f"{remedy}; --micro-batch 1 needs the least"
        )
        return
    yield make_result(
        chosen_row.device_bytes > TIGHT_SHARE * limit_bytes,
        WARNING,
        "memory",
        message,
        "lower --micro-batch: so close to the limit it may not fit",
    )
    largest_part = max(
        (("activations", chosen_row.estimate.activations), ("logits", chosen_row.estimate.logits),
         ("weights", chosen_row.estimate.model_states.weights),
         ("optimizer state", chosen_row.estimate.model_states.optimizer)),
        key=lambda part: part[1],
    )  # fmt: skip
    yield ok_result("largest", f"{largest_part[0]}, {format_bytes(largest_part[1])}")
    if not ModelDims.from_config(load_config(plan.settings.model)).is_gpt2:
        yield ok_result(
            "formula", "made for GPT-2; this model is counted as if it were one, take it for an order of size"
        )
