"""Measure what a step costs, to choose a ZeRO file or to compare with other programs: `python launch/bench.py`.

Each variant runs in processes of its own, in alternation over the rounds; writes bench.json and bench.md.
"""

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    add = own.add_argument
    add("--modes", type=_names, default=["full", "lora"], metavar="NAMES", help="full, lora (default: both)")
    add("--batches", type=_numbers, default=[2], metavar="N,N", help="examples per step over all ranks (default: 2)")
    add("--ds", type=_names, default=["zero0"], metavar="NAMES", help="ZeRO files (default: zero0)")
    add("--ranks", type=_numbers, default=[1], metavar="N,N", help="ranks of ours (default: 1)")
    add(
        "--against", type=_names, default=[], metavar="NAMES",
        help="other programs at equal settings, on one rank: plain, hf, hf-compile, hf-deepspeed (default: none)",
    )  # fmt: skip
    add("--model", default="gpt2", help="hub id or folder; gpt2: its shape with random weights (default: gpt2)")
    add("--block-size", type=int, default=1024, metavar="N", help="tokens of a block (default: 1024)")
    add(
        "--precision", type=_names, metavar="NAMES",
        help="fp32, bf16, fp16; peers take the first (default: bf16 on a GPU, fp32 on a processor)",
    )  # fmt: skip
    add("--compile", type=_names, default=["off"], metavar="NAMES", help="on, off: of ours (default: off)")
    add("--device", choices=("cpu", "cuda"), help="left out: the GPU where there is one")
    add("--dropout", type=float, metavar="P", help="left out: the model's own")
    add("--windows", type=int, default=5, metavar="N", help="timed windows of a variant and round (default: 5)")
    add("--window", type=int, default=4, metavar="N", help="steps of a window (default: 4)")
    add("--warmup", type=int, metavar="N", help="steps before the first window (default: 3, on a GPU 10)")
    add("--rounds", type=int, default=3, metavar="N", help="times that all variants run in turn (default: 3)")
    add("--out", type=Path, default=Path("bench"), metavar="DIR", help="where the table goes (default: bench)")
    return own


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    return [int(name) for name in _names(text)]


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, print; a mistake is one line on stderr and exit code 2, a variant that failed is 1."""
    given = parser().parse_args(arguments)
    from trainer.config.errors import RunFailed, UserError
    from trainer.tools.bench.bench_cli import run
    from trainer.tools.bench.configs import variants

    try:
        device = given.device or ("cuda" if _has_gpu() else "cpu")
        given.warmup = (10 if device == "cuda" else 3) if given.warmup is None else given.warmup
        for name in ("windows", "window", "warmup", "rounds"):
            if getattr(given, name) < 1:
                raise UserError(f"--{name} {getattr(given, name)}: expected a whole number from 1")
        common = {
            "model": given.model, "block_size": given.block_size, "device": device, "dropout": given.dropout,
            "windows": given.windows, "window": given.window, "warmup": given.warmup,
        }  # fmt: skip
        chosen = variants(
            modes=given.modes, batches=given.batches, zero=given.ds, against=given.against, ranks=given.ranks,
            precisions=given.precision or ["bf16" if device == "cuda" else "fp32"], compiles=given.compile,
            common=common,
        )  # fmt: skip
        return run(chosen, rounds=given.rounds, out=given.out)
    except (UserError, RunFailed) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, UserError) else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
