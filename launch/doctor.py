"""Look before a run: `python launch/doctor.py` and the flags of train.py.

Exit code 0: no error found; 1: an error; 2: a mistake in the flags.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, value_type, whole_number
from trainer.config.cli import parse_args
from trainer.config.errors import UserError
from trainer.config.fields import PositiveFloat
from trainer.tools.program import prepare_libraries, program


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="doctor.py",
        description="Check environment, data, model, batch and memory of a run before it starts, and rehearse it in "
        "small: steps, save, resume, evaluation, export. Takes every flag of train.py beside its own.",
    )
    add, gib = parser.add_argument, value_type(PositiveFloat, float)
    prove_help = "instead of the rehearsal: three steps of every ZeRO stage x ranks x way to run steps beside a plain "
    prove_help += "PyTorch loop on this machine"
    add("--ranks", type=whole_number, metavar="N", help="of the run (default: one for each GPU, else 1)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--gpu-memory", type=gib, metavar="GIB", help="plan for GPUs of this memory, which need not be here")
    add("--prove", action="store_true", help=prove_help)
    add("--check-run", type=Path, metavar="RUN", help="instead: say what in a run folder is damaged and still possible")
    add("--upload", type=Path, metavar="RUN", help="instead: send the rows of a run that W&B's server does not have")
    return parser


@program
def main(argv: Sequence[str]) -> int:
    parser = build_parser()
    args, run_argv = parser.parse_known_args(argv)
    if run_argv and (args.check_run or args.upload):
        raise UserError(f"{run_argv[0]}: not with --check-run or --upload")
    if args.check_run is not None:
        prepare_libraries()
        from trainer.tools.doctor.run_checks import run_check

        return run_check(args.check_run)
    if args.upload is not None:
        from trainer.tracking.wandb_logger import upload_run

        print(upload_run(args.upload))
        return 0
    cli_args = parse_args(run_argv, companion=parser, num_ranks=args.ranks or 1)
    prepare_libraries()
    from trainer.tools.doctor.doctor import run_doctor

    gpu_memory_bytes = None if args.gpu_memory is None else int(args.gpu_memory * 2**30)
    return run_doctor(cli_args, world_size=args.ranks, gpu_memory_bytes=gpu_memory_bytes, proves=args.prove)


if __name__ == "__main__":
    sys.exit(main())
