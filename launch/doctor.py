"""Look before a run: `python launch/doctor.py` and the flags of train.py.

Exit code 0: no error found; 1: an error, or the rehearsal failed; 2: a mistake in the flags.
"""

import argparse
import os
import sys


def parser() -> argparse.ArgumentParser:
    """The doctor's own flags; all others are those of train.py."""
    own = argparse.ArgumentParser(
        prog="doctor.py",
        usage="doctor.py --mode full|lora [--ranks N] [--json] [--no-rehearsal] [--limit SECONDS] [flags of train.py]",
        description="Check environment, data, model, batch sum and memory of a run before it starts, and rehearse it "
        "in small: steps, save, resume, evaluation, export. Takes every flag of train.py beside its own.",
        epilog="Exit code: 0 no error, 1 an error was found, 2 a mistake in the flags. "
        "python launch/train.py --help lists the flags of the run.",
        allow_abbrev=False,
    )
    own.add_argument(
        "--ranks", type=int, metavar="N", help="ranks that the run will have (default: one for each GPU, else 1)"
    )
    own.add_argument("--json", action="store_true", help="print one JSON object instead")
    own.add_argument("--no-rehearsal", action="store_true", help="leave out the rehearsal, and time and disk with it")
    own.add_argument(
        "--limit",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="give the rehearsal up after so long (default: 600)",
    )
    return own


def main(arguments: list[str] | None = None) -> int:
    """Parse and look; a mistake is one line on stderr."""
    own, rest = parser().parse_known_args(arguments)
    from trainer.config.cli import read
    from trainer.config.errors import UserError

    try:
        request = read(rest)
        if own.ranks is not None and own.ranks < 1:
            raise UserError(f"--ranks {own.ranks}: expected a whole number from 1")
        environ = dict(os.environ)
        from trainer.tracking.silence import quiet

        quiet()  # before the libraries it silences are imported
        from trainer.tools.doctor.doctor_cli import run

        return run(
            request, environ=environ, ranks=own.ranks, as_json=own.json, rehearse=not own.no_rehearsal, limit=own.limit
        )
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
