"""Write the files that start a run on several machines: `python launch/cluster.py --slurm|--hosts ...`.

Nothing is submitted or started. Exit code 0: written; 2: a mistake in the flags.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, output_folder, whole_number
from trainer.config.cli import parse_args
from trainer.config.errors import UserError
from trainer.config.files import read_text_file
from trainer.data.sources import refuse_missing_files
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.tools.cluster import parse_hosts, slurm_files, ssh_files, write_files
from trainer.tools.program import prepare_libraries, program

#: Options of sbatch by which the job works; all others may be given by --sbatch.
OWN_OPTIONS = ("nodes", "ntasks-per-node", "tasks-per-node", "signal", "open-mode", "export", "requeue", "no-requeue")
TRAIN_SCRIPT = Path(__file__).absolute().with_name("train.py")


def sbatch_option(text: str) -> tuple[str, str]:
    """The `type` of --sbatch: (name, value), "" for an option without one."""
    name, _, value = text.removeprefix("--").partition("=")
    if name.startswith("ntasks") or any(option.startswith(name) for option in OWN_OPTIONS if name):  # sbatch completes
        raise argparse.ArgumentTypeError(f"{text}: cluster.py sets {name} itself; expected another option")
    if not re.fullmatch(r"[a-z][a-z-]*", name) or not re.fullmatch(r"[!-~]*", value):
        raise argparse.ArgumentTypeError(f"{text}: expected KEY=VALUE or KEY as sbatch takes them, without blanks")
    return name, value


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="cluster.py",
        description="Write a batch script for SLURM, or host list and command for `deepspeed --hostfile`, complete "
        "for the flags given; submits nothing. Takes every flag of train.py beside its own.",
    )
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--slurm", action="store_true", help="a batch script for sbatch: torchrun in one task a node")
    hosts_help = "hosts reached by ssh, the first is this one, and the ranks of each"
    add("--hosts", type=parse_hosts, metavar="NAME:RANKS,...", default={}, help=hosts_help)
    add = parser.add_argument_group("with --slurm").add_argument
    add("--nodes", type=whole_number, metavar="N", help="nodes")
    add("--ranks-per-node", type=whole_number, metavar="N", help="ranks, and GPUs, of each node")
    sbatch_help = "an option of sbatch, such as time=2:00:00, exclusive or gpus-per-node=0; may be repeated"
    add("--sbatch", type=sbatch_option, action="append", default=[], metavar="KEY=VALUE", help=sbatch_help)
    add = parser.add_argument
    add("--setup", type=Path, metavar="FILE", help="shell lines for each host before its ranks, as `module load cuda`")
    add("--folder", type=output_folder, default="cluster", metavar="DIR", help="of the files (default: cluster)")
    return parser


@program
def main(argv: Sequence[str]) -> int:
    parser = build_parser()
    args, run_argv = parser.parse_known_args(argv)
    if args.hosts and (args.nodes or args.ranks_per_node or args.sbatch):
        raise UserError("--nodes, --ranks-per-node and --sbatch: only with --slurm")
    if args.slurm and not (args.nodes and args.ranks_per_node):
        raise UserError("--slurm: expected --nodes N and --ranks-per-node N")
    args.sbatch, setup = dict(args.sbatch), ""
    if args.setup is not None:
        setup = read_text_file(args.setup, f"--setup {args.setup}", "a file of shell lines").rstrip() + "\n"
    num_ranks = sum(args.hosts.values()) or args.nodes * args.ranks_per_node
    cli_args = parse_args(run_argv, companion=parser, num_ranks=num_ranks)
    settings, folder = cli_args.settings, args.folder.absolute()
    if cli_args.dry_run or cli_args.find_batch:
        raise UserError("--dry-run, --show-example and --find-batch go with launch/train.py itself")
    if cli_args.resume not in (None, "auto", "latest"):
        raise UserError(f"--resume {cli_args.resume}: each start would go back there; expected --resume auto, or none")
    settings.train.batch(num_ranks)
    refuse_missing_files(settings.data)
    if settings.engine.ds_config is not None:
        prepare_libraries()
        read_deepspeed_file(settings.engine.ds_config)

    script = os.path.relpath(TRAIN_SCRIPT) if Path.cwd() in TRAIN_SCRIPT.parents else str(TRAIN_SCRIPT)
    is_resumed = any(flag.partition("=")[0] == "--resume" for flag in run_argv)  # else they go on where they were
    command = [script, *run_argv, *([] if is_resumed else ["--resume", "auto"])]
    if args.slurm:
        files = slurm_files(command, settings, args, folder)
    else:
        files = ssh_files(command, settings, args.hosts, folder, os.environ, setup)
    try:
        write_files(folder, files)
    except OSError as error:
        raise UserError(f"--folder {args.folder}: cannot write there: {error.strerror}") from error
    print("\n".join(str(folder / name) for name in files))
    print(f"start it with: {'sbatch' if args.slurm else 'bash'} {shlex.quote(str(folder / list(files)[-1]))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
