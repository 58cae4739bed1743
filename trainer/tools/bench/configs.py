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
    *, modes: Sequence[str], global_batches: Sequence[int], ds_configs: Sequence[str], peers: Sequence[str],
    world_sizes: Sequence[int],
    precisions: Sequence[str] = ("fp32",), executions: Sequence[str] = ("auto",), common_fields: Mapping[str, Any],
) -> list[BenchmarkConfig]:  # fmt: skip
    """Every combination, ours first within each mode and batch. UserError on a wrong name.

    Peers run on one rank and in the first precision.
    """
    _check_names("--precision", precisions, PRECISIONS)
    _check_names("--execution", executions, EXECUTIONS)
    _check_names("--modes", modes, MODES)
    _check_names("--ds", ds_configs, DS_CONFIG_NAMES)
    _check_names("--against", peers, tuple(PEERS))
    for number in (*global_batches, *world_sizes):
        if number < 1:
            raise UserError(f"--batches and --ranks: expected whole numbers from 1, got {number}")
    configs = []
    for mode in modes:
        for global_batch in global_batches:
            if indivisible_sizes := [n for n in world_sizes if global_batch % n]:
                raise UserError(f"--batches {global_batch}: does not divide over {indivisible_sizes[0]} ranks")
            configs += [
                BenchmarkConfig(
                    program="ours", mode=mode, global_batch=global_batch, ds_config=ds_config, world_size=world_size,
                    precision=precision, execution=execution,
                    **common_fields,
                )
                for precision, world_size, ds_config,
                execution in itertools.product(precisions, world_sizes, ds_configs, executions)
            ]  # fmt: skip
            for program in peers:
                ds_config_names = ds_configs if program == "hf-deepspeed" else [None]
                configs += [
                    BenchmarkConfig(
                        program=program,
                        mode=mode,
                        global_batch=global_batch,
                        ds_config=ds_config,
                        precision=precisions[0],
                        **common_fields,
                    )
                    for ds_config in ds_config_names
                ]
    return configs


def _check_names(flag: str, names: Sequence[str], allowed_names: Sequence[str]) -> None:
    for name in names:
        if name not in allowed_names:
            raise UserError(f"{flag} {name}: expected {', '.join(allowed_names)}")


def flops_per_token(
    *, mode: str, num_parameters: int, num_trainable: int, num_layers: int, hidden_size: int, block_size: int
) -> float:
    """Floating-point operations that one token of training needs: PaLM, appendix B (arXiv 2204.02311).

    Every weight: 6 N + 12 L d T, for forward, and backward to activations and weights. With frozen weights the third
    of it that makes their gradients falls away: 4 N + 6 N_trainable + 12 L d T.
    """
    attention = 12 * num_layers * hidden_size * block_size
    return (6 * num_parameters if mode == "full" else 4 * num_parameters + 6 * num_trainable) + attention
