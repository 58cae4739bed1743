"""The argument parser of every program here: a mistake is one line, and an unknown flag is answered with ours."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.config.errors import UserError, mask_credentials
from trainer.config.flag_suggestions import suggest_flag

TEXT_FLAGS = ("--prompt", "--completion")  # what they hold is no name
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # Linux: NAME_MAX, and PATH_MAX without its closing null


def _refuse_impossible_name(flag: str, value: str) -> None:
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:  # half of a pair of JSON's or YAML's `\\ud800`
        raise UserError(f"{flag} {value}: holds what is no character; expected a name") from None
    length = max(map(len, path.split(b"/")))
    if length > MAX_NAME_BYTES or len(path) > MAX_PATH_BYTES:
        raise UserError(
            f"{flag} {value[:40]}...: {max(length, len(path)):,} bytes; expected at most {MAX_NAME_BYTES} between two "
            f"slashes, and {MAX_PATH_BYTES:,} in all"
        )
    if b"\0" in path:
        raise UserError(f"{flag} {value}: holds a null byte, which no name can")


def whole_number(text: str, least: int = 1) -> int:
    """The `type` of a flag that takes a whole number."""
    if not (text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from {least}")
    return int(text)


def whole_numbers(text: str) -> tuple[int, ...]:
    """The `type` of a flag that takes whole numbers from 1, separated by commas."""
    return tuple(whole_number(part.strip()) for part in text.split(","))


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError in place of printing the usage; the caller prints one line, once."""

    def __init__(self, *, companion: "ArgumentParser | None" = None, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})
        self.companion = companion  # of the program that hands on what it does not know: its flags are suggested too

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """argparse's own; UserError for a word that holds a key, a token or a login: run.json would keep it.

        And for what can be no file's name: the system refuses it wherever it is looked for.
        """
        argv = sys.argv[1:] if args is None else args
        for number, word in enumerate(argv):
            if mask_credentials(word) != word:
                flag = next((name for name in reversed(argv[: number + 1]) if name.startswith("--")), word)
                raise UserError(
                    f"{flag.partition('=')[0]}: its value holds a token or a login, which process lists and run.json "
                    "would show; give it by HF_TOKEN, WANDB_API_KEY, or the login of the program that asks for it"
                )
        parsed = super().parse_known_args(argv, namespace)
        for action in self._actions:
            if not set(action.option_strings) & set(TEXT_FLAGS):
                values = getattr(parsed[0], action.dest, None)
                for value in values if isinstance(values, list | tuple) else [values]:
                    if isinstance(value, str | Path):
                        _refuse_impossible_name("/".join(action.option_strings) or str(action.metavar), str(value))
        return parsed

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The parsed arguments; UserError for a flag that is not known, with the one that was meant."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            takes_value = self.flags() | (self.companion.flags() if self.companion else {})
            flag, *rest = next((unknown[i:] for i, word in enumerate(unknown) if word.startswith("-")), unknown)
            if not flag.startswith("-"):
                raise UserError(f"{flag}: expected a flag (--help lists the flags)")
            name, has_value, value = flag.partition("=")
            if not has_value and rest and not rest[0].startswith("--"):
                value = rest[0]
            raise UserError(suggest_flag(name, value or None, takes_value))
        return parsed

    def flags(self) -> dict[str, bool]:
        """The flags that --help lists, and whether each takes a value."""
        return {
            flag: action.nargs != 0
            for action in self._actions
            for flag in action.option_strings
            if action.help != argparse.SUPPRESS
        }
