"""Memory per rank under every ZeRO file, before anything runs, against what the device has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.distributed.deepspeed_config import DeepSpeedFile, read_deepspeed_file
from trainer.distributed.memory_estimate import MemoryEstimate
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, format_bytes, make_result, ok_result
from trainer.training.memory_check import available_bytes, estimate_plan, free_host_bytes, required_bytes
from trainer.training.run_plan import RunPlan

TIGHT_SHARE = 0.9  # of the memory; above it the allocator's gaps may not fit


@dataclass(frozen=True, kw_only=True)
class MemoryEstimateRow:
    """One ZeRO file and what a rank would hold under it."""

    name: str
    is_chosen: bool
    estimate: MemoryEstimate
    device_bytes: float  #: bytes on the device (for a CPU rank: of memory), all in all
    host_bytes: float  #: bytes of the host's memory beside them, where there is a GPU
    fits: bool

    def as_json(self) -> dict[str, Any]:
        """Plain values, bytes."""
        states = self.estimate.model_states
        return {
            "ds_config": self.name, "chosen": self.is_chosen, "fits": self.fits, "weights": states.weights,
            "gradients": states.gradients, "optimizer": states.optimizer, "activations": self.estimate.activations,
            "passing": self.estimate.passing, "gathered": self.estimate.gathered, "peak": self.device_bytes,
            "host": self.host_bytes,
        }  # fmt: skip


def build_memory_table(plan: RunPlan, row_length: int) -> list[MemoryEstimateRow]:
    """Every ZeRO file of this program, and the plan's own where that is another."""
    deepspeed_files = [read_deepspeed_file(name) for name in DS_CONFIG_NAMES]
    deepspeed_files += [plan.deepspeed_file] if plan.deepspeed_file.name not in DS_CONFIG_NAMES else []
    return [_build_row(plan, deepspeed_file, row_length) for deepspeed_file in deepspeed_files]


def _build_row(plan: RunPlan, deepspeed_file: DeepSpeedFile, row_length: int) -> MemoryEstimateRow:
    estimate = estimate_plan(plan, deepspeed_file, row_length)
    device_bytes, host_bytes = required_bytes(plan, estimate)
    return MemoryEstimateRow(
        name=deepspeed_file.name, is_chosen=deepspeed_file.name == plan.deepspeed_file.name, estimate=estimate,
        device_bytes=device_bytes, host_bytes=host_bytes,
        fits=device_bytes <= available_bytes(plan) and host_bytes <= free_host_bytes(plan),
    )  # fmt: skip


def check_memory(plan: RunPlan, table: list[MemoryEstimateRow]) -> Iterator[CheckResult]:
    """Whether the chosen file fits, and what would, where it does not."""
    chosen = next(row for row in table if row.is_chosen)
    limit_bytes, is_gpu = available_bytes(plan), plan.dist_context.device.type == "cuda"
    capacity = "a GPU" if is_gpu else f"free memory for each of {plan.dist_context.local_world_size}"
    message = f"{chosen.name}: {format_bytes(chosen.device_bytes)} at most, {format_bytes(limit_bytes)} {capacity}"
    if not chosen.fits:
        fitting = next((row.name for row in table if row.fits), None)
        remedy = "lower --micro-batch, pass --activation-checkpointing, or take --mode lora or a smaller model"
        remedy = f"--ds-config {fitting} would fit" if fitting else remedy
        yield CheckResult(ERROR, "memory", message, f"{remedy}; --micro-batch 1 needs the least")
        return
    yield make_result(
        chosen.device_bytes > TIGHT_SHARE * limit_bytes, WARNING, "memory", message,
        "lower --micro-batch: so close to the limit it may not fit",
    )  # fmt: skip
    estimate = chosen.estimate
    parts = {
        "activations": estimate.activations, "logits, products and gradients in passing": estimate.passing,
        "weights": estimate.model_states.weights, "optimizer state": estimate.model_states.optimizer,
    }  # fmt: skip
    name, num_bytes = max(parts.items(), key=lambda part: part[1])
    yield ok_result("largest", f"{name}, {format_bytes(num_bytes)}")
