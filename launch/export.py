"""Export a run's checkpoint as a checked Hugging Face folder: `python launch/export.py runs/lora --merge`.

Exit code 0: exported, reloaded and equal; 1: the check failed; 2: a mistake in what was asked.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.argument_parser import ArgumentParser, output_folder, value_type
from trainer.config.choices import ExportDtype
from trainer.config.errors import TrainingError, UserError
from trainer.tools.program import prepare_libraries, program


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="export.py",
        description="Write a checkpoint of a run as a folder in Hugging Face's form, load it again with transformers "
        "or peft and compare it with the trained model; the result stands in the folder's model card.",
        epilog="Exit code: 0 exported and checked, 1 the check failed, 2 a mistake in what was asked.",
    )
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="a run folder, for instance runs/lora-acled-demo")
    which = "which of the run's checkpoints (default: latest)"
    add("--checkpoint", default="latest", metavar="step-N|best|latest", help=which)
    add("--merge", action="store_true", help="fold the adapters of a LoRA run into the weights of a plain model")
    add("--answer", type=Path, metavar="FILE", help="answer.json of a study or comparison: its sentence for the card")
    rounding = "round the weights to it; their loss after that is evaluated and said (default: fp32)"
    add("--dtype", type=value_type(ExportDtype), default="fp32", metavar="{fp32,bf16,fp16}", help=rounding)
    add("--push", metavar="NAMESPACE/NAME", help="upload the folder to the Hub, once its check has passed")
    add("--private", action="store_true", help="with --push: make a new repository a private one")
    place = "an empty or new folder for it (default: RUN/export-step-N or RUN/merged-step-N; -DTYPE behind it)"
    add("--output-dir", type=output_folder, metavar="DIR", help=place)
    return parser


@program
def main(argv: Sequence[str]) -> int:
    args = build_parser().parse_args(argv)
    push, is_private = vars(args).pop("push"), vars(args).pop("private")
    if push is None and is_private:
        raise UserError("--private: goes with --push NAMESPACE/NAME")
    prepare_libraries()
    from trainer.export.export_cli import export_checkpoint
    from trainer.export.folder import check_push, push_folder

    if push is not None:
        check_push(push)
    result = export_checkpoint(**vars(args))
    summary = f"{result['checkpoint']} of {args.run_folder} -> {result['folder']}: {result['summary']}"
    if result["problems"]:
        raise TrainingError(summary + ("; nothing is pushed" if push else ""))
    print(summary, flush=True)
    if push is not None:
        print(f"pushed to {push_folder(Path(result['folder']), push, is_private=is_private)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
