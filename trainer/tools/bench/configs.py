"""What is measured: one program at one setting; needs no torch."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.choices import DS_CONFIG_NAMES, EXECUTIONS, MODES, PRECISIONS
from trainer.config.errors import UserError

PEERS = {
    "plain": "a plain PyTorch loop: the model's own loss, clip, fused AdamW",
    "hf": "Hugging Face Trainer, its defaults and the same numbers",
    "hf-compile": "the same with torch_compile",
    "hf-deepspeed": "the same through DeepSpeed with the ZeRO file",
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """One line of the table."""

    program: str  #: ours, or one of PEERS
    mode: str
    global_batch: int  #: examples per step over all ranks
    ds_config: str | None  #: the ZeRO file; None: the program's own choice
    world_size: int = 1
    model: str = "gpt2"
    block_size: int = 1024
    precision: str = "fp32"
    device: str = "cpu"
    dropout: float | None = None  #: None: the model's own
    execution: str = "auto"  #: of ours: how its steps run (`--execution`)
    num_windows: int = 5  #: timed windows
    steps_per_window: int = 4  #: steps of one window
    warmup_steps: int = 3  #: steps before the first window

    @property
    def name(self) -> str:
        """As the table prints it."""
        parts = [
            self.program,
            self.ds_config,
            f"{self.world_size} ranks" if self.world_size > 1 else None,
            self.precision,
        ]
        return " ".join(part for part in (*parts, self.execution if self.execution != "auto" else None) if part)

    @property
    def steps(self) -> int:
        """Optimizer steps that it runs."""
        return self.warmup_steps + self.num_windows * self.steps_per_window

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.block_size

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a job or a result file."""
        return dataclasses.asdict(self)


def build_configs(
    *, ours: Mapping[str, Sequence[Any]], peers: Sequence[str], modes: Sequence[str], global_batches: Sequence[int],
    common_fields: Mapping[str, Any],
) -> list[BenchmarkConfig]:  # fmt: skip
    """Ours in every combination of the fields of `ours`, then the other programs, for each mode and batch.

    Other programs run on one rank and in the first precision. UserError on a wrong name.
    """
    _validate(ours, peers, modes, global_batches)
    configs = []
    for mode, global_batch in itertools.product(modes, global_batches):
        fields = {**common_fields, "mode": mode, "global_batch": global_batch}
        configs += [
            BenchmarkConfig(program="ours", **fields, **dict(zip(ours, values, strict=True)))
            for values in itertools.product(*ours.values())
        ]
        configs += [
            BenchmarkConfig(program=program, precision=ours["precision"][0], ds_config=ds_config, **fields)
            for program in peers
            for ds_config in (ours["ds_config"] if program == "hf-deepspeed" else [None])
        ]
    return configs


def _validate(
    ours: Mapping[str, Sequence[Any]], peers: Sequence[str], modes: Sequence[str], global_batches: Sequence[int]
) -> None:
    _check_names("--precision", ours["precision"], PRECISIONS)
    _check_names("--execution", ours["execution"], EXECUTIONS)
    _check_names("--modes", modes, MODES)
    _check_names("--ds-config", ours["ds_config"], DS_CONFIG_NAMES)
    _check_names("--against", peers, tuple(PEERS))
    for global_batch, world_size in itertools.product(global_batches, ours["world_size"]):
        if global_batch % world_size:
            raise UserError(f"--batches {global_batch}: does not divide over {world_size} ranks")


def _check_names(flag: str, names: Sequence[str], allowed_names: Sequence[str]) -> None:
    for name in names:
        if name not in allowed_names:
            raise UserError(f"{flag} {name}: expected {', '.join(allowed_names)}")
