"""Memory per rank under every ZeRO file, before anything runs, against what the device has."""

from collections.abc import Iterator
from typing import Any

from trainer.config.choices import DS_CONFIG_NAMES
from trainer.distributed.deepspeed_config import DeepSpeedFile, read_deepspeed_file
from trainer.tools.doctor.check_result import ERROR, WARNING, CheckResult, format_bytes, make_result, ok_result
from trainer.training.memory_check import available_bytes, estimate_plan, free_host_bytes, required_bytes
from trainer.training.run_plan import RunPlan

TIGHT_SHARE = 0.9  # of the memory; above it the allocator's gaps may not fit


def build_memory_table(plan: RunPlan, row_length: int) -> list[dict[str, Any]]:
    """A row for every ZeRO file of this program, and the plan's own where that is another; bytes of a rank.

    `peak`: on the device (for a CPU rank: of memory), all in all; `host`: beside them, where there is a GPU.
    """
    deepspeed_files = [read_deepspeed_file(name) for name in DS_CONFIG_NAMES]
    deepspeed_files += [plan.deepspeed_file] if plan.deepspeed_file.name not in DS_CONFIG_NAMES else []
    return [_build_row(plan, deepspeed_file, row_length) for deepspeed_file in deepspeed_files]


def _build_row(plan: RunPlan, deepspeed_file: DeepSpeedFile, row_length: int) -> dict[str, Any]:
    estimate = estimate_plan(plan, deepspeed_file, row_length)
    device_bytes, host_bytes = required_bytes(plan, estimate)
    states = estimate.model_states
    return {
        "ds_config": deepspeed_file.name,
        "chosen": deepspeed_file.name == plan.deepspeed_file.name,
        "fits": device_bytes <= available_bytes(plan) and host_bytes <= free_host_bytes(plan),
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations": estimate.activations,
        "passing": estimate.passing,
        "gathered": estimate.gathered,
        "peak": device_bytes,
        "host": host_bytes,
    }


def check_memory(plan: RunPlan, table: list[dict[str, Any]]) -> Iterator[CheckResult]:
    """Whether the chosen file fits, and what would, where it does not."""
    chosen = next(row for row in table if row["chosen"])
    limit_bytes, is_gpu = available_bytes(plan), plan.dist_context.device.type == "cuda"
    capacity = "a GPU" if is_gpu else f"free memory for each of {plan.dist_context.local_world_size}"
    message = f"{chosen['ds_config']}: {format_bytes(chosen['peak'])} at most, {format_bytes(limit_bytes)} {capacity}"
    if not chosen["fits"]:
        fitting = next((row["ds_config"] for row in table if row["fits"]), None)
        remedy = "lower --micro-batch, pass --activation-checkpointing, or take --mode lora or a smaller model"
        remedy = f"--ds-config {fitting} would fit" if fitting else remedy
        yield CheckResult(ERROR, "memory", message, f"{remedy}; --micro-batch 1 needs the least")
        return
    yield make_result(
        chosen["peak"] > TIGHT_SHARE * limit_bytes,
        WARNING,
        "memory",
        message,
        "lower --micro-batch: so close to the limit it may not fit",
    )
    parts = {
        "activations": "activations",
        "passing": "logits, products and gradients in passing",
        "weights": "weights",
        "optimizer": "optimizer state",
    }
    largest = max(parts, key=chosen.__getitem__)
    yield ok_result("largest", f"{parts[largest]}, {format_bytes(chosen[largest])}")
