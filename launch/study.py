"""Choose a method and a rate for your data: `python launch/study.py --data records.csv --max-steps 200`.

Runs launch/train.py for every way, learning rate and seed, compares the runs, and prints one table. All other flags
go to launch/train.py. Started again, it goes on where it was. Exit code: 0 done, 1 a run failed, 2 a mistake.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config.argument_parser import ArgumentParser
from trainer.config.cli import parse_args
from trainer.config.errors import UserError, report_error


def build_parser() -> ArgumentParser:
    """The command line; what it does not know is for launch/train.py."""
    parser = ArgumentParser(prog="study.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--output-dir",
        type=Path,
        default=Path("study"),
        metavar="DIR",
        help="folder of the runs and the report (default: study)",
    )
    add("--workers", type=int, default=1, metavar="N", help="runs side by side, which share the cores (default: 1)")
    add(
        "--methods", default="full,lora,dora,rslora,lora-nf4", metavar="NAMES",
        help="of full, lora, dora, rslora, pissa, lora-nf4, lora-int8 (default: full,lora,dora,rslora,lora-nf4)",
    )  # fmt: skip
    add("--seeds", default="1,2,3", metavar="N,N", help="default: 1,2,3")
    add("--ranks", default="8,2,32", metavar="N,N", help="of lora; the other adapters take the first (default: 8,2,32)")
    add(
        "--full-factors",
        default="1,3,10",
        metavar="X,X",
        help="rates of full, times the preset's or --lr (default: 1,3,10)",
    )
    add("--lora-factors", default="3,10,30,100", metavar="X,X", help="rates of lora, likewise (default: 3,10,30,100)")
    add("--other-factors", default="10", metavar="X,X", help="rates of the other adapters, likewise (default: 10)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse, run, compare, print; a mistake is one line on stderr."""
    from trainer.tools.study import study

    parser = build_parser()
    try:
        args, train_argv = parser.parse_known_args(argv)
        parse_args(["--mode", "full", *train_argv], companion=parser)
        if args.workers < 1:
            raise UserError(f"--workers {args.workers}: expected a whole number from 1")
        search_space = study.SearchSpace(
            methods=tuple(args.methods.split(",")), seeds=_parse_numbers("--seeds", args.seeds, int),
            lora_ranks=_parse_numbers("--ranks", args.ranks, int),
            full_factors=_parse_numbers("--full-factors", args.full_factors, float),
            lora_factors=_parse_numbers("--lora-factors", args.lora_factors, float),
            other_factors=_parse_numbers("--other-factors", args.other_factors, float),
        )  # fmt: skip
        study_runs = study.build_runs(search_space, args.output_dir, train_argv)
        failures = study.execute_runs(study_runs, args.workers, lambda line: print(line, flush=True))
    except UserError as error:
        return report_error(error)
    folders = [study_run.folder for study_run in study_runs]
    seed_groups = study.read_groups(folders)
    if seed_groups:
        run_dirs = [str(run.source) for group in seed_groups for run in group.runs]
        compare_command = [sys.executable, str(Path(__file__).parent / "compare.py"), *run_dirs, "--no-card"]
        subprocess.run([*compare_command, "--output-dir", str(args.output_dir / "comparison")], check=False)
        table_text = "\n".join(study.markdown_table(seed_groups))
        (args.output_dir / "study.md").write_text(table_text + "\n")
        print(table_text)
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failures else 0


def _parse_numbers(flag: str, text: str, number_type: Callable[[str], Any]) -> tuple[Any, ...]:
    """The numbers of a comma-separated list; UserError where one is none, or not above 0."""
    try:
        numbers = tuple(number_type(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) <= 0:
        raise UserError(f"{flag} {text}: expected numbers above 0 separated by commas")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
