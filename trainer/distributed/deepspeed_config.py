"""ZeRO file and settings -> DeepSpeed's dict, as pure functions."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.config.batch_config import BatchConfig
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.config.errors import UserError
from trainer.config.files import parse_json, read_text_file

DS_CONFIG_DIR = Path(__file__).parent.parent.parent / "ds_configs"

_ALLOWED_KEYS = ("zero_optimization", "communication_data_type", "comms_logger", "wall_clock_breakdown", "aio")
_REFUSED_KEYS = {
    "prescale_gradients": "it scales the gradients, which are already the mean over the global batch",
    "gradient_predivide_factor": "it scales the gradients, which are already the mean over the global batch",
    "round_robin_gradients": "it returns other parameters' values when the full state is read for a checkpoint",
}


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
    with contextlib.suppress(PermissionError):  # of its folder; reading it says so
        if not path.exists():
            known = ", ".join(DS_CONFIG_NAMES)
            raise UserError(f"--ds-config {name}: no such file; pass {known} or a path to a JSON file")
    try:
        text = read_text_file(path, f"--ds-config {path}", "a JSON file of DeepSpeed")
        content = parse_json(text)
    except ValueError as error:
        raise UserError(f"--ds-config {path}: not JSON: {error}") from error
    content = _without_auto(content)
    if mistake := next(_find_mistakes(content), None):
        raise UserError(f"--ds-config {path}: {mistake}")
    return DeepSpeedFile(name=name if name in DS_CONFIG_NAMES else path.stem, content=content, reason=reason)


def _without_auto(content: Any) -> Any:
    """A file for transformers without what is "auto" there: it comes from the flags here, or is left to DeepSpeed."""

    def is_auto(key: str, value: Any) -> bool:
        block = value if isinstance(value, dict) else {}
        values = [v for path, v in _walk_keys(block) if path.startswith("params.")]
        is_adamw = key == "optimizer" and block.get("type") == "AdamW" and all(v == "auto" for v in values)
        return value == "auto" or block.get("enabled") == "auto" or is_adamw

    if not (isinstance(content, dict) and isinstance(content.get("zero_optimization"), dict)):
        return content
    zero = {key: value for key, value in content["zero_optimization"].items() if value != "auto" or key == "stage"}
    rest = {key: value for key, value in content.items() if not is_auto(key, value) and key != "steps_per_print"}
    return rest | {"zero_optimization": zero}


def _find_mistakes(content: Any) -> Iterator[str]:
    """What is wrong with a file's content; the first is what to say, those after it may follow from it."""
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization"), dict):
        yield "expected an object with the key zero_optimization"
        return
    for key_path, value in _walk_keys(content):
        key = key_path.rpartition(".")[2]
        if value == "auto":
            yield f'{key_path} is "auto"; give a value, nothing here fills it in'
        if key in _REFUSED_KEYS:
            yield f"{key_path} is refused: {_REFUSED_KEYS[key]}"
    for key in content:
        if key not in _ALLOWED_KEYS:
            known = ", ".join(_ALLOWED_KEYS)
            yield f"unknown key {key}; known are {known}; batch, optimizer, precision and clipping come from the flags"
    for key, is_right, expected in (
        ("comms_logger", isinstance(content.get("comms_logger", {}), dict), "an object"),
        ("aio", isinstance(content.get("aio", {}), dict), "an object"),
        ("wall_clock_breakdown", isinstance(content.get("wall_clock_breakdown", False), bool), "true or false"),
        (
            "communication_data_type",
            content.get("communication_data_type") in (None, "fp16", "bf16", "fp32"),
            "fp16, bf16 or fp32",
        ),
    ):
        if not is_right:
            yield f"{key} {json.dumps(content[key])}: expected {expected}"
    zero = content["zero_optimization"]
    stage = zero.get("stage", 0)
    if stage not in range(4):
        yield f"zero_optimization.stage {stage}: expected 0, 1, 2 or 3"
    if argument := next((key for key in ("self", "strict") if key in zero), None):  # of the constructor below
        yield f"unknown key zero_optimization.{argument}"
    try:
        import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's
        details: Any = error
        details = details.errors()[0]
        key_path = ".".join(map(str, ("zero_optimization", *details["loc"])))
        if details["type"] == "extra_forbidden":
            yield f"unknown key {key_path}, or a second name for a key that is set already"
        value = "" if isinstance(details["input"], dict) else f" {json.dumps(details['input'])}"
        yield f"{key_path}{value}: {details['msg'][:1].lower()}{details['msg'][1:]}"
    if stage == 0 and (others := [key for key in content if key != "zero_optimization"]):
        yield f"{others[0]} is without effect under stage 0; take it out, or use stage 1"
    for key, min_stage in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _offload_device(content, key)
        if device not in ("none", "cpu"):
            yield f"zero_optimization.{key}.device {device}: expected cpu or none"
        if device == "cpu" and stage < min_stage:
            yield f"zero_optimization.{key} needs stage {min_stage} or more, not {stage}"
    if zero.get("overlap_comm") and stage < 2:
        yield f"zero_optimization.overlap_comm true needs stage 2 or 3, not {stage}; take it out"


def _walk_keys(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path of a key, its value) at every depth."""
    for key, child in value.items() if isinstance(value, dict) else ():
        yield prefix + key, child
        yield from _walk_keys(child, f"{prefix}{key}.")


def build_deepspeed_config(
    deepspeed_file: DeepSpeedFile, *, batch: BatchConfig, max_grad_norm: float, precision: str
) -> dict[str, Any]:
    """DeepSpeed's whole configuration, pure: the ZeRO file and what the settings say; no key comes from both."""
    config: dict[str, Any] = {
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
    return {**deepspeed_file.content, **config}
