"""ZeRO file and settings -> DeepSpeed's dict, as pure functions."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from trainer.config.batch_config import BatchConfig
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.config.files import parse_json, read_text_file

DS_CONFIG_DIR = Path(__file__).parent.parent.parent / "ds_configs"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedFile:
    """A ZeRO file that was read and checked."""

    name: str
    content: dict[str, Any]
    reason: str

    @property
    def stage(self) -> int:
        return int(self.content["zero_optimization"].get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        return _offload_device(self.content, "offload_optimizer") != "none"

    @property
    def offloads_params(self) -> bool:
        """Whether the weights do, between the moments when a layer needs them."""
        return _offload_device(self.content, "offload_param") != "none"


def _offload_device(content: dict[str, Any], key: str) -> str:
    return str((content["zero_optimization"].get(key) or {}).get("device", "none"))


def read_deepspeed_file(name: str, reason: str = "asked for") -> DeepSpeedFile:
    """One of `ds_configs/` by name, or a path; UserError names the file and the key for anything unknown or doubled."""
    path = DS_CONFIG_DIR / f"{name}.json" if name in DS_CONFIG_NAMES else Path(name)
    expected = f"{', '.join(DS_CONFIG_NAMES)} or a path to a JSON file"
    try:
        content = parse_json(read_text_file(path, f"--ds-config {path}", expected))
    except ValueError as error:
        raise UserError(f"--ds-config {path}: not JSON: {error}") from error
    if mistake := _find_mistake(content):
        raise UserError(f"--ds-config {path}: {mistake}")
    return DeepSpeedFile(name=name if name in DS_CONFIG_NAMES else path.stem, content=content, reason=reason)


def _find_mistake(content: Any) -> str:
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization"), dict):
        return "expected an object with the key zero_optimization"
    zero = content["zero_optimization"]
    if others := [key for key in content if key != "zero_optimization"]:
        return f"unknown key {others[0]}; batch, optimizer, precision and clipping come from the flags"
    if automatic := [key for key, value in zero.items() if value == "auto"]:
        return f'zero_optimization.{automatic[0]} is "auto"; give a value, nothing here fills it in'
    stage = zero.get("stage", 0)
    if stage not in range(4):
        return f"zero_optimization.stage {stage}: expected 0, 1, 2 or 3"
    if zero.get("round_robin_gradients"):
        return "zero_optimization.round_robin_gradients: a checkpoint would hold the values of other parameters"
    if arguments := {"self", "strict"} & set(zero):  # of the constructor below
        return f"unknown key zero_optimization.{min(arguments)}"
    try:
        import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's
        details = cast(Any, error).errors()[0]
        key_path = ".".join(map(str, ("zero_optimization", *details["loc"])))
        if details["type"] == "extra_forbidden":
            return f"unknown key {key_path}, or a second name for a key that is set already"
        value = "" if isinstance(details["input"], dict) else f" {json.dumps(details['input'])}"
        return f"{key_path}{value}: {details['msg'][:1].lower()}{details['msg'][1:]}"
    for key, min_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _offload_device(content, key)
        if device not in ("none", "cpu"):
            return f"zero_optimization.{key}.device {device}: expected cpu or none"
        if device == "cpu" and stage < min_stage:
            return f"zero_optimization.{key} needs stage {min_stage} or more, not {stage}"
    if zero.get("overlap_comm") and stage < 2:
        return f"zero_optimization.overlap_comm true needs stage 2 or 3, not {stage}; take it out"
    return ""


def build_deepspeed_config(
    deepspeed_file: DeepSpeedFile, *, batch: BatchConfig, max_grad_norm: float, precision: str
) -> dict[str, Any]:
    """DeepSpeed's whole configuration, pure: the ZeRO file and what the settings say; no key comes from both."""
    config: dict[str, Any] = {
        **deepspeed_file.content,
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": 1,  # never divides: the loss is already divided by the global batch's tokens
        "managed_gradient_accumulation": False,  # step() is the boundary, also after a short last group
        # Left out means 1.0; stage 0 is clipped where it is measured.
        "gradient_clipping": max_grad_norm if deepspeed_file.stage else 0.0,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device at each forward and step
    }
    if deepspeed_file.stage:
        # Otherwise offload wants DeepSpeed's own Adam, other numbers and a compiler.
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if precision == "fp16":
        config["fp16"] = {"enabled": True}
    return config
