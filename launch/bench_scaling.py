"""Measure how the cost of a token grows with ranks, block length and model size, and model more GPUs than are here.

`python launch/bench_scaling.py` prints Markdown tables: measured ones on this machine, each variant in processes of its
own and in alternation; and one of 8 and 64 GPUs by the formula of `trainer.tools.bench.comm_model`, from the time of a step that
is given with --step-ms.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

GPT2, ADAPTERS = 124_439_808, 1_179_648  # weights of GPT-2, and of adapters of rank 8 on its Conv1D layers


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(prog="bench_scaling.py", description=__doc__.splitlines()[0])
    add = own.add_argument
    add("--ranks", type=_numbers, default=[1, 2], metavar="N,N", help="ranks (default: 1,2)")
    add("--blocks", type=_numbers, default=[128, 256, 512], metavar="N,N", help="block lengths (default: 128,256,512)")
    add("--widths", type=_numbers, default=[192, 384, 768], metavar="N,N", help="of a GPT-2 (default: 192,384,768)")
    add("--tokens", type=int, default=1024, metavar="N", help="of a step (default: 1024)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--rounds", type=int, default=3, metavar="N", help="times that all run in turn (default: 3)")
    add("--windows", type=int, default=2, metavar="N", help="timed steps of a round (default: 2)")
    add(
        "--step-ms", type=float, metavar="MS",
        help="milliseconds of one GPU's step of 2 x 1024 tokens with GPT-2 124M; gives the model of 8 and 64 GPUs",
    )  # fmt: skip
    add("--only-model", action="store_true", help="measure nothing, print the model")
    return own


def _numbers(text: str) -> list[int]:
    return [int(name) for name in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a variant failed."""
    given = parser().parse_args(arguments)
    from trainer.tools.bench.bench_cli import measured
    from trainer.tools.bench.comm_model import table
    from trainer.tools.bench.configs import Variant

    failed = 0
    if not given.only_model:
        with tempfile.TemporaryDirectory() as scratch:
            chosen = []
            for width, block, ranks in _grid(given):
                chosen.append(
                    Variant(
                        program="ours", mode="full", batch=max(ranks, given.tokens // block), zero=None, ranks=ranks,
                        model=_shape(Path(scratch), width), block_size=block, device=given.device, dropout=0.1,
                        windows=given.windows, window=1, warmup=1,
                    )
                )  # fmt: skip
            rows, _ = measured(chosen, rounds=given.rounds)
            failed = int(any(row["problem"] for row in rows))
        print("\n" + "\n".join(lines(rows)), flush=True)
    if given.step_ms:
        for name, trained, frozen in (("full", GPT2, 0), ("lora", ADAPTERS, GPT2)):
            print(f"\n{name}, modelled: 2 x 1024 tokens a GPU in {given.step_ms:g} ms\n")
            print(table(compute=given.step_ms / 1000, tokens=2048, trained=trained, frozen=frozen))
    return failed


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of what was measured; spread: of the rounds' medians."""
    told = ["| width | block | ranks | batch | ms/step | spread | us/token |", "|--:|--:|--:|--:|--:|--:|--:|"]
    for row in rows:
        head = [row["model"].rsplit("-", 1)[-1], str(row["block_size"]), str(row["ranks"]), str(row["batch"])]
        if row["problem"]:
            told.append("| " + " | ".join([*head, row["problem"], "", ""]) + " |")
            continue
        low, high = (1000 * seconds for seconds in row["spread"])
        cost = 1e6 / row["tokens_per_second"]
        told.append(
            "| " + " | ".join([*head, f"{1000 * row['step']:.0f}", f"{low:.0f}-{high:.0f}", f"{cost:.0f}"]) + " |"
        )
    return told


def _grid(given: argparse.Namespace) -> list[tuple[int, int, int]]:
    """(width, block length, ranks): one of them varied at a time, from the largest width and the middle block."""
    width, block, ranks = max(given.widths), sorted(given.blocks)[len(given.blocks) // 2], min(given.ranks)
    found = [(width, block, n) for n in given.ranks]
    found += [(width, n, ranks) for n in given.blocks] + [(n, block, ranks) for n in given.widths]
    return list(dict.fromkeys(found))


def _shape(folder: Path, width: int) -> str:
    """A folder with the configuration of a 12-layer GPT-2 of that width: 768 is GPT-2 124M's."""
    from transformers import GPT2Config

    place = folder / f"gpt2-width-{width}"
    if not place.exists():
        config = GPT2Config(n_embd=width)
        config.architectures = ["GPT2LMHeadModel"]
        config.save_pretrained(place)
    return str(place)


if __name__ == "__main__":
    sys.exit(main())
