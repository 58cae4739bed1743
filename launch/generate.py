"""Texts of a base and of runs on it side by side: `python launch/generate.py runs/full-demo runs/lora-demo`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from trainer.config.argument_parser import ArgumentParser, value_type, whole_number
from trainer.config.choices import MAX_NUM_SAMPLES, SCORERS
from trainer.config.fields import Accepts
from trainer.tools.program import prepare_libraries, program

NumPrompts = Annotated[int, Accepts(f"a whole number from 1 to {MAX_NUM_SAMPLES}", ge=1, le=MAX_NUM_SAMPLES)]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="generate.py",
        description="Complete the same prompts by the base and by each run, and show the texts side by side.",
        epilog="Without --prompt: validation prompts of the first run.",
    )
    add = parser.add_argument
    length_help = "default: slightly more than the references, or 64"
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folders with one tokenizer")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    add("--num", type=value_type(NumPrompts, int), metavar="N", help="validation prompts to take (default: 4)")
    add("--checkpoint", default="latest", metavar="step-N|best|latest", help="of each run")
    add("--max-new-tokens", type=whole_number, metavar="N", help=length_help)
    score_help = f"mean score over the prompts that have a reference, the best one's of several; repeatable: {SCORERS}"
    add("--score", action="append", default=[], metavar="NAME", help=score_help)
    return parser


@program
def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    prepare_libraries()
    from trainer.tools.generate import generate

    return generate(args)


if __name__ == "__main__":
    sys.exit(main())
