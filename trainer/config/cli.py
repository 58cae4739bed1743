"""The command line, generated from the dataclasses of `settings`: a flag cannot drift from its field."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trainer.config.argument_parser import ArgumentParser
from trainer.config.choices import LORA_LR_FACTOR, MODES, PRESETS
from trainer.config.config_file import expand_config, flag_to_argv
from trainer.config.errors import UserError
from trainer.config.fields import choices_of, flag_of, unwrap
from trainer.config.presets import PRESET_VALUES, choose_preset, resolve
from trainer.config.settings import GROUPS, Settings

TITLES = {name: name for name in GROUPS} | {"lora": "LoRA (with --mode lora)", "train": "training"}


@dataclass(frozen=True, kw_only=True)
class LRRange:
    """The sweep of `--find-lr`."""

    start: float
    end: float
    steps: int = 100

    def __post_init__(self) -> None:
        if not (0 < self.start < self.end < math.inf and self.steps >= 20):
            raise UserError(
                f"--find-lr {self.start:g}:{self.end:g}:{self.steps}: expected START:END or START:END:STEPS with "
                "0 < START < END and 20 steps or more"
            )

    @classmethod
    def parse(cls, text: str, mode: str) -> "LRRange":
        """From START:END[:STEPS]; `default`: from far too low to far too high, for LoRA ten times higher."""
        if text == "default":
            factor = LORA_LR_FACTOR if mode == "lora" else 1.0
            return cls(start=1e-7 * factor, end=1.0 * factor)
        try:
            start, end, *rest = text.split(":")
            (steps,) = rest or ["100"]
            return cls(start=float(start), end=float(end), steps=int(steps))
        except ValueError:
            raise UserError(f"--find-lr {text}: expected START:END or START:END:STEPS, for instance 1e-6:1") from None


@dataclass(frozen=True, kw_only=True)
class CliArgs:
    """What the user asked for: the settings of the run, and what to do with them."""

    settings: Settings
    overrides: Mapping[str, Mapping[str, Any]]  #: the flags that were given, {group: {field: value}}
    resume: str | None  #: None, `latest`, `auto` (latest where there is a run, else a new one), `best` or `step-N`
    allow_change: tuple[str, ...]  #: settings that may differ from those of the run that is resumed
    dry_run: bool
    show_example: int = 0  #: training examples whose tokens are printed, before the plan of a dry run
    find_lr: LRRange | None = None  #: a range test instead of the run
    find_batch: bool = False  #: trials of micro-batches instead of the run
    verbose: bool = False  #: whether the libraries' own messages are shown

    @property
    def runs_finder(self) -> bool:
        """Whether something is to be found rather than trained."""
        return self.find_lr is not None or self.find_batch


def parse_args(argv: Sequence[str] | None = None, *, companion: ArgumentParser | None = None) -> CliArgs:
    """What a command line asks for; UserError on any mistake, SystemExit(0) after --help.

    `companion`: the parser that has taken its own flags from the line before.
    """
    parser = build_parser(companion)
    args = vars(parser.parse_args(expand_config(sys.argv[1:] if argv is None else argv, parser)))
    overrides: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    overridden_flags = []
    for name, group in GROUPS.items():
        for field in dataclasses.fields(group):
            if (key := f"{name}.{field.name}") in args:
                overrides[name][field.name] = args[key]
                overridden_flags.append(flag_of(field))
    if args["mode"] is None:
        raise UserError(f"--mode is missing: expected --mode {' or --mode '.join(MODES)}")
    actions = [f"--{name.replace('_', '-')}" for name in ("find_lr", "find_batch", "dry_run", "resume") if args[name]]
    if len(actions) > 1 and actions[0] != "--dry-run":
        raise UserError(f"{actions[0]} and {actions[1]}: one at a time")
    preset = args["preset"] or choose_preset(overrides["model"].get("model"))
    return CliArgs(
        settings=resolve(args["mode"], preset, overrides, tuple(overridden_flags)),
        overrides=overrides,
        resume=args["resume"],
        allow_change=tuple(name.replace("-", "_") for names in args["allow_change"] for name in names.split(",")),
        dry_run=args["dry_run"] or args["show_example"] > 0,
        show_example=args["show_example"],
        find_lr=LRRange.parse(args["find_lr"], args["mode"]) if args["find_lr"] else None,
        find_batch=args["find_batch"],
        verbose=args["verbose"],
    )


def to_argv(cli_args: CliArgs, **replacements: Mapping[str, Any]) -> list[str]:
    """A command line of the mode, the preset and the overridden settings, with `replacements` (by group) over them."""
    argv = ["--mode", cli_args.settings.mode, "--preset", cli_args.settings.preset]
    for name, group in GROUPS.items():
        values = {**cli_args.overrides.get(name, {}), **replacements.get(name, {})}
        for field in dataclasses.fields(group):
            if field.name in values:
                argv += flag_to_argv(field, values[field.name])
    return argv


def build_parser(companion: ArgumentParser | None = None) -> ArgumentParser:
    """The argument parser; a setting not given is absent from its result, so that presets can fill it."""
    parser = ArgumentParser(
        companion=companion,
        prog="deepspeed launch/train.py",
        usage="deepspeed launch/train.py --mode full|lora [--model MODEL] [--data DATA] [flags as below]",
        description="Fine-tune GPT-2 or another causal language model: every weight (full) or LoRA adapters (lora).",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )
    _add_run_flags(parser.add_argument_group("run"))
    for name, group in GROUPS.items():
        section = parser.add_argument_group(TITLES[name])
        for field in dataclasses.fields(group):
            _add_flag(section, name, field)
    return parser


def _add_run_flags(run_flags: Any) -> None:
    """The flags that are no settings."""
    run_flags.add_argument("--mode", metavar=_choice_text(MODES), help="train every weight, or LoRA adapters")
    run_flags.add_argument(
        "--config",
        metavar="FILE",
        help="flags from a file, before all that are given: YAML with the flags' names, or a run's run.json",
    )
    run_flags.add_argument(
        "--preset",
        metavar=_choice_text(PRESETS),
        help="demo: embedded model and data, sized for a CPU; card: the published settings of gpt2-acled-t2s; "
        "finetune: any other model (default: the one that fits --model)",
    )
    run_flags.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="step-N|best|auto",
        help="go on from the run folder's newest whole checkpoint, or from the one named; auto: begin where there is "
        "no run yet",
    )
    run_flags.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="NAME",
        help="with --resume: let this setting differ from the first part of the run; recorded (for instance lr)",
    )
    run_flags.add_argument("--dry-run", action="store_true", help="resolve everything, print the plan, train nothing")
    run_flags.add_argument(
        "--show-example",
        type=int,
        default=0,
        metavar="N",
        help="print the tokens of N training examples, those that are learnt coloured, and the plan; train nothing",
    )
    run_flags.add_argument(
        "--find-lr",
        nargs="?",
        const="default",
        metavar="START:END[:STEPS]",
        help="suggest a learning rate by a range test, train nothing (default: 1e-7:1, with --mode lora 1e-6:10, "
        "in 100 steps)",
    )
    run_flags.add_argument(
        "--find-batch",
        action="store_true",
        help="try micro-batches for this global batch, suggest the fastest that fits, train nothing",
    )
    run_flags.add_argument(
        "--verbose",
        action="store_true",
        help="show what DeepSpeed, transformers and the others log and warn of, too (the launcher's own: deepspeed -q)",
    )
    # the launcher passes it; LOCAL_RANK says the same
    run_flags.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_flag(section: Any, group: str, field: dataclasses.Field[Any]) -> None:
    flag, help_text = flag_of(field), field.metadata["help"]
    common = {"dest": f"{group}.{field.name}", "default": argparse.SUPPRESS}
    if unwrap(field.type) is bool:  # a switch: given, it is the other way round
        action = "store_false" if field.default else "store_true"
        section.add_argument(flag, action=action, help=help_text, **common)
        return
    choices = choices_of(field.type)
    parse, metavar = (str, _choice_text(choices)) if choices else _PARSERS.get(unwrap(field.type), _NAMES_PARSER)
    section.add_argument(flag, type=parse, help=help_text + _default_text(group, field), metavar=metavar, **common)


def _choice_text(choices: tuple[str, ...]) -> str:
    return f"{{{','.join(choices)}}}"


def _parse_number(kind: type, text: str) -> Any:
    """The number, or the text as it is where it is none: the field's check then says what would be accepted."""
    try:
        return kind(text)
    except ValueError:
        return text


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


_NAMES_PARSER = (_split_names, "NAMES")
_PARSERS: dict[Any, tuple[Any, str]] = {
    int: (partial(_parse_number, int), "N"),
    float: (partial(_parse_number, float), "X"),
    str: (str, "TEXT"),
}


def _default_text(group: str, field: dataclasses.Field[Any]) -> str:
    """The default as `--help` prints it, with the unit; each preset's where they differ."""
    unit = field.metadata["unit"] and f" {field.metadata['unit']}"
    presets = {name: PRESET_VALUES[name].get(group, {}).get(field.name, field.default) for name in PRESETS}
    if field.default is None or field.default == ():
        return f" [{unit.strip()}]" if unit else ""
    if len(set(presets.values())) == 1:
        return f" (default: {presets['demo']}{unit})"
    texts = [f"{name} {value}" for name, value in presets.items() if value is not dataclasses.MISSING]
    return f" (default: {', '.join(texts)}{unit})"
