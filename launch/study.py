"""Choose a method and a rate for your data: `python launch/study.py --data records.csv --max-steps 200`.

Runs launch/train.py for every way, learning rate and seed, compares the runs, and prints one table. All other flags
go to launch/train.py. Started again, it goes on where it was. Exit code: 0 done, 1 a run failed, 2 a mistake.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is for launch/train.py."""
    own = argparse.ArgumentParser(prog="study.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = own.add_argument
    add(
        "--out",
        type=Path,
        default=Path("study"),
        metavar="DIR",
        help="folder of the runs and the report (default: study)",
    )
    add("--at-once", type=int, default=1, metavar="N", help="runs side by side, which share the cores (default: 1)")
    add(
        "--ways", default="full,lora,dora,rslora,lora-nf4", metavar="NAMES",
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
    return own


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, compare, print; a mistake is one line on stderr."""
    given, passed = parser().parse_known_args(arguments)
    from trainer.config.errors import UserError
    from trainer.tools.study import study

    try:
        if given.at_once < 1:
            raise UserError(f"--at-once {given.at_once}: expected a whole number from 1")
        grid = study.Grid(
            families=tuple(given.ways.split(",")), seeds=_numbers("--seeds", given.seeds, int),
            ranks=_numbers("--ranks", given.ranks, int),
            full_factors=_numbers("--full-factors", given.full_factors, float),
            lora_factors=_numbers("--lora-factors", given.lora_factors, float),
            other_factors=_numbers("--other-factors", given.other_factors, float),
        )  # fmt: skip
        made = study.trials(grid, given.out, passed)
        failed = study.carry_out(made, given.at_once, lambda line: print(line, flush=True))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    folders = [trial.folder for trial in made]
    found = study.read(folders)
    if found:
        done = [str(run.source) for group in found for run in group.runs]
        compare = [sys.executable, str(Path(__file__).parent / "compare.py"), *done, "--no-card"]
        subprocess.run([*compare, "--out", str(given.out / "comparison")], check=False)
        text = "\n".join(study.table(found))
        (given.out / "study.md").write_text(text + "\n")
        print(text)
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


def _numbers(flag: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """The numbers of a comma-separated list; UserError where one is none, or not above 0."""
    from trainer.config.errors import UserError

    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) <= 0:
        raise UserError(f"{flag} {text}: expected numbers above 0 separated by commas")
    return found


if __name__ == "__main__":
    sys.exit(main())
