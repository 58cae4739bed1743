"""`launch/bench.py`: which measurement, and its flags. Needs no torch."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.config.argument_parser import ArgumentParser
from trainer.config.errors import UserError
from trainer.tools.bench.card import CARD_ROWS
from trainer.tools.bench.configs import METHODS, PEERS
from trainer.tools.bench.shapes import SHAPES


def run(argv: Sequence[str]) -> int:
    """Do the measurement that the first word names, steps where none is named; returns the exit code."""
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("steps", argv)
    if name not in COMMANDS:
        raise UserError(f"{name}: expected {', '.join(COMMANDS)}")
    args = build_parser(name).parse_args(flags)
    if name == "operations":
        from trainer.tools.bench.operations import operations_table

        print(operations_table(), end="")
        return 0
    measure: Callable[[argparse.Namespace], int]
    if name == "steps":
        from trainer.tools.bench.steps import measure_steps as measure
    elif name == "memory":
        from trainer.tools.bench.methods import measure_methods as measure
    elif name == "data":
        from trainer.tools.bench.preparation import measure_preparation as measure
    elif name == "scaling":
        from trainer.tools.bench.scaling import measure_scaling as measure
    elif name == "kernels":
        from trainer.tools.bench.kernels import measure_kernels as measure
    elif name == "packing":
        from trainer.tools.bench.packing import measure_packing as measure
    else:
        from trainer.tools.bench.card import measure_card as measure
    return measure(args)


def build_parser(name: str) -> ArgumentParser:
    """The flags of a measurement."""
    description, add_flags = COMMANDS[name]
    others = ", ".join(other for other in COMMANDS if other != name)
    parser = ArgumentParser(
        prog=f"bench.py {name}", description=description, epilog=f"Other measurements: bench.py {others}."
    )
    add_flags(parser.add_argument)
    return parser


def _add_steps_flags(add: Callable[..., Any]) -> None:
    add("--modes", type=_names, default=["full", "lora"], metavar="NAMES", help="full, lora (default: both)")
    add("--batches", type=_numbers, default=[2], metavar="N,N", help="examples a step over all ranks (default: 2)")
    add("--ds-config", type=_names, default=["zero0"], metavar="NAMES", help="ZeRO files of ours (default: zero0)")
    add("--ranks", type=_numbers, default=[1], metavar="N,N", help="ranks of ours (default: 1)")
    add(
        "--execution",
        type=_names,
        default=["auto"],
        metavar="NAMES",
        help="of ours: auto, eager, graphs (default: auto)",
    )
    add(
        "--against",
        type=_names,
        default=[],
        metavar="NAMES",
        help=f"other programs at equal settings, on one rank: {', '.join(PEERS)} (default: none)",
    )
    add("--model", default="gpt2", help="hub id or folder; gpt2: its shape with random weights (default: gpt2)")
    add("--block-size", type=_number, default=1024, metavar="N", help="tokens of a block (default: 1024)")
    add(
        "--precision",
        type=_names,
        metavar="NAMES",
        help="fp32, bf16, fp16; other programs take the first (default: bf16 on a GPU, fp32 on a CPU)",
    )
    add("--device", choices=("cpu", "cuda"), help="left out: the GPU where there is one")
    add("--dropout", type=float, metavar="P", help="left out: the model's own")
    add("--windows", type=_number, default=5, metavar="N", help="timed windows of a variant and round (default: 5)")
    add("--window", type=_number, default=4, metavar="N", help="steps of a window (default: 4)")
    add("--warmup", type=_number, metavar="N", help="steps before the first window (default: 3, on a GPU 10)")
    add("--rounds", type=_number, default=3, metavar="N", help="times that all variants run in turn (default: 3)")
    add("--output-dir", type=Path, default=Path("bench"), metavar="DIR", help="where the table goes (default: bench)")


def _add_memory_flags(add: Callable[..., Any]) -> None:
    add("--shape", choices=SHAPES, default="tiny", help="size of a random GPT-2 (default: tiny)")
    add("--model", help="folder of a causal LM with its weights, in place of --shape")
    add("--steps", type=_number, default=5, metavar="N", help="optimizer steps (default: 5)")
    add("--micro-batch", type=_number, default=2, metavar="N", help="rows of a step (default: 2)")
    add("--block-size", type=_number, default=64, metavar="N", help="tokens of a row (default: 64)")
    add("--precision", choices=("fp32", "bf16"), help="left out: bf16 on a GPU that has it, else fp32")
    add(
        "--methods",
        type=_names,
        default=list(METHODS),
        metavar="NAMES",
        help=f"of {', '.join(METHODS)} (default: all)",
    )


def _add_data_flags(add: Callable[..., Any]) -> None:
    add("--megabytes", type=_numbers, default=[256], metavar="N,N", help="sizes (default: 256)")
    add("--model", default="demo-base", help="whose tokenizer (default: demo-base)")


def _add_scaling_flags(add: Callable[..., Any]) -> None:
    add("--ranks", type=_numbers, default=[1, 2], metavar="N,N", help="ranks (default: 1,2)")
    add("--blocks", type=_numbers, default=[128, 256, 512], metavar="N,N", help="lengths (default: 128,256,512)")
    add("--widths", type=_numbers, default=[192, 384, 768], metavar="N,N", help="widths (default: 192,384,768)")
    add("--tokens", type=_number, default=1024, metavar="N", help="of a step (default: 1024)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--rounds", type=_number, default=3, metavar="N", help="times that all run in turn (default: 3)")
    add("--windows", type=_number, default=2, metavar="N", help="timed steps of a round (default: 2)")
    add(
        "--step-ms",
        type=float,
        metavar="MS",
        help="milliseconds of one GPU's step of 2 x 1024 tokens with GPT-2 124M; gives the model of 8 and 64 GPUs",
    )
    add("--only-model", action="store_true", help="measure nothing, print the model")


def _add_kernels_flags(add: Callable[..., Any]) -> None:
    add("--rounds", type=_number, default=5, metavar="N", help="times in turn (default: 5)")


def _add_packing_flags(add: Callable[..., Any]) -> None:
    add("--shape", choices=SHAPES, default="tiny", help="size of a random GPT-2 (default: tiny)")
    add("--batch", type=_number, default=16, metavar="N", help="records of a step (default: 16)")
    add("--block-size", type=_number, default=128, metavar="N", help="longest row (default: 128)")
    add("--mean-length", type=_number, default=40, metavar="N", help="tokens of a record on average (default: 40)")
    add("--steps", type=_number, default=8, metavar="N", help="timed steps of a round (default: 8)")
    add("--rounds", type=_number, default=3, metavar="N", help="times that all run in turn (default: 3)")


def _add_card_flags(add: Callable[..., Any]) -> None:
    add("--modes", type=_names, default=["full", "lora"], metavar="NAMES", help="full, lora (default: both)")
    add("--data", metavar="FILE", help="records to train on (default: rows of token ids made from a seed)")
    add("--rows", type=_number, default=CARD_ROWS, metavar="N", help=f"made from a seed (default: {CARD_ROWS})")
    add("--model", default="gpt2", help="hub id or folder (default: gpt2)")
    add("--init", default="random", metavar="HOW", help="pretrained, or random weights (default: random)")
    add("--block-size", type=_number, default=1024, metavar="N", help="tokens of a row (default: 1024)")
    add("--max-steps", type=_number, metavar="N", help="end earlier than after 3 epochs")
    add("--ranks", type=_number, default=1, metavar="N", help="ranks, started by torchrun (default: 1)")
    add("--output-dir", type=Path, default=Path("bench-card"), metavar="DIR", help="default: bench-card")


#: {first word: (what --help says, what adds its flags)}
COMMANDS: dict[str, tuple[str, Callable[..., None]]] = {
    "steps": (
        "Time optimizer steps, each variant in processes of its own and in alternation; writes bench.json and "
        "bench.md.",
        _add_steps_flags,
    ),
    "memory": ("Train a few steps with each method; prints what it holds, writes and reaches.", _add_memory_flags),
    "data": ("Tokenise and pack text files made from a seed; prints time and memory.", _add_data_flags),
    "scaling": ("Time steps over ranks, block lengths and widths; model more GPUs than are here.", _add_scaling_flags),
    "operations": ("Count a step's ATen operations and bytes as on a GPU, by fake tensors.", lambda add: None),
    "kernels": ("Time the kernels of trainer/model beside the plain form, on one thread.", _add_kernels_flags),
    "packing": ("Train on records of many lengths, packed and not; prints padding and speed.", _add_packing_flags),
    "card": ("Train the card's program whole in both modes; writes card.json and card.md.", _add_card_flags),
}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _number(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(name) for name in _names(text)]
