"""Was LoRA good enough for your data? `python launch/study.py --data records.csv --max-steps 200`.

Searches the rates of full and LoRA alike, judges the best ones on test records with fresh seeds, and prints one
sentence with its interval. All other flags go to launch/train.py. Started again, it goes on where it was; `--join
FOLDER` adds workers. Exit code: 0 answered, 1 something failed, 2 a mistake, 3 an answer is refused, 130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, output_folder, value_type, whole_number, whole_numbers
from trainer.config.errors import UserError
from trainer.config.fields import NonNegativeInt
from trainer.report.wandb_report import parse_target
from trainer.tools.program import program
from trainer.tools.study.study import plan_study, run_study

JOIN_FLAGS = ("join", "workers", "gpus_per_trial", "wandb_report")  # all others would change the study that is joined


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="study.py", description=__doc__)
    add = parser.add_argument
    per_trial = value_type(NonNegativeInt, int)
    max_lr_help = "the highest rate to try of a method, where a higher one diverges with some seeds (repeatable)"
    margin_help = "how much worse is good enough: 2%% of what full gained, 0.01nats a token, or 0.005bpb (default: "
    margin_help += "2%%); of a score points of 100 (default: 2pt)"
    decide_help = "loss, or score:NAME of a --score NAME; rates are chosen by validation loss (default: loss)"
    add("--output-dir", type=output_folder, default=Path("study"), metavar="DIR", help="of the study (default: study)")
    add("--join", type=Path, metavar="DIR", help="work on the study of this folder, from here or another machine")
    add("--workers", type=whole_number, default=1, metavar="N", help="trials at a time on this machine (default: 1)")
    add("--gpus-per-trial", type=per_trial, metavar="G", help="each trial's own GPUs (default: 1 where there are any)")
    add("--lora-ranks", type=whole_numbers, default=(8,), metavar="N,N", help="sizes of LoRA to judge (default: 8)")
    seeds_help = "of the answer's runs (default: 101,102,103)"
    add("--seeds", type=whole_numbers, default=(101, 102, 103), metavar="N,N", help=seeds_help)
    add("--max-lr", action="append", default=[], metavar="METHOD=LR", help=max_lr_help)
    add("--decide-by", default="loss", metavar="MEASURE", help=decide_help)
    add("--margin", metavar="X", help=margin_help)
    add("--wandb-report", metavar="ENTITY/PROJECT", help="save the answer's page as a W&B Report too")
    add("--dry-run", action="store_true", help="print trials, steps, minutes and what can be shown; run no trial")
    return parser


@program
def main(argv: Sequence[str]) -> int:
    parser = build_parser()
    args, train_argv = parser.parse_known_args(argv)
    if args.wandb_report is not None:
        args.wandb_report = parse_target(args.wandb_report)
    if args.join is None:
        plan_study(args, train_argv, parser)
        return 0 if args.dry_run else run_study(args)
    names = [n for n, value in vars(args).items() if n not in JOIN_FLAGS and value != parser.get_default(n)]
    if flags := [*(f"--{name.replace('_', '-')}" for name in names), *train_argv]:
        raise UserError(f"{flags[0]}: not with --join, whose study has its rule; expected --workers")
    return run_study(args)


if __name__ == "__main__":
    sys.exit(main())
