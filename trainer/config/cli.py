"""The command line of a run, generated from the settings' fields, and `--config FILE`, a command line in a file."""

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from trainer.config.argument_parser import ArgumentParser
from trainer.config.choices import LORA_LR_FACTOR, MODES, PRESETS
from trainer.config.errors import UserError
from trainer.config.fields import choices_of, flag_of, unwrap
from trainer.config.files import read_text_file
from trainer.config.flag_suggestions import suggest_flag
from trainer.config.presets import PRESET_VALUES, choose_preset, resolve
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import GROUPS, Settings

TITLES = {name: name for name in GROUPS} | {"lora": "LoRA (with --mode lora)", "train": "training"}


@dataclass(frozen=True, kw_only=True)
class LRRange:
    """The sweep of `--find-lr`."""

    start: float
    end: float
    steps: int = 100

    @classmethod
    def parse(cls, text: str, mode: str) -> "LRRange":
        """From START:END[:STEPS]; `default`: from far too low to far too high, for LoRA ten times higher."""
        if text == "default":
            factor = LORA_LR_FACTOR if mode == "lora" else 1.0
            return cls(start=1e-7 * factor, end=1.0 * factor)
        try:
            start, end, *rest = text.split(":")
            (steps,) = rest or ["100"]
            sweep = cls(start=float(start), end=float(end), steps=int(steps))
            if not (0 < sweep.start < sweep.end < math.inf and sweep.steps >= 20):
                raise ValueError
        except ValueError:
            raise UserError(
                f"--find-lr {text}: expected START:END or START:END:STEPS with 0 < START < END and 20 steps or more, "
                "for instance 1e-6:1"
            ) from None
        return sweep


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


def to_argv(settings: Settings, *groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A command line of the mode, the preset and values {group: {field: value}}, later ones over earlier ones."""
    argv = ["--mode", settings.mode, "--preset", settings.preset]
    for name, group in GROUPS.items():
        values = {key: value for values in groups for key, value in values.get(name, {}).items()}
        for field in dataclasses.fields(group):
            value = values.get(field.name)
            if unwrap(field.type) is bool:  # a switch turns its default round
                argv += [flag_of(field)] if field.name in values and value != field.default else []
            elif value is not None:
                argv += [flag_of(field), ",".join(value) if isinstance(value, tuple) else str(value)]
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
    run_flags = parser.add_argument_group("run")
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
        help="go on from the run folder's newest whole checkpoint, or from the one named; auto: start a new run where "
        "there is none yet",
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
        help="print the tokens of N training examples, target tokens in colour, and the plan; train nothing",
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
        help="also show the messages and warnings of DeepSpeed, transformers and other libraries (for the launcher's "
        "own: deepspeed -q)",
    )
    # the launcher passes it; LOCAL_RANK says the same
    run_flags.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    for name, group in GROUPS.items():
        section = parser.add_argument_group(TITLES[name])
        for field in dataclasses.fields(group):
            _add_flag(section, name, field)
    return parser


def _add_flag(section: Any, group: str, field: dataclasses.Field[Any]) -> None:
    flag, help_text = flag_of(field), field.metadata["help"]
    common = {"dest": f"{group}.{field.name}", "default": argparse.SUPPRESS}
    kind = unwrap(field.type)
    if kind is bool:  # a switch turns its default round
        action = "store_false" if field.default else "store_true"
        section.add_argument(flag, action=action, help=help_text, **common)
        return
    unit = field.metadata["unit"] and f" {field.metadata['unit']}"
    presets = {name: PRESET_VALUES[name].get(group, {}).get(field.name, field.default) for name in PRESETS}
    if field.default is None or field.default == ():
        help_text += f" [{unit.strip()}]" if unit else ""
    elif len(set(presets.values())) == 1:
        help_text += f" (default: {presets['demo']}{unit})"
    else:
        texts = [f"{name} {value}" for name, value in presets.items() if value is not dataclasses.MISSING]
        help_text += f" (default: {', '.join(texts)}{unit})"
    choices = choices_of(kind)
    parse: Any = str
    metavar = _choice_text(choices) if choices else "TEXT"
    if kind in (int, float):
        parse, metavar = partial(_parse_number, kind), "N" if kind is int else "X"
    elif not choices and kind is not str:
        parse, metavar = _split_names, "NAMES"
    section.add_argument(flag, type=parse, help=help_text, metavar=metavar, **common)


def _choice_text(choices: tuple[str, ...]) -> str:
    return f"{{{','.join(choices)}}}"


def _parse_number(kind: type, text: str) -> Any:
    """The number, or the text itself where it is none: the field's check then says what is accepted."""
    try:
        return kind(text)
    except ValueError:
        return text


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


class _Loader(yaml.SafeLoader):
    """YAML's safe reader, which takes the last of two equal keys in silence; here they are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def expand_config(argv: Sequence[str], parser: ArgumentParser) -> list[str]:
    """`argv`, behind the flags of its --config FILE where it has one: those given after it win.

    UserError, in one line that names the file, where it cannot be read or holds what is no flag of `parser`.
    """
    finder = ArgumentParser(add_help=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return list(argv)
    if path.suffix != ".json":
        return [*_yaml_to_argv(path, parser.flags()), *argv]
    if not path.exists():
        raise UserError(f"--config {path}: no such file; expected lines like `lr: 1e-4`, or a run.json")
    settings = Settings.from_dict(read_run_metadata(path)["settings"])
    overrides = {  # but not the run's folder, which is taken
        name: {
            field.name: getattr(getattr(settings, name), field.name)
            for field in dataclasses.fields(group)
            if flag_of(field) in settings.overridden and field.name != "output_dir"
        }
        for name, group in GROUPS.items()
    }
    return [*to_argv(settings, overrides), *argv]


def _yaml_to_argv(path: Path, takes_value: dict[str, bool]) -> list[str]:
    text = read_text_file(path, f"--config {path}", "lines like `lr: 1e-4`, or a run.json")
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # `!!bool maybe`
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or "damaged"
        raise UserError(f"--config {path}{where}: is not YAML ({problem}); expected lines like `lr: 1e-4`") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines like `lr: 1e-4`, or a run.json")
    argv = []
    for key, value in content.items():
        flag = f"--{str(key).lstrip('-').replace('_', '-')}"
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        if flag not in takes_value or flag in ("--config", "--help"):
            raise UserError(f"--config {path}: {suggest_flag(f'--{key}', shown, takes_value)}")
        is_list = isinstance(value, list) and all(isinstance(item, str | int | float) for item in value)
        if value is None or (isinstance(value, bool) and not takes_value[flag]):
            argv += [flag] if value else []
        elif takes_value[flag] and not isinstance(value, bool) and (is_list or isinstance(value, str | int | float)):
            argv.append(f"{flag}={','.join(map(str, value)) if is_list else value}")
        else:
            expected = "a number, a text (in quotes) or a list of them" if takes_value[flag] else "true or false"
            raise UserError(f"--config {path}: {key} is {shown}: expected {expected}")
    return argv
