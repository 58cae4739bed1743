"""Look before a run: `python launch/doctor.py` and the flags of train.py.

Exit code 0: no error found; 1: an error, or the rehearsal failed; 2: a mistake in the flags.
"""

import os
import sys
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, whole_number
from trainer.config.cli import parse_args
from trainer.config.errors import UserError, report_error
from trainer.tracking.safe_stream import protect_standard_streams


def build_parser() -> ArgumentParser:
    """The doctor's own flags; all others are those of train.py."""
    parser = ArgumentParser(
        prog="doctor.py",
        usage="doctor.py --mode full|lora [its other flags] [flags of train.py]\n"
        "       doctor.py --check-run RUN [--move-aside] [--json]",
        description="Check environment, data, model, batch and memory of a run before it starts, and rehearse it in "
        "small: steps, save, resume, evaluation, export. Takes every flag of train.py beside its own.",
        epilog="Exit code: 0 no error, 1 an error was found, 2 a mistake in the flags. "
        "python launch/train.py --help lists the flags of the run.",
    )
    add = parser.add_argument
    add(
        "--ranks",
        type=whole_number,
        metavar="N",
        help="ranks that the run will have (default: one for each GPU, else 1)",
    )
    gpu_memory_help = "plan for GPUs with so much memory, which this machine need not have; without a rehearsal"
    add("--gpu-memory", type=float, metavar="GIB", help=gpu_memory_help)
    add(
        "--prove",
        action="store_true",
        help="instead of the rehearsal: hold every ZeRO stage x ranks x way to run steps against a plain PyTorch loop "
        "on this machine, three steps each, and write prove.json to the run folder",
    )
    add("--json", action="store_true", help="print one JSON object instead")
    add("--no-rehearsal", action="store_true", help="leave out the rehearsal, and time and disk with it")
    limit_help = "give the rehearsal or the proof up after so long (default: 600)"
    add("--limit", type=float, default=600.0, metavar="SECONDS", help=limit_help)
    check_help = "instead: read a run folder whole and say what is damaged and still possible"
    add("--check-run", metavar="RUN", help=check_help)
    add("--move-aside", action="store_true", help="with --check-run: move what is damaged to RUN/damaged")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse and look; a mistake is one line on stderr."""
    parser = build_parser()
    try:
        args, run_argv = parser.parse_known_args(argv)
        if args.check_run is not None and run_argv:
            raise UserError(f"{run_argv[0]}: does not go with --check-run; expected --move-aside or --json")
        cli_args = None if args.check_run is not None else parse_args(run_argv, companion=parser)
        if args.prove and (args.no_rehearsal or args.gpu_memory is not None):
            other = "--no-rehearsal" if args.no_rehearsal else "--gpu-memory"
            raise UserError(f"--prove with {other}: a proof runs here; expected one of them")
        if args.gpu_memory is not None and args.gpu_memory <= 0:
            raise UserError(f"--gpu-memory {args.gpu_memory:g}: expected a number above 0")
        environ = dict(os.environ)
        from trainer.distributed.launch_environment import set_library_environment
        from trainer.tracking.silence import silence_libraries

        if cli_args is None or not cli_args.verbose:
            silence_libraries()  # before the libraries it silences are imported
        set_library_environment()
        if cli_args is None:
            from trainer.tools.doctor.run_checks import run_check

            return run_check(Path(args.check_run), as_json=args.json, should_move=args.move_aside)
        from trainer.tools.doctor.doctor import run_doctor

        return run_doctor(
            cli_args,
            world_size=args.ranks,
            gpu_memory_bytes=None if args.gpu_memory is None else int(args.gpu_memory * 2**30),
            environ=environ,
            as_json=args.json,
            limit_seconds=None if args.no_rehearsal else args.limit,
            proves=args.prove,
        )
    except UserError as error:
        return report_error(error)


if __name__ == "__main__":
    protect_standard_streams()
    sys.exit(main())
