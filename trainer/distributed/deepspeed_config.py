"""ZeRO file and settings -> DeepSpeed's dict, as pure functions; which file where the user named none."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from trainer.config.errors import UserError
from trainer.config.schema import DS_NAMES, Batch
from trainer.distributed.memory_estimate import Counts
from trainer.distributed.memory_estimate import state as model_state

DS_FOLDER = Path(__file__).parent.parent.parent / "ds_configs"
STATE_SHARE = 0.25  # of a device's memory; model state beyond it is worth dividing further

_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler",
    "fp16", "bf16", "torch_autocast", "gradient_clipping", "managed_gradient_accumulation", "steps_per_print",
    "wandb", "tensorboard", "csv_monitor", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
_THEIRS = (
    "zero_optimization", "communication_data_type", "comms_logger", "prescale_gradients", "gradient_predivide_factor",
    "wall_clock_breakdown", "aio",
)  # fmt: skip
_NEVER = {
    "prescale_gradients": "it scales the gradients, which are already the mean over the global batch",
    "gradient_predivide_factor": "it scales the gradients, which are already the mean over the global batch",
    "round_robin_gradients": "it returns other parameters' values when the full state is read for a checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class ZeroFile:
    """A ZeRO file that was read and checked."""

    name: str
    content: dict[str, Any]
    reason: str

    @property
    def stage(self) -> int:
        """0 to 3."""
        return int(self.content["zero_optimization"].get("stage", 0))

    @property
    def offload(self) -> bool:
        """Whether optimizer state or weights live in the host's memory."""
        return self.optimizer_on_host or self.weights_on_host

    @property
    def optimizer_on_host(self) -> bool:
        """Whether the optimizer's state lives in the host's memory."""
        return self._device("offload_optimizer") != "none"

    @property
    def weights_on_host(self) -> bool:
        """Whether the weights do, between the moments when a layer needs them."""
        return self._device("offload_param") != "none"

    def _device(self, key: str) -> str:
        return str((self.content["zero_optimization"].get(key) or {}).get("device", "none"))


def read_zero_file(name: str, reason: str = "asked for") -> ZeroFile:
    """One of `ds_configs/` by name, or a path; UserError names the file and the key for anything unknown or doubled."""
    path = DS_FOLDER / f"{name}.json" if name in DS_NAMES else Path(name)
    if not path.is_file():
        raise UserError(f"--ds-config {name}: no such file; pass {', '.join(DS_NAMES)} or a path to a JSON file")
    try:
        content = json.loads(path.read_text(), object_pairs_hook=_no_doubles)
    except ValueError as problem:
        raise UserError(f"--ds-config {path}: not JSON: {problem}") from problem
    _check_keys(path, content)
    return ZeroFile(name=name if name in DS_NAMES else path.stem, content=content, reason=reason)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    doubled = {key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1}
    if doubled:
        raise ValueError(f"key {sorted(doubled)[0]} stands there twice")
    return dict(pairs)


def _check_keys(path: Path, content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization"), dict):
        raise UserError(f"--ds-config {path}: expected an object with the key zero_optimization")
    for key, where, value in _walk(content):
        if value == "auto":
            raise UserError(f'--ds-config {path}: {where} is "auto"; give a value, nothing here fills it in')
        if key in _NEVER:
            raise UserError(f"--ds-config {path}: {where} is refused: {_NEVER[key]}")
    for key in content:
        if key in _OURS:
            raise UserError(f"--ds-config {path}: {key} comes from the flags, not from this file; take it out")
        if key not in _THEIRS:
            raise UserError(
                f"--ds-config {path}: unknown key {key}; known are {', '.join(k for k in _THEIRS if k not in _NEVER)}"
            )
    zero_config = import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    zero = content["zero_optimization"]
    fields = zero_config.model_fields  # their documented names are the aliases, but both are taken
    names = {field.alias: name for name, field in fields.items() if field.alias} | {name: name for name in fields}
    for key in zero:
        if key not in names:
            raise UserError(f"--ds-config {path}: unknown key zero_optimization.{key}")
        if [names[other] for other in zero if other in names].count(names[key]) > 1:
            raise UserError(f"--ds-config {path}: zero_optimization.{key} stands there twice, under two of its names")
    if zero.get("stage", 0) not in range(4):
        raise UserError(f"--ds-config {path}: zero_optimization.stage {zero['stage']}: expected 0, 1, 2 or 3")
    try:
        zero_config(**zero)
    except ValueError as problem:  # pydantic's
        raise UserError(f"--ds-config {path}: {_first(problem)}") from problem
    stage = zero.get("stage", 0)
    for key in content:
        if stage == 0 and key != "zero_optimization":
            raise UserError(f"--ds-config {path}: {key} is without effect under stage 0; take it out, or use stage 1")
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"--ds-config {path}: zero_optimization.{key}.device {device}: expected cpu or none")
        if device == "cpu" and stage < least:
            raise UserError(f"--ds-config {path}: zero_optimization.{key} needs stage {least} or more, not {stage}")


def _first(problem: Any) -> str:
    """The first thing that DeepSpeed's own check of its keys complains of: where, the value, what is expected."""
    found = problem.errors()[0]
    where = ".".join(map(str, ("zero_optimization", *found["loc"])))
    if found["type"] == "extra_forbidden":
        return f"unknown key {where}"
    value = "" if isinstance(found["input"], dict) else f" {json.dumps(found['input'])}"
    return f"{where}{value}: {found['msg'][:1].lower()}{found['msg'][1:]}"


def _walk(value: Any, where: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{where}.{key}" if where else key
            yield key, path, inner
            yield from _walk(inner, path)


def choose_zero_file(
    *, counts: Counts, ranks: int, memory: int | None, precision: str, in_common: bool = False
) -> ZeroFile:  # fmt: skip
    """The ZeRO file where the user named none, and why: by the state per rank of `trainer.distributed.memory_estimate`.

    `in_common`: whether the ranks are of one processor, which holds the state of stage 0 once for all of them.
    """

    def held(stage: int) -> float:
        return model_state(counts, stage=stage, ranks=ranks, precision=precision).total

    def fits(size: float) -> bool:
        return memory is None or size <= STATE_SHARE * memory

    whole = held(0)
    if ranks == 1 and precision != "fp16":
        if fits(whole):
            return read_zero_file("zero0", "one rank: there is nothing to divide")
        return read_zero_file(
            "zero2_offload", f"one rank, and {whole / 2**30:.1f} GiB of model state: the optimizer's moves to the host"
        )
    if in_common and precision != "fp16":
        return read_zero_file("zero0", "ranks of one processor hold the state in common and divide the update")
    if fits(held(1)):
        return read_zero_file("zero1", "optimizer state is divided over the ranks at no extra communication")
    if fits(held(2)):
        return read_zero_file(
            "zero2", f"{whole / 2**30:.1f} GiB of model state: gradients and optimizer state are divided"
        )
    return read_zero_file("zero3", f"{whole / 2**30:.1f} GiB of model state: weights are divided too")


def deepspeed_dict(zero: ZeroFile, *, batch: Batch, clip: float, precision: str) -> dict[str, Any]:
    """DeepSpeed's whole configuration, pure: the ZeRO file and what the settings say; no key comes from both."""
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": 1,  # never divides: the loss is already divided by the global batch's tokens
        "managed_gradient_accumulation": False,  # step() is the boundary, also after a short last group
        "gradient_clipping": clip if zero.stage else 0.0,  # left out means 1.0; stage 0 is clipped where it is measured
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if zero.stage:
        # Otherwise offload wants DeepSpeed's own Adam, other numbers and a compiler.
        ours |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    if precision == "fp16":
        ours["fp16"] = {"enabled": True}
    return {**zero.content, **ours}
