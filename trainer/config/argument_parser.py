"""The argument parser of every program here: a mistake is one line, and an unknown flag is answered with ours."""

import argparse
import contextlib
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trainer.config.errors import UserError, mask_credentials
from trainer.config.files import expand_user_path

TEXT_FLAGS = {"--prompt", "--completion"}  # what they hold is no name


def whole_number(text: str, least: int = 1, most: int = 2**31 - 1) -> int:
    """The `type` of a flag that takes a whole number."""
    if not (re.fullmatch(r"[0-9]{1,10}", text) and least <= int(text) <= most):
        limit = "" if most == 2**31 - 1 else f" to {most}"
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least}{limit}")
    return int(text)


def number(least: float, most: float = sys.float_info.max) -> Callable[[str], float]:
    """The `type` of a flag that takes a number in a range."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= float(text) <= most:
                return float(text)
        limit = "" if most == sys.float_info.max else f" to {most:g}"
        raise argparse.ArgumentTypeError(f"{text}: expected a number from {least:g}{limit}")

    return parse


def whole_numbers(text: str) -> tuple[int, ...]:
    """The `type` of a flag that takes whole numbers from 1, separated by commas."""
    return tuple(whole_number(part.strip()) for part in text.split(","))


def user_path(text: str) -> str:
    """The `type` of a flag that takes a path as a text; that of `Path` is the same."""
    try:
        return expand_user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError in place of printing the usage; the caller prints one line, once."""

    def __init__(self, *, companion: "ArgumentParser | None" = None, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})
        self.register("type", Path, lambda text: Path(user_path(text)))
        self.companion = companion  # of the program that hands on what it does not know: its flags are suggested too

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """argparse's own; UserError for a word that holds a key, a token or a login (run.json would keep it), and for
        a value that can be no file's name."""
        argv = sys.argv[1:] if args is None else args
        try:
            os.getcwd()
        except OSError:  # which libraries do not expect
            raise UserError("the folder that this shell is in has been removed; change to another one") from None
        for i, word in enumerate(argv):
            if mask_credentials(word) != word:
                flag = next((name for name in reversed(argv[: i + 1]) if name.startswith("--")), word)
                raise UserError(
                    f"{flag.partition('=')[0]}: its value holds a token or a login, which process lists and run.json "
                    "would show; give it by HF_TOKEN, WANDB_API_KEY, or the login of the program that asks for it"
                )
            flag, _, text = word.partition("=")
            if flag.startswith("--") and text == "--":  # of which argparse makes an empty list
                raise UserError(f"{flag} --: expected another value")
        parsed = super().parse_known_args(argv, namespace)
        for action in self._actions:
            values, flags = getattr(parsed[0], action.dest, None), action.option_strings
            for value in values if isinstance(values, list | tuple) else [values]:
                if isinstance(value, str | Path) and TEXT_FLAGS.isdisjoint(flags) and not _is_name(value):
                    raise UserError(
                        f"{'/'.join(flags) or action.metavar} {str(value)[:40]}: expected a name of a file, "
                        "at most 255 bytes between two slashes, 4,095 in all"
                    )
        return parsed

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The parsed arguments; UserError for a flag that is not known, with the one that was meant."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag, *rest = next((unknown[i:] for i, word in enumerate(unknown) if word.startswith("-")), unknown)
            if not flag.startswith("-"):
                raise UserError(f"{flag}: expected a flag (--help lists the flags)")
            name, has_value, value = flag.partition("=")
            if not has_value and rest and not rest[0].startswith("--"):
                value = rest[0]
            raise UserError(
                suggest_flag(name, value, self.flags() | (self.companion.flags() if self.companion else {}))
            )
        return parsed

    def flags(self) -> dict[str, bool]:
        """The flags that --help lists, and whether each takes a value."""
        return {
            flag: action.nargs != 0
            for action in self._actions
            for flag in action.option_strings
            if action.help != argparse.SUPPRESS
        }


def _is_name(value: str | Path) -> bool:
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:  # half of a pair of JSON's or YAML's `\\ud800`
        return False
    return 0 not in path and len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255  # Linux: PATH_MAX, NAME_MAX


@functools.cache
def read_suggestions() -> tuple[dict[str, str], dict[str, str]]:
    """({spelling elsewhere: our answer}, {value elsewhere: ours}), from the table beside this file."""
    table = yaml.safe_load(Path(__file__).with_name("flag_suggestions.yaml").read_text(encoding="utf-8"))
    values = table.pop("values")
    return {spelling: answer for answer, spellings in table.items() for spelling in spellings.split()}, values


def suggest_flag(flag: str, value: str, takes_value: Mapping[str, bool]) -> str:
    """One line that answers an unknown flag, the value (empty: none) carried over.

    `takes_value`: the flags that exist, and whether each is followed by a value; only those are suggested.
    """
    suggestions, values = read_suggestions()
    answers = {
        name: answer for name, answer in suggestions.items() if answer.split()[0] in takes_value or answer[0] != "-"
    }
    answers |= {name.lstrip("-").replace("-", "_"): name for name in takes_value}
    nearest = difflib.get_close_matches(flag.lstrip("-").lower().replace("-", "_"), answers, n=1, cutoff=0.8)
    shown = f"{flag} {value}".rstrip()
    if not nearest:
        return f"{shown}: unknown flag (--help lists the flags)"
    answer = answers[nearest[0]]
    if not answer.startswith("-"):
        return f"{shown}: {answer}"
    if " " not in answer and takes_value[answer]:
        return f"{shown}: did you mean {answer} {values.get(value, value)}".rstrip() + "?"
    if value.lower() in ("false", "no", "0", "off", "none"):
        return f"{shown}: leave it out; {answer} would turn it on"
    return f"{shown}: did you mean {answer}?"
