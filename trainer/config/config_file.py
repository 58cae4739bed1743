"""`--config FILE`: a command line kept in a file: YAML with the flags' names, or a run.json to run it again."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.config.argument_parser import ArgumentParser
from trainer.config.errors import UserError
from trainer.config.fields import flag_of, unwrap
from trainer.config.files import read_text_file
from trainer.config.flag_suggestions import suggest_flag
from trainer.config.run_metadata import read_run_metadata
from trainer.config.settings import GROUPS, Settings

FLAG = "--config"


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
    finder.add_argument(FLAG, type=Path)
    path = finder.parse_known_args(argv)[0].config
    if path is None:
        return list(argv)
    config_argv = _run_to_argv(path) if path.suffix == ".json" else _yaml_to_argv(path, parser.flags())
    return [*config_argv, *argv]


def _run_to_argv(path: Path) -> list[str]:
    """Mode, preset and what was given of the run of a run.json, but not its folder: that one is taken."""
    if not path.exists():
        raise UserError(f"{FLAG} {path}: no such file; expected lines like `lr: 1e-4`, or a run.json")
    settings = Settings.from_dict(read_run_metadata(path)["settings"])
    argv = ["--mode", settings.mode, "--preset", settings.preset]
    for name, group in GROUPS.items():
        for field in dataclasses.fields(group):
            flag = flag_of(field)
            if flag in settings.overridden and flag != "--output-dir":
                argv += flag_to_argv(field, getattr(getattr(settings, name), field.name))
    return argv


def _yaml_to_argv(path: Path, takes_value: dict[str, bool]) -> list[str]:
    text = read_text_file(path, f"{FLAG} {path}", "lines like `lr: 1e-4`, or a run.json")
    try:
        content = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place else ""
        problem = getattr(error, "problem", None) or "damaged"
        raise UserError(f"{FLAG} {path}{where}: is not YAML ({problem}); expected lines like `lr: 1e-4`") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"{FLAG} {path}: expected lines like `lr: 1e-4`, or a run.json")
    return [word for key, value in content.items() for word in _entry_to_argv(path, str(key), value, takes_value)]


def _entry_to_argv(path: Path, key: str, value: Any, takes_value: dict[str, bool]) -> list[str]:
    flag = f"--{key.lstrip('-').replace('_', '-')}"
    if flag not in takes_value or flag in (FLAG, "--help"):
        raise UserError(f"{FLAG} {path}: {suggest_flag(f'--{key}', _show(value), takes_value)}")
    if value is None:
        return []
    is_switch = not takes_value[flag]
    is_scalar = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    is_list = isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value)
    if is_switch != isinstance(value, bool) or not (is_switch or is_scalar or is_list):
        expected = "true or false" if is_switch else "a number, a text (in quotes) or a list of them"
        raise UserError(f"{FLAG} {path}: {key} is {_show(value)}: expected {expected}")
    if is_switch:
        return [flag] if value else []
    return [f"{flag}={','.join(map(str, value)) if is_list else value}"]


def flag_to_argv(field: dataclasses.Field[Any], value: Any) -> list[str]:
    """A settings field as words of a command line; none where it is left out, or a switch that is not thrown."""
    flag = flag_of(field)
    if unwrap(field.type) is bool:
        return [flag] if value != field.default else []
    if value is None:
        return []
    return [flag, ",".join(value) if isinstance(value, tuple) else str(value)]


def _show(value: Any) -> str:
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
