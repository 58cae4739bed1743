"""Put runs side by side: `python launch/compare.py runs/full runs/lora`."""

import sys
from collections.abc import Sequence

from trainer.config.argument_parser import ArgumentParser, output_folder, user_path
from trainer.tools.program import program


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="compare.py",
        description="Compare runs with one another, and with the card where that makes sense; "
        "writes report.html and answer.json.",
        epilog="Exit code: 0 done, 2 a mistake in what was asked, 3 refused: not to be ranked.",
    )
    add = parser.add_argument
    runs_help = "a run folder; an output folder of Hugging Face's Trainer, or a run on W&B (entity/project/run_id) "
    runs_help += "with its keys, is plotted, never ranked"
    margin_help = "how much worse is good enough: 2%% of what full gained, 0.01nats a token, or 0.005bpb (default: "
    margin_help += "2%%); of a score points of 100 (default: 2pt)"
    decide_help = "loss, or score:NAME of a run's --score NAME, such as score:exact (default: loss)"
    report_help = "save the comparison as a W&B Report (again: update it), with the card as a run where it is shown"
    output_help = "where the report goes (default: comparison)"
    add("runs", nargs="*", type=user_path, metavar="RUN", help=runs_help)
    add("--output-dir", type=output_folder, default="comparison", metavar="DIR", help=output_help)
    card_help = "compare with the card too (default: for --preset card, ACLED data and runs comparable with it)"
    add("--card", action="store_true", help=card_help)
    add("--margin", metavar="X", help=margin_help)
    add("--decide-by", default="loss", metavar="MEASURE", help=decide_help)
    add("--wandb-report", metavar="ENTITY/PROJECT", help=report_help)
    return parser


@program
def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    from trainer.report.compare_cli import run_comparison

    return run_comparison(args)


if __name__ == "__main__":
    sys.exit(main())
