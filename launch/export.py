"""Export a run's checkpoint as a checked Hugging Face folder: `python launch/export.py runs/lora --merge`.

Exit code 0: exported, reloaded and equal; 1: the check failed; 2: a mistake in what was asked.
"""

import sys
from pathlib import Path
from typing import get_args

from trainer.config.argument_parser import ArgumentParser
from trainer.config.choices import ExportDtype
from trainer.config.errors import TrainingError, UserError, report_error
from trainer.tracking.safe_stream import protect_standard_streams


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="export.py",
        description="Write a checkpoint of a run as a folder in Hugging Face's form, load it again with transformers "
        "or peft and compare it with the trained model; the result stands in the folder's model card.",
        epilog="Exit code: 0 exported and checked, 1 the check failed, 2 a mistake in what was asked.",
    )
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, for instance runs/lora-acled-demo")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="step-N|best|latest",
        help="which of the run's checkpoints (default: latest)",
    )
    parser.add_argument(
        "--merge", action="store_true", help="fold the adapters of a LoRA run into the weights of a plain model"
    )
    parser.add_argument(
        "--answer", type=Path, metavar="FILE", help="answer.json of a study or a comparison: its sentence for the card"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(ExportDtype),
        default="fp32",
        metavar=f"{{{','.join(get_args(ExportDtype))}}}",
        help="round the weights to it; their loss after that is evaluated and said (default: fp32)",
    )
    parser.add_argument(
        "--push",
        metavar="NAMESPACE/NAME",
        help="upload the folder to this repository of the hub, once its check has passed",
    )
    parser.add_argument("--private", action="store_true", help="with --push: make a new repository a private one")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where the folder goes; it must be empty or not there yet "
        "(default: RUN/export-step-N, with --merge RUN/merged-step-N; -DTYPE behind it)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse and do what was asked; a mistake is one line on stderr."""
    try:
        args = build_parser().parse_args(argv)
        from trainer.distributed.launch_environment import set_library_environment
        from trainer.tracking.silence import silence_libraries

        silence_libraries()  # before the libraries it silences are imported
        set_library_environment()
        from trainer.export.export_cli import run_export_command

        return run_export_command(**vars(args))
    except (UserError, TrainingError) as error:
        return report_error(error)


if __name__ == "__main__":
    protect_standard_streams()
    sys.exit(main())
