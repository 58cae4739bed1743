"""`launch/bench.py`: which measurement, and its flags. Needs no torch."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, whole_number, whole_numbers
from trainer.config.choices import DS_CONFIG_NAMES, EXECUTIONS, MODES, PRECISIONS
from trainer.config.errors import UserError

#: A plain PyTorch loop (the model's own loss, clip, fused AdamW), and Hugging Face's Trainer with its defaults.
PEERS = ("plain", "hf")
#: What makes our steps faster, and `--without` turns off.
FAST_PATHS = ("chunked-loss", "cpu-attention", "graphs", "packing")
SHAPES = {
    "tiny": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512, "n_positions": 128},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
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


def run(argv: Sequence[str]) -> int:
    """Do the measurement that the first word names (default: steps); returns the exit code."""
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("steps", argv)
    if name not in ("steps", "memory"):
        raise UserError(f"{name}: expected steps or memory")
    args = build_parser(name).parse_args(flags)
    if name == "steps":
        from trainer.tools.bench.steps import measure_steps

        return measure_steps(args)
    from trainer.tools.bench.memory import measure_memory

    return measure_memory(args)


def build_parser(name: str) -> ArgumentParser:
    """The flags of a measurement."""
    if name == "memory":
        description = "Train a few steps with each method; prints its memory, checkpoint size, speed and loss."
        parser = ArgumentParser(prog="bench.py memory", description=f"{description} The other: bench.py steps.")
        add = parser.add_argument
        add("--model", help="folder of a causal LM with its weights, in place of --shape")
        add("--shape", choices=SHAPES, default="tiny", help="size of a random GPT-2 (default: tiny)")
        add("--methods", type=_names(METHODS), default=list(METHODS), metavar="NAMES", help="default: all")
        add("--steps", type=whole_number, default=5, metavar="N", help="optimizer steps (default: 5)")
        add("--micro-batch", type=whole_number, default=2, metavar="N", help="rows of a step (default: 2)")
        add("--block-size", type=whole_number, default=64, metavar="N", help="tokens of a row (default: 64)")
        add("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU that has it, else fp32")
        return parser
    description = "Time optimizer steps of several programs in alternation; writes bench.json and bench.md."
    parser = ArgumentParser(prog="bench.py steps", description=f"{description} The other: bench.py memory.")
    add = parser.add_argument
    against = "other programs at equal settings, on one rank: plain (a PyTorch loop), hf (Trainer) (default: none)"
    without = f"also ours without one of {', '.join(FAST_PATHS)}, to see what it gains (default: none)"
    precision = "fp32, bf16, fp16; other programs take the first (default: bf16 on a GPU, fp32 on a CPU)"
    add("--model", default="gpt2", help="hub id or folder; gpt2: its shape with random weights (default: gpt2)")
    add("--modes", type=_names(MODES), default=list(MODES), metavar="NAMES", help="full, lora (default: both)")
    add(
        "--batches",
        type=whole_numbers,
        default=(2,),
        metavar="N,N",
        help="examples a step, over all ranks (default: 2)",
    )
    add("--ds-config", type=_names(DS_CONFIG_NAMES), default=["zero0"], metavar="NAMES", help="default: zero0")
    add("--ranks", type=whole_numbers, default=(1,), metavar="N,N", help="ranks of ours (default: 1)")
    add("--execution", type=_names(EXECUTIONS), default=["auto"], metavar="NAMES", help="of ours (default: auto)")
    add("--against", type=_names(PEERS), default=[], metavar="NAMES", help=against)
    add("--without", type=_names(FAST_PATHS), default=[], metavar="NAMES", help=without)
    add("--block-size", type=whole_number, default=1024, metavar="N", help="tokens of a row (default: 1024)")
    add("--precision", type=_names(PRECISIONS), metavar="NAMES", help=precision)
    add("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    add("--dropout", type=float, metavar="P", help="default: the model's own")
    add("--windows", type=whole_number, default=5, metavar="N", help="timed windows per program and round (default: 5)")
    add("--window", type=whole_number, default=4, metavar="N", help="steps of a window (default: 4)")
    add("--warmup", type=whole_number, metavar="N", help="steps before the first window (default: 3, on a GPU 10)")
    add("--rounds", type=whole_number, default=3, metavar="N", help="times that all programs run in turn (default: 3)")
    add("--output-dir", type=Path, default=Path("bench"), metavar="DIR", help="where the table goes (default: bench)")
    return parser


def _names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        if not names:
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(allowed)}")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name}: expected some of {', '.join(allowed)}")
        return names

    return parse
