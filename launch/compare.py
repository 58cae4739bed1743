"""Put runs side by side: `python launch/compare.py runs/full runs/lora`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, number, output_folder, user_path
from trainer.tools.program import program


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="compare.py",
        description="Compare runs with one another, and with the card where that makes sense; "
        "writes report.html, report.md, curves.png, curves.svg and answer.json.",
        epilog="Exit code: 0 done, 1 a check failed, 2 a mistake in what was asked, "
        "3 refused: not to be ranked, or no check could be made because the run is not comparable.",
    )
    add = parser.add_argument
    runs_help = "a run folder, an offline W&B folder or .wandb file, or entity/project/run_id on W&B; an output "
    runs_help += "folder or W&B run of Hugging Face's Trainer is plotted, never ranked"
    margin_help = "how much worse is good enough: 2%% of what full gained, 0.01nats a token, or 0.005bpb (default: "
    margin_help += "2%%); of a score points of 100 (default: 2pt)"
    decide_help = "loss, or score:NAME of a run's --score NAME, such as score:exact (default: loss)"
    check_help = "'val_loss<=1.0048@epoch 2', for every run, or `card`: each epoch at or under the card's; repeatable"
    tolerance_help = "widens the limit of each check, in its unit (default: 0)"
    output_help = "where the report goes (default: comparison)"
    add("runs", nargs="*", type=user_path, metavar="RUN", help=runs_help)
    add("--output-dir", type=output_folder, default="comparison", metavar="DIR", help=output_help)
    card_help = "compare with the card too (default: for --preset card, ACLED data and runs comparable with it)"
    add("--card", action="store_true", help=card_help)
    add("--margin", metavar="X", help=margin_help)
    add("--decide-by", default="loss", metavar="MEASURE", help=decide_help)
    add("--check", action="append", default=[], metavar="CONDITION", help=check_help)
    add("--tolerance", type=number(0), default=0.0, metavar="X", help=tolerance_help)
    add("--wandb-report", metavar="ENTITY/PROJECT", help="save the comparison as a W&B Report; again: update it")
    add("--wandb-report-json", type=Path, metavar="FILE", help="write that report's spec to FILE, without any network")
    add("--log-card", metavar="[ENTITY/]PROJECT", help="log the card as a W&B run of its own, once per project")
    return parser


@program
def main(argv: Sequence[str]) -> int:
    """Parse and do what was asked."""
    args = build_parser().parse_args(argv)
    from trainer.report.compare_cli import run_comparison

    return run_comparison(args)


if __name__ == "__main__":
    sys.exit(main())
