"""Measure what training costs: `python launch/bench.py steps|memory` (default: steps).

Exit code 0: measured; 1: a measurement failed; 2: a mistake in the flags.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from trainer.config.argument_parser import ArgumentParser, value_type, whole_number
from trainer.config.choices import MODES
from trainer.config.errors import UserError
from trainer.tools.program import program

DESCRIPTIONS = {
    "steps": "Time optimizer steps of several programs in alternation, on one GPU or CPU rank.",
    "memory": "Train a few steps with each method; prints its memory, checkpoint size and speed.",
}
#: A plain PyTorch loop (the model's own loss, clip, fused AdamW), and Hugging Face's Trainer with its defaults.
PEERS = ("plain", "hf")
#: What makes our steps faster, and `--without` turns off.
FAST_PATHS = ("chunked-loss", "cpu-attention", "graphs", "packing")
#: {method of `bench.py memory`: its flags}
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


def names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    """The `type` of a flag that takes some of these names, separated by commas."""

    def parse(text: str) -> list[str]:
        if not set(text.split(",")) <= set(allowed):
            raise argparse.ArgumentTypeError(f"{text}: expected some of {', '.join(allowed)}")
        return text.split(",")

    return parse


def build_parser(name: str) -> ArgumentParser:
    other = next(other for other in DESCRIPTIONS if other != name)
    parser = ArgumentParser(prog=f"bench.py {name}", description=f"{DESCRIPTIONS[name]} The other: bench.py {other}.")
    add = parser.add_argument
    add("--model", default="gpt2", help="hub id or folder; gpt2: its shape with random weights (default: gpt2)")
    add("--global-batch", type=whole_number, default=2, metavar="N", help="examples of a step (default: 2)")
    add("--block-size", type=whole_number, default=1024, metavar="N", help="tokens of a row (default: 1024)")
    precision = value_type(Literal["fp32", "bf16"])
    add("--precision", type=precision, metavar="{fp32,bf16}", help="default: bf16 on a GPU, fp32 on a CPU")
    add("--steps", type=whole_number, default=20, metavar="N", help="timed steps of a program or method (default: 20)")
    if name == "memory":
        add("--methods", type=names(METHODS), default=list(METHODS), metavar="NAMES", help="default: all")
        return parser
    against_help = "other programs at equal settings: plain (a PyTorch loop), hf (Trainer) (default: none)"
    without_help = f"also ours without one of {', '.join(FAST_PATHS)}, to see what it gains (default: none)"
    add("--modes", type=names(MODES), default=list(MODES), metavar="NAMES", help="full, lora (default: both)")
    add("--against", type=names(PEERS), default=[], metavar="NAMES", help=against_help)
    add("--without", type=names(FAST_PATHS), default=[], metavar="NAMES", help=without_help)
    add("--rounds", type=whole_number, default=3, metavar="N", help="times that all programs run in turn (default: 3)")
    return parser


@program
def main(argv: Sequence[str]) -> int:
    name, *flags = argv if argv and not argv[0].startswith("-") else ("steps", *argv)
    if name not in DESCRIPTIONS:
        raise UserError(f"{name}: expected steps or memory")
    args = build_parser(name).parse_args(flags)
    from trainer.tools import bench

    return bench.measure_steps(args) if name == "steps" else bench.measure_memory(args, METHODS)


if __name__ == "__main__":
    sys.exit(main())
