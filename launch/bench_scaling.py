"""Measure how the cost of a token grows with ranks, block length and model size, and model more GPUs than are here.

`python launch/bench_scaling.py` prints Markdown tables: measured ones on this machine, each variant in processes of its
own and in alternation; and one of 8 and 64 GPUs by the formula of `trainer.tools.bench.comm_model`, from the time of a
step that is given with --step-ms.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

GPT2, ADAPTERS = 124_439_808, 1_179_648  # weights of GPT-2, and of adapters of rank 8 on its Conv1D layers


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench_scaling.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--ranks", type=_parse_numbers, default=[1, 2], metavar="N,N", help="ranks (default: 1,2)")
    add(
        "--blocks",
        type=_parse_numbers,
        default=[128, 256, 512],
        metavar="N,N",
        help="block lengths (default: 128,256,512)",
    )
    add(
        "--widths",
        type=_parse_numbers,
        default=[192, 384, 768],
        metavar="N,N",
        help="of a GPT-2 (default: 192,384,768)",
    )
    add("--tokens", type=int, default=1024, metavar="N", help="of a step (default: 1024)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--rounds", type=int, default=3, metavar="N", help="times that all run in turn (default: 3)")
    add("--windows", type=int, default=2, metavar="N", help="timed steps of a round (default: 2)")
    add(
        "--step-ms", type=float, metavar="MS",
        help="milliseconds of one GPU's step of 2 x 1024 tokens with GPT-2 124M; gives the model of 8 and 64 GPUs",
    )  # fmt: skip
    add("--only-model", action="store_true", help="measure nothing, print the model")
    return parser


def _parse_numbers(text: str) -> list[int]:
    return [int(name) for name in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 where a variant failed."""
    args = build_parser().parse_args(argv)
    from trainer.tools.bench.bench_cli import run_rounds
    from trainer.tools.bench.comm_model import scaling_table
    from trainer.tools.bench.configs import BenchmarkConfig

    exit_code = 0
    if not args.only_model:
        with tempfile.TemporaryDirectory() as scratch:
            configs = []
            for width, block, ranks in _benchmark_grid(args):
                configs.append(
                    BenchmarkConfig(
                        program="ours", mode="full", global_batch=max(ranks, args.tokens // block), ds_config=None,
                        world_size=ranks,
                        model=_save_model_config(Path(scratch), width), block_size=block, device=args.device,
                        dropout=0.1,
                        num_windows=args.windows, steps_per_window=1, warmup_steps=1,
                    )
                )  # fmt: skip
            rows, _ = run_rounds(configs, rounds=args.rounds)
            exit_code = int(any(row["problem"] for row in rows))
        print("\n" + "\n".join(markdown_table(rows)), flush=True)
    if args.step_ms:
        for name, trained, frozen in (("full", GPT2, 0), ("lora", ADAPTERS, GPT2)):
            print(f"\n{name}, modelled: 2 x 1024 tokens a GPU in {args.step_ms:g} ms\n")
            print(
                scaling_table(
                    compute_seconds=args.step_ms / 1000, num_tokens=2048, num_trainable=trained, num_frozen=frozen
                )
            )
    return exit_code


def markdown_table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of what was measured; spread: of the rounds' medians."""
    table_lines = ["| width | block | ranks | batch | ms/step | spread | us/token |", "|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        head = [
            row["model"].rsplit("-", 1)[-1],
            str(row["block_size"]),
            str(row["world_size"]),
            str(row["global_batch"]),
        ]
        if row["problem"]:
            table_lines.append("| " + " | ".join([*head, row["problem"], "", ""]) + " |")
            continue
        low, high = (1000 * seconds for seconds in row["spread"])
        microseconds_per_token = 1e6 / row["tokens_per_second"]
        table_lines.append(
            "| "
            + " | ".join([*head, f"{1000 * row['step']:.0f}", f"{low:.0f}-{high:.0f}", f"{microseconds_per_token:.0f}"])
            + " |"
        )
    return table_lines


def _benchmark_grid(args: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(width, block length, ranks): one of them varied at a time, from the largest width and the middle block."""
    width, block, ranks = max(args.widths), sorted(args.blocks)[len(args.blocks) // 2], min(args.ranks)
    combinations = [(width, block, n) for n in args.ranks]
    combinations += [(width, n, ranks) for n in args.blocks] + [(n, block, ranks) for n in args.widths]
    return list(dict.fromkeys(combinations))


def _save_model_config(folder: Path, width: int) -> str:
    """A folder with the configuration of a 12-layer GPT-2 of that width: 768 is GPT-2 124M's."""
    from transformers import GPT2Config

    config_dir = folder / f"gpt2-width-{width}"
    if not config_dir.exists():
        config = GPT2Config(n_embd=width)
        config.architectures = ["GPT2LMHeadModel"]
        config.save_pretrained(config_dir)
    return str(config_dir)


if __name__ == "__main__":
    sys.exit(main())
