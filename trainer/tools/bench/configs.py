"""What is measured: one program at one setting; needs no torch."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config.choices import DS_CONFIG_NAMES, EXECUTIONS, MODES, PRECISIONS
from trainer.config.errors import UserError

#: A plain PyTorch loop (the model's own loss, clip, fused AdamW), and Hugging Face's Trainer with its defaults and the
#: same numbers: as it is, with torch_compile, and through DeepSpeed with the ZeRO file.
PEERS = ("plain", "hf", "hf-compile", "hf-deepspeed")

#: {way of training: its flags}
METHODS = {
    "full": "--mode full",
    "full-adamw8bit": "--mode full --optim adamw8bit",
    "full-checkpointing": "--mode full --activation-checkpointing",
    "lora": "--mode lora",
    "lora-checkpointing": "--mode lora --activation-checkpointing",
    "dora": "--mode lora --adapter dora",
    "lora-nf4": "--mode lora --quant nf4 --quant-double",
    "lora-int8": "--mode lora --quant int8",
    "lora-adamw8bit": "--mode lora --optim adamw8bit",
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
        ranks = f"{self.world_size} ranks" if self.world_size > 1 else None
        execution = self.execution if self.execution != "auto" else None
        return " ".join(filter(None, (self.program, self.ds_config, ranks, self.precision, execution)))

    @property
    def steps(self) -> int:
        """Optimizer steps that it runs."""
        return self.warmup_steps + self.num_windows * self.steps_per_window

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.block_size


def build_configs(args: argparse.Namespace, device: str) -> list[BenchmarkConfig]:
    """What the flags of `bench.py steps` name, for each mode and batch: ours in every combination, then the others.

    Other programs run on one rank and in the first precision. UserError on a wrong name.
    """
    is_gpu = device == "cuda"
    precisions = args.precision or ["bf16" if is_gpu else "fp32"]
    check_names("--precision", precisions, PRECISIONS)
    check_names("--execution", args.execution, EXECUTIONS)
    check_names("--modes", args.modes, MODES)
    check_names("--ds-config", args.ds_config, DS_CONFIG_NAMES)
    check_names("--against", args.against, PEERS)
    for global_batch, world_size in itertools.product(args.batches, args.ranks):
        if global_batch % world_size:
            raise UserError(f"--batches {global_batch}: does not divide over {world_size} ranks")
    configs = []
    for mode, global_batch in itertools.product(args.modes, args.batches):
        fields: dict[str, Any] = {
            "mode": mode,
            "global_batch": global_batch,
            "model": args.model,
            "block_size": args.block_size,
            "device": device,
            "dropout": args.dropout,
            "num_windows": args.windows,
            "steps_per_window": args.window,
            "warmup_steps": args.warmup or (10 if is_gpu else 3),
        }
        configs += [
            BenchmarkConfig(
                program="ours",
                precision=precision,
                world_size=world_size,
                ds_config=ds_config,
                execution=execution,
                **fields,
            )
            for precision, world_size, ds_config, execution in itertools.product(
                precisions, args.ranks, args.ds_config, args.execution
            )
        ]
        configs += [
            BenchmarkConfig(program=program, precision=precisions[0], ds_config=ds_config, **fields)
            for program in args.against
            for ds_config in (args.ds_config if program == "hf-deepspeed" else [None])
        ]
    return configs


def check_names(flag: str, names: Sequence[str], allowed_names: Sequence[str]) -> None:
    """UserError for a name that is not allowed."""
    for name in names:
        if name not in allowed_names:
            raise UserError(f"{flag} {name}: expected {', '.join(allowed_names)}")
