"""Was one model as good as another on your records? `python launch/judge.py --base gpt2 A B --data records.csv`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, output_folder, whole_number
from trainer.config.fields import flag_of
from trainer.config.settings import DataSettings
from trainer.tools.program import prepare_libraries, program

#: settings of a run that say how records are read
DATA_FLAGS = ("prompt", "completion", "objective", "block_size", "split_by", "chat_template", "unusable_records")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="judge.py",
        description="Score the same records with models that anybody trained, and judge each by the first: the same "
        "sentence, page and answer.json as launch/compare.py writes of runs.",
        epilog="Exit code: 0 done, 2 a mistake, 3 refused: not to be ranked.",
    )
    add = parser.add_argument
    model_help = "a folder or hub id of a whole model or an adapter (of peft, TRL, Axolotl, LLaMA-Factory, Unsloth), "
    model_help += "or a run folder; NAME=MODEL names it, NAME=MODEL,MODEL gives its seeds"
    margin_help = "how much worse is good enough: 2%% of what the first gained over the base, 0.01nats a token, or "
    margin_help += "0.005bpb (default: 2%%)"
    add("models", nargs="+", metavar="MODEL", help=model_help)
    add("--base", required=True, metavar="MODEL", help="what they were trained from, a folder or hub id")
    add("--data", required=True, metavar="FILE", help="records that none was trained on, as launch/train.py takes them")
    add("--margin", metavar="X", help=margin_help)
    add("--eval-batch", type=whole_number, default=4, metavar="N", help="records at a time (default: 4)")
    add("--output-dir", type=output_folder, default=Path("judgement"), metavar="DIR", help="default: judgement")
    for field in dataclasses.fields(DataSettings):
        if field.name in DATA_FLAGS:
            add(flag_of(field), metavar="X", help=field.metadata["help"])
    return parser


@program
def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    prepare_libraries()
    from trainer.tools.judge import judge

    return judge(args)


if __name__ == "__main__":
    sys.exit(main())
