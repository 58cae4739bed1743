"""Measure what a step costs, to choose a ZeRO file or to compare with other programs: `python launch/bench.py`.

Each variant runs in processes of its own, in alternation over the rounds; writes bench.json and bench.md.
"""

import sys
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser
from trainer.config.errors import TrainingError, UserError, report_error


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--modes", type=_split_names, default=["full", "lora"], metavar="NAMES", help="full, lora (default: both)")
    add(
        "--batches",
        type=_parse_numbers,
        default=[2],
        metavar="N,N",
        help="examples per step over all ranks (default: 2)",
    )
    add("--ds", type=_split_names, default=["zero0"], metavar="NAMES", help="ZeRO files (default: zero0)")
    add("--ranks", type=_parse_numbers, default=[1], metavar="N,N", help="ranks of ours (default: 1)")
    add(
        "--against", type=_split_names, default=[], metavar="NAMES",
        help="other programs at equal settings, on one rank: plain, hf, hf-compile, hf-deepspeed (default: none)",
    )  # fmt: skip
    add("--model", default="gpt2", help="hub id or folder; gpt2: its shape with random weights (default: gpt2)")
    add("--block-size", type=int, default=1024, metavar="N", help="tokens of a block (default: 1024)")
    add(
        "--precision", type=_split_names, metavar="NAMES",
        help="fp32, bf16, fp16; peers take the first (default: bf16 on a GPU, fp32 on a processor)",
    )  # fmt: skip
    add(
        "--execution", type=_split_names, default=["auto"], metavar="NAMES",
        help="of ours: auto, eager, graphs, compile (default: auto)",
    )  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="left out: the GPU where there is one")
    add("--dropout", type=float, metavar="P", help="left out: the model's own")
    add("--windows", type=int, default=5, metavar="N", help="timed windows of a variant and round (default: 5)")
    add("--window", type=int, default=4, metavar="N", help="steps of a window (default: 4)")
    add("--warmup", type=int, metavar="N", help="steps before the first window (default: 3, on a GPU 10)")
    add("--rounds", type=int, default=3, metavar="N", help="times that all variants run in turn (default: 3)")
    add("--output-dir", type=Path, default=Path("bench"), metavar="DIR", help="where the table goes (default: bench)")
    return parser


def _split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parse_numbers(text: str) -> list[int]:
    return [int(name) for name in _split_names(text)]


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print; a mistake is one line on stderr and exit code 2, a variant that failed is 1."""
    from trainer.tools.bench.bench_cli import run_benchmarks
    from trainer.tools.bench.configs import build_configs

    try:
        args = build_parser().parse_args(argv)
        device = args.device or ("cuda" if _has_gpu() else "cpu")
        args.warmup = (10 if device == "cuda" else 3) if args.warmup is None else args.warmup
        for name in ("windows", "window", "warmup", "rounds"):
            if getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)}: expected a whole number from 1")
        common = {
            "model": args.model, "block_size": args.block_size, "device": device, "dropout": args.dropout,
            "num_windows": args.windows, "steps_per_window": args.window, "warmup_steps": args.warmup,
        }  # fmt: skip
        configs = build_configs(
            modes=args.modes, global_batches=args.batches, ds_configs=args.ds, peers=args.against,
            world_sizes=args.ranks,
            precisions=args.precision or ["bf16" if device == "cuda" else "fp32"], executions=args.execution,
            common_fields=common,
        )  # fmt: skip
        return run_benchmarks(configs, rounds=args.rounds, output_dir=args.output_dir)
    except (UserError, TrainingError) as error:
        return report_error(error)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
