"""The command line of a run, generated from the settings' fields, and `--config FILE`, a command line in a file."""

import argparse
import dataclasses
import shutil
import typing
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from trainer.config.argument_parser import ArgumentParser, value_type, whole_number
from trainer.config.choices import MODES, PRESETS, Mode, Preset
from trainer.config.errors import UserError
from trainer.config.fields import Accepts, PeftConfig, UserPath, flag_of, unwrap
from trainer.config.files import read_text_file
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import GROUPS, Settings, resolve
from trainer.config.spellings import translate

CONFIG_EXPECTED = "expected lines like `lr: 1e-4`, or a run.json"
ResumePoint = Annotated[str, Accepts("step-N, best, auto or latest", pattern="^(step-[0-9]+|best|auto|latest)$")]


@dataclass(frozen=True, kw_only=True)
class CliArgs:
    """What the user asked for: the settings of the run, and what to do with them."""

    settings: Settings
    resume: str | None  #: None, `latest`, `auto` (latest where there is a run, else a new one), `best` or `step-N`
    allow_change: tuple[str, ...]  #: settings that may differ from those of the run that is resumed
    dry_run: bool
    show_example: int = 0  #: training examples whose tokens are printed, before the plan of a dry run
    find_batch: bool = False  #: trials of micro-batches instead of the run
    notes: tuple[str, ...] = ()  #: what spellings of other programs were taken for


def parse_args(argv: Sequence[str], *, companion: ArgumentParser | None = None, num_ranks: int = 1) -> CliArgs:
    """What a command line asks for; UserError with all mistakes, SystemExit(0) after --help. `companion`: the parser
    that has taken its own flags from the line before. `num_ranks`: by which a batch per device is multiplied."""
    parser = build_parser(companion)
    translation = translate(expand_config(argv, parser), parser.flags(), num_ranks)
    parsed, problems = parser.parse_all(translation.words)
    problems, args = [*translation.problems, *problems], vars(parsed)
    flags = [_flag_in(word) for word in argv]
    for flag in ("--data", "--test-data"):  # of which the last one alone would count
        if (times := flags.count(flag)) > 1:
            remedy = ", several with weights as --data A=0.7 B=0.3" * (flag == "--data")
            problems.append(f"{flag}: given {times} times; expected once{remedy}")
    overrides: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    overridden_flags = []
    for name, group in GROUPS.items():
        for field in dataclasses.fields(group):
            if (key := f"{name}.{field.name}") in args:
                overrides[name][field.name] = args[key]
                overridden_flags.append(flag_of(field))
    if args["mode"] is None and not problems:  # of which one may be about what was meant for it
        problems.append(f"--mode is missing: expected --mode {' or --mode '.join(MODES)}")
    try:
        # --mode lora refuses least
        settings = resolve(args["mode"] or "lora", args["preset"], overrides, tuple(overridden_flags))
    except UserError as error:
        problems += error.args
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return CliArgs(
        settings=settings,
        allow_change=tuple(name.replace("-", "_") for names in args["allow_change"] for name in names.split(",")),
        dry_run=args["dry_run"] or args["show_example"] > 0,
        notes=tuple(translation.notes),
        **{name: args[name] for name in ("resume", "show_example", "find_batch")},
    )


def to_own_flags(argv: Sequence[str], *, num_ranks: int) -> list[str]:
    """Words of a command line in our flags; UserError for what has no equivalent."""
    translation = translate(argv, build_parser().flags(), num_ranks)
    if translation.problems:
        raise UserError(*translation.problems)
    return translation.words


def to_argv(settings: Settings, changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A command line of the mode, the preset and what the user gave, with changes {group: {field: value}} to that."""
    argv = ["--mode", settings.mode, "--preset", settings.preset]
    for name, group in GROUPS.items():
        values = {**settings.overrides[name], **changes.get(name, {})}
        for field in dataclasses.fields(group):
            value = values.get(field.name)
            if unwrap(field.type) is bool:
                argv += [flag_of(field)] if value else []
            elif field.metadata["is_repeated"]:
                argv += [f"{flag_of(field)}={item}" for item in value or ()]
            elif value is not None:  # in one word, as a value may begin with a dash
                argv.append(f"{flag_of(field)}={','.join(value) if isinstance(value, tuple) else value}")
    return argv


def build_parser(companion: ArgumentParser | None = None) -> ArgumentParser:
    """The argument parser; a setting not given is absent from its result, so that presets can fill it."""
    width = min(110, shutil.get_terminal_size().columns - 2)
    parser = ArgumentParser(
        companion=companion,
        prog="deepspeed launch/train.py",
        usage="deepspeed launch/train.py --mode full|lora [--model M] [--data D] [flags]",
        description="Fine-tune GPT-2 or another causal language model: every weight (full) or LoRA adapters (lora).",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=width),
    )
    add = parser.add_argument_group("run").add_argument
    config_help = "flags from a file, before all that are given: YAML with the flags' names, or a run's run.json"
    preset_help = "demo: built-in model and data; card: what gpt2-acled-t2s published; gpt2: GPT-2 on other data; "
    preset_help += "finetune: any other model (default: the one that fits --model, else --data)"
    resume_help = "go on from the newest whole checkpoint or this one; auto: start a new run if there is none yet"
    allow_help = "with --resume: let this setting differ from the first part of the run; recorded (for instance lr)"
    example_help = "print the tokens of N training examples, target tokens in colour, and the plan; train nothing"
    batch_help = "try micro-batches for this global batch, suggest the fastest that fits, train nothing"
    add("--mode", type=value_type(Mode), metavar=_choice_text(MODES), help="train every weight, or LoRA adapters")
    add("--config", metavar="FILE", help=config_help)
    add("--preset", type=value_type(Preset), metavar=_choice_text(PRESETS), help=preset_help)
    resume_type = value_type(ResumePoint)
    add("--resume", nargs="?", const="latest", type=resume_type, metavar="step-N|best|auto", help=resume_help)
    add("--allow-change", action="append", default=[], metavar="NAME", help=allow_help)
    add("--dry-run", action="store_true", help="resolve everything, print the plan, train nothing")
    add("--show-example", type=whole_number, default=0, metavar="N", help=example_help)
    add("--find-batch", action="store_true", help=batch_help)
    # the launcher passes it; LOCAL_RANK says the same
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    for name, group in GROUPS.items():
        section = parser.add_argument_group({"lora": "LoRA (with --mode lora)", "train": "training"}.get(name, name))
        for field in dataclasses.fields(group):
            _add_flag(section.add_argument, name, field)
    return parser


def _add_flag(add: Any, group: str, field: dataclasses.Field[Any]) -> None:
    kind, help_text = unwrap(field.type), field.metadata["help"]
    options: dict[str, Any] = {"dest": f"{group}.{field.name}", "default": argparse.SUPPRESS}
    if kind is bool:
        add(flag_of(field), action="store_true", help=help_text, **options)
        return
    presets = field.metadata["presets"]
    if presets and field.default is not None:
        values = {name: presets.get(name, field.default) for name in PRESETS}
        texts = [f"{name} {value}" for name, value in values.items() if isinstance(value, int | float | str)]
        help_text += f" (default: {', '.join(texts) if len(set(values.values())) > 1 else values['demo']})"
    elif field.default not in (None, ()):
        help_text += f" (default: {field.default})"
    if typing.get_origin(kind) is Literal:
        options |= {"metavar": _choice_text(typing.get_args(kind)), "type": value_type(field.type)}
        if len(options["metavar"]) > 60:  # which no line of help would break
            help_text, options["metavar"] = f"{help_text}: {', '.join(typing.get_args(kind))}", "NAME"
    elif field.metadata["is_repeated"]:
        options |= {"metavar": "NAME", "action": "extend", "type": value_type(field.type, lambda text: (text,))}
    elif typing.get_origin(kind) is tuple:
        split = value_type(field.type, lambda text: tuple(name.strip() for name in text.split(",")))
        options |= {"metavar": "NAMES", "type": split}
    else:
        is_path = {UserPath, PeftConfig} & {field.type, *typing.get_args(field.type)}
        metavar = "PATH" if is_path else {int: "N", float: "X", str: "TEXT"}[kind]
        options |= {"metavar": metavar, "type": value_type(field.type, kind)}
    add(flag_of(field), help=help_text, **options)


def _choice_text(choices: Sequence[str]) -> str:
    return f"{{{','.join(choices)}}}"


def _flag_in(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def expand_config(argv: Sequence[str], parser: ArgumentParser) -> list[str]:
    """`argv` behind the words of each --config FILE: of a flag that is given twice the last one counts. UserError, in
    one line that names the file, where it cannot be read."""
    finder = ArgumentParser(add_help=False)
    finder.add_argument("--config", type=Path, action="append", default=[])
    fields = [field for group in GROUPS.values() for field in dataclasses.fields(group)]
    repeated = {flag_of(field) for field in fields if field.metadata["is_repeated"]}
    sources = list[Sequence[str]]()
    for path in finder.parse_known_args(argv)[0].config:
        if path.suffix != ".json":
            sources.append(_yaml_to_argv(path, parser.flags(), repeated))
            continue
        if not path.exists():
            raise UserError(f"--config {path}: no such file; {CONFIG_EXPECTED}")
        settings = Settings(**read_run_metadata(path)["settings"])
        sources.append(to_argv(settings, {"output": {"output_dir": None}}))  # not the run's folder, which is taken
    expanded = list[str]()
    for words in (*sources, argv):
        replaced = repeated & {_flag_in(word) for word in words}  # else the values before would come beside these
        expanded = [*(word for word in expanded if _flag_in(word) not in replaced), *words]
    return expanded


def _yaml_to_argv(path: Path, takes_value: Mapping[str, bool], repeated_flags: Container[str]) -> list[str]:
    """The flags of a YAML file, from its text as it stands: of `off`, `1e-4` and `no` YAML would make other values."""
    text = read_text_file(path, f"--config {path}", CONFIG_EXPECTED.removeprefix("expected "))
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or "damaged"
        raise UserError(f"--config {path}{where}: is not YAML ({problem}); {CONFIG_EXPECTED}") from error
    argv: dict[str, list[str]] = {}
    pairs = root.value if isinstance(root, yaml.MappingNode) else [] if root is None else [(root, root)]
    for key_node, node in pairs:
        where = f"--config {path}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode) or key_node is node:
            raise UserError(f"{where}: {CONFIG_EXPECTED}")
        key = key_node.value.lstrip("-").replace("-", "_")
        flag = f"--{key.replace('_', '-')}"
        if flag in ("--config", "--help"):
            raise UserError(f"{where}: {flag}: belongs on the command line only")
        if key in argv:
            raise UserError(f"{where}: {key_node.value} is given twice; expected once")
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        source = " ".join(text[node.start_mark.index : node.end_mark.index].split())
        value = source  # of another program, where it is no list of values
        if all(isinstance(item, yaml.ScalarNode) for item in items):
            value = (" " if flag == "--data" else ",").join(item.value for item in items)
        elif flag in takes_value:
            expected = "expected a number, a text (in quotes) or a list of them"
            if isinstance(node, yaml.MappingNode):
                expected = f'YAML reads {source} as a mapping; write {key_node.value}: "{source}"'
            raise UserError(f"{where}: {key_node.value}: {expected}")
        name = flag if flag in takes_value else f"--{key}"
        is_null = node.tag == "tag:yaml.org,2002:null"
        values = [item.value for item in items] if flag in repeated_flags else [value]
        argv[key] = [] if is_null else [f"{name}={text}" for text in values]
    return [word for words in argv.values() for word in words]
