"""`launch/bench.py`: which measurement, and its flags. Needs no torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.argument_parser import ArgumentParser
from trainer.config.errors import UserError
from trainer.tools.bench.configs import PEERS
from trainer.tools.bench.shapes import SHAPES


def run(argv: Sequence[str]) -> int:
    """Do the measurement that the first word names, steps where none is named; returns the exit code."""
    name, flags = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("steps", argv)
    if name not in COMMANDS:
        raise UserError(f"{name}: expected {', '.join(COMMANDS)}")
    return int(COMMANDS[name](flags))


def run_steps(argv: Sequence[str]) -> int:
    """What a step costs: ours under ZeRO files, ranks, precisions and ways to execute, and other programs."""
    args = _steps_parser().parse_args(argv)
    from trainer.tools.bench.configs import build_configs
    from trainer.tools.bench.steps import run_benchmarks

    is_gpu = (args.device or _default_device()) == "cuda"
    common_fields = {
        "model": args.model, "block_size": args.block_size, "device": "cuda" if is_gpu else "cpu",
        "dropout": args.dropout, "num_windows": args.windows, "steps_per_window": args.window,
        "warmup_steps": args.warmup or (10 if is_gpu else 3),
    }  # fmt: skip
    configs = build_configs(
        ours={
            "precision": args.precision or ["bf16" if is_gpu else "fp32"], "world_size": args.ranks,
            "ds_config": args.ds_config, "execution": args.execution,
        },
        peers=args.against, modes=args.modes, global_batches=args.batches, common_fields=common_fields,
    )  # fmt: skip
    return run_benchmarks(configs, rounds=args.rounds, output_dir=args.output_dir)


def _steps_parser() -> ArgumentParser:
    parser = _parser("steps", "Time optimizer steps, each variant in processes of its own and in alternation; "
                     "writes bench.json and bench.md.")  # fmt: skip
    add = parser.add_argument
    add("--modes", type=_names, default=["full", "lora"], metavar="NAMES", help="full, lora (default: both)")
    add("--batches", type=_numbers, default=[2], metavar="N,N", help="examples a step over all ranks (default: 2)")
    add("--ds-config", type=_names, default=["zero0"], metavar="NAMES", help="ZeRO files of ours (default: zero0)")
    add("--ranks", type=_numbers, default=[1], metavar="N,N", help="ranks of ours (default: 1)")
    add(
        "--execution", type=_names, default=["auto"], metavar="NAMES",
        help="of ours: auto, eager, graphs, compile (default: auto)",
    )  # fmt: skip
    add(
        "--against", type=_names, default=[], metavar="NAMES",
        help=f"other programs at equal settings, on one rank: {', '.join(PEERS)} (default: none)",
    )  # fmt: skip
    add("--model", default="gpt2", help="hub id or folder; gpt2: its shape with random weights (default: gpt2)")
    add("--block-size", type=_number, default=1024, metavar="N", help="tokens of a block (default: 1024)")
    add(
        "--precision", type=_names, metavar="NAMES",
        help="fp32, bf16, fp16; other programs take the first (default: bf16 on a GPU, fp32 on a CPU)",
    )  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="left out: the GPU where there is one")
    add("--dropout", type=float, metavar="P", help="left out: the model's own")
    add("--windows", type=_number, default=5, metavar="N", help="timed windows of a variant and round (default: 5)")
    add("--window", type=_number, default=4, metavar="N", help="steps of a window (default: 4)")
    add("--warmup", type=_number, metavar="N", help="steps before the first window (default: 3, on a GPU 10)")
    add("--rounds", type=_number, default=3, metavar="N", help="times that all variants run in turn (default: 3)")
    add("--output-dir", type=Path, default=Path("bench"), metavar="DIR", help="where the table goes (default: bench)")
    return parser


def run_memory(argv: Sequence[str]) -> int:
    """What each way of training holds, writes and reaches."""
    from trainer.tools.bench.methods import METHODS, measure_methods

    parser = _parser("memory", "Train a few steps with each method; prints what it holds, writes and reaches.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="size of a random GPT-2 (default: tiny)")
    add("--model", help="folder of a causal LM with its weights, in place of --shape")
    add("--steps", type=_number, default=5, metavar="N", help="optimizer steps (default: 5)")
    add("--micro-batch", type=_number, default=2, metavar="N", help="rows of a step (default: 2)")
    add("--block-size", type=_number, default=64, metavar="N", help="tokens of a row (default: 64)")
    add("--precision", choices=("fp32", "bf16"), help="left out: bf16 on a GPU that has it, else fp32")
    add(
        "--methods", type=_names, default=list(METHODS), metavar="NAMES",
        help=f"of {', '.join(METHODS)} (default: all)",
    )  # fmt: skip
    return measure_methods(parser.parse_args(argv))


def run_data(argv: Sequence[str]) -> int:
    """What it costs to prepare large text files."""
    parser = _parser("data", "Tokenise and pack text files made from a seed; prints time and memory.")
    parser.add_argument("--megabytes", type=_numbers, default=[256], metavar="N,N", help="sizes (default: 256)")
    parser.add_argument("--model", default="demo-base", help="whose tokenizer (default: demo-base)")
    args = parser.parse_args(argv)
    from trainer.tools.bench.preparation import measure_preparation

    return measure_preparation(args.megabytes, args.model)


def run_scaling(argv: Sequence[str]) -> int:
    """How the cost of a token grows with ranks, block length and width."""
    parser = _parser("scaling", "Time steps over ranks, block lengths and widths; model more GPUs than are here.")
    add = parser.add_argument
    add("--ranks", type=_numbers, default=[1, 2], metavar="N,N", help="ranks (default: 1,2)")
    add("--blocks", type=_numbers, default=[128, 256, 512], metavar="N,N", help="lengths (default: 128,256,512)")
    add("--widths", type=_numbers, default=[192, 384, 768], metavar="N,N", help="widths (default: 192,384,768)")
    add("--tokens", type=_number, default=1024, metavar="N", help="of a step (default: 1024)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--rounds", type=_number, default=3, metavar="N", help="times that all run in turn (default: 3)")
    add("--windows", type=_number, default=2, metavar="N", help="timed steps of a round (default: 2)")
    add(
        "--step-ms", type=float, metavar="MS",
        help="milliseconds of one GPU's step of 2 x 1024 tokens with GPT-2 124M; gives the model of 8 and 64 GPUs",
    )  # fmt: skip
    add("--only-model", action="store_true", help="measure nothing, print the model")
    args = parser.parse_args(argv)
    from trainer.tools.bench.scaling import measure_scaling

    return measure_scaling(args)


def run_card(argv: Sequence[str]) -> int:
    """The card's whole training, in both modes."""
    from trainer.tools.bench.card import add_flags, measure_card

    parser = _parser("card", "Train the card's program whole in both modes; writes card.json and card.md.")
    add_flags(parser, _number)
    return measure_card(parser.parse_args(argv))


def run_operations(argv: Sequence[str]) -> int:
    """ATen operations and bytes of a step, counted without a GPU."""
    _parser("operations", "Count a step's ATen operations and bytes as on a GPU, by fake tensors.").parse_args(argv)
    from trainer.tools.bench.operations import operations_table

    print(operations_table(), end="")
    return 0


def run_kernels(argv: Sequence[str]) -> int:
    """What each kernel gains over the plain form."""
    parser = _parser("kernels", "Time each file of trainer/kernels beside the plain form, on one thread.")
    parser.add_argument("--rounds", type=_number, default=5, metavar="N", help="times in turn (default: 5)")
    args = parser.parse_args(argv)
    from trainer.tools.bench.kernels import measure_kernels

    measure_kernels(args.rounds)
    return 0


def run_packing(argv: Sequence[str]) -> int:
    """What packing records into rows gains."""
    parser = _parser("packing", "Train on records of many lengths, packed and not; prints padding and speed.")
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="tiny", help="size of a random GPT-2 (default: tiny)")
    add("--batch", type=_number, default=16, metavar="N", help="records of a step (default: 16)")
    add("--block-size", type=_number, default=128, metavar="N", help="longest row (default: 128)")
    add("--mean-length", type=_number, default=40, metavar="N", help="tokens of a record on average (default: 40)")
    add("--steps", type=_number, default=8, metavar="N", help="timed steps of a round (default: 8)")
    add("--rounds", type=_number, default=3, metavar="N", help="times that all run in turn (default: 3)")
    args = parser.parse_args(argv)
    from trainer.tools.bench.packing import measure_packing

    return measure_packing(args)


COMMANDS: dict[str, Any] = {
    "steps": run_steps,
    "memory": run_memory,
    "data": run_data,
    "scaling": run_scaling,
    "operations": run_operations,
    "kernels": run_kernels,
    "packing": run_packing,
    "card": run_card,
}


def _parser(name: str, description: str) -> ArgumentParser:
    others = ", ".join(other for other in COMMANDS if other != name)
    return ArgumentParser(
        prog=f"bench.py {name}", description=description, epilog=f"Other measurements: bench.py {others}."
    )


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _number(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(name) for name in _names(text)]
