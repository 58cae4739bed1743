"""What adapters, packing and optimizer mean for a run, in words."""

from typing import Any

from trainer.config.settings import Settings
from trainer.model import optimizer


def describe_targets(settings: Settings, model_info: dict[str, Any]) -> str:
    """Of a plan's line on what trains: which layers have adapters, and what else is trained."""
    if not model_info["lora_targets"]:
        return ", every weight"
    adapter = "" if settings.lora.adapter == "lora" else f"{settings.lora.adapter} "
    saved_modules = f", and {', '.join(settings.lora.modules_to_save)}" if settings.lora.modules_to_save else ""
    return f", {adapter}adapters on {', '.join(model_info['lora_targets'])}{saved_modules}"


def collect_notes(settings: Settings, model_info: dict[str, Any]) -> list[str]:
    """What the adapters, the packing and the optimizer mean for this model, where that is worth a line."""
    notes = []
    lora_flags = [flag for flag in settings.overridden if flag.startswith("--lora-")]
    if lora_flags and settings.mode == "full":
        notes.append(f"{', '.join(lora_flags)}: of no effect with --mode full")
    if settings.mode == "lora" and settings.lora.plus_ratio != 1:
        notes.append(f"LoRA+: B matrices learn at {settings.lora.plus_ratio:g} times the learning rate")
    if not_adapted := model_info.get("not_adapted"):
        notes.append(f"{', '.join(not_adapted)}: the experts' matrices are one tensor and get no adapter")
    if settings.model.quant:
        double_quant = ", scales in 8 bits" if settings.model.quant_double else ""
        notes.append(
            f"base in {settings.model.quant}{double_quant}: {model_info['frozen_bytes'] / 2**20:,.1f} MiB of frozen "
            f"weights; in float32 {model_info['parameters'] / 2**18:,.1f} MiB"
        )
    fp32_moments = model_info.get("kept_in_32_bits")
    if fp32_moments and fp32_moments["kept_tensors"]:
        fraction = fp32_moments["kept_parameters"] / fp32_moments["parameters"]
        notes.append(
            f"{settings.train.optim}: {fp32_moments['kept_tensors']} of {fp32_moments['tensors']} trained tensors "
            f"({fraction:.0%} of the parameters) are embeddings or under {optimizer.MIN_8BIT_SIZE:,} elements: their "
            "moments stay in 32 bits and nothing is saved"
        )
    return notes
