"""The argument parser of every program here: a mistake is one line, and an unknown flag is answered with ours."""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from trainer.config.errors import UserError, mask_credentials
from trainer.config.files import expand_user_path, require_place_for_folder
from trainer.config.spellings import FALSE, SPELLED_PARTS, read_table, separate_values, translate

TEXT_FLAGS = {"--prompt", "--completion", "--score"}  # what they hold is no name
HELP_HINT = "(--help lists the flags)"


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


def output_folder(text: str) -> Path:
    """The `type` of a flag that takes the folder to write into, there or not."""
    folder = Path(user_path(text))
    try:
        require_place_for_folder(folder, text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return folder


class ArgumentParser(argparse.ArgumentParser):
    """Raises UserError in place of printing the usage, with all mistakes of a command line at once."""

    def __init__(self, *, companion: "ArgumentParser | None" = None, **options: Any):
        super().__init__(**{"allow_abbrev": False, "exit_on_error": False, **options})
        self.register("type", Path, lambda text: Path(user_path(text)))
        self.companion = companion  # of the program that hands on what it does not know: its flags are suggested too

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong."""
        raise UserError(f"{message} {HELP_HINT}")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """argparse's own; UserError for all values that a flag does not take, and for keys, tokens and logins."""
        parsed, problems = self._parse(sys.argv[1:] if args is None else args, namespace)
        if problems:
            raise UserError(*problems)
        return parsed

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The parsed arguments; UserError also for flags that are not known, with the ones that were meant."""
        parsed, problems = self.parse_all(sys.argv[1:] if args is None else args, namespace)
        if problems:
            raise UserError(*problems)
        return parsed

    def parse_all(self, argv: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
        """(the parsed arguments, the mistakes)."""
        (parsed, unknown), problems = self._parse(argv, namespace)
        strays = []
        while unknown:
            flag, has_value, value = unknown.pop(0).partition("=")
            if not flag.startswith("-"):
                strays.append(f"{flag}{has_value}{value}")
                continue
            if not has_value and unknown and not unknown[0].startswith("--"):
                value = unknown.pop(0)
            problems.append(self._answer_unknown(flag, value))
        if strays:
            quote = "; quote a text that has blanks: --prompt 'Describe {column}'" if "{" in " ".join(strays) else ""
            problems.append(f"{' '.join(strays)}: expected a flag {HELP_HINT}{quote}")
        return parsed, problems

    def _parse(self, argv: Sequence[str], namespace: Any) -> tuple[tuple[Any, list[str]], list[str]]:
        """((arguments, unknown words) without those whose values are refused, the refusals)."""
        _refuse_words(argv)
        words: list[str] = list(argv)
        problems: list[str] = []
        while True:
            try:
                parsed = super().parse_known_args(words, namespace)
                break
            except argparse.ArgumentError as error:
                is_value = ": expected " in error.message
                problems.append(f"{error.argument_name}{' ' if is_value else ': '}{error.message}")
                names = (error.argument_name or "").split("/")
                places = [i for i, word in enumerate(words) if word.partition("=")[0] in names]
                if not places:  # of an argument without a flag
                    raise UserError(*problems) from None
                for i in reversed(places):
                    takes_next = "=" not in words[i] and words[i + 1 : i + 2] and not words[i + 1].startswith("-")
                    del words[i : i + 1 + bool(takes_next)]
            except UserError as error:  # what is missing
                raise UserError(*problems, *error.args) from None
        for action in self._actions:
            values, flags = getattr(parsed[0], action.dest, None), action.option_strings
            for value in values if isinstance(values, list | tuple) else [values]:
                if isinstance(value, str | Path) and TEXT_FLAGS.isdisjoint(flags) and not _is_name(value):
                    problems.append(
                        f"{'/'.join(flags) or action.metavar} {str(value)[:40]}: expected a name of a file, "
                        "at most 255 bytes between two slashes, 4,095 in all"
                    )
        return parsed, problems

    def flags(self) -> dict[str, bool]:
        """The flags that --help lists, and whether each takes a value."""
        return {
            flag: action.nargs != 0
            for action in self._actions
            for flag in action.option_strings
            if action.help != argparse.SUPPRESS
        }

    def _answer_unknown(self, flag: str, value: str) -> str:
        """One line that answers an unknown flag with the nearest one, and its value where that is taken."""
        takes_value = self.flags() | (self.companion.flags() if self.companion else {})
        table, shown = read_table(), f"{flag} {value}".rstrip()
        if self.companion and flag in self.companion.flags():  # from a file, which it does not read
            return f"{flag}: is for the command line alone"
        answers = {name: a for name, a in table["elsewhere"].items() if a[0] != "-" or a.split()[0] in takes_value}
        if "--lr" in takes_value:  # a run's flags
            names = [name for part in SPELLED_PARTS for name in table[part]]
            answers |= {name: "" for name in names if table["same"].get(name, "--lr").split()[0] in takes_value}
        answers |= {name.lstrip("-").replace("-", "_"): name for name in takes_value}
        name = flag.lstrip("-").lower().replace("-", "_")
        nearest = next(iter(difflib.get_close_matches(name, answers, n=1, cutoff=0.8)), None)
        if nearest is None:
            return f"{shown}: unknown flag {HELP_HINT}"
        answer = answers[nearest]
        if answer and not answer.startswith("-"):
            return f"{shown}: {answer}"
        if " " in answer:  # a switch there
            is_off = value.lower() in (*FALSE, "none")
            return f"{shown}: leave it out; {answer} would turn it on" if is_off else f"{shown}: did you mean {answer}?"
        translation = translate([f"{answer or f'--{nearest}'}{f'={value}' if value else ''}"], takes_value)
        if translation.problems:
            return f"{shown}: did you mean --{nearest}? {value}: {translation.problems[0].rpartition(': ')[2]}"
        if not translation.words:
            return f"{shown}: did you mean --{nearest} {value}".rstrip() + "? It can be left out"
        ours, _, value = translation.words[0].partition("=")
        parse = next((action.type for action in self._actions if ours in action.option_strings), None)
        try:
            if value and callable(parse):
                parse(value)
        except argparse.ArgumentTypeError as error:
            return f"{shown}: did you mean {ours}? It takes {str(error).partition('expected ')[2]}"
        return f"{shown}: did you mean {separate_values(*translation.words)}?"


def _refuse_words(argv: Sequence[str]) -> None:
    """UserError for a word that holds a key, a token or a login (run.json would keep it), for an empty list, and for a
    folder that is gone."""
    try:
        os.getcwd()
    except OSError:  # which libraries do not expect
        raise UserError("the folder that this shell is in has been removed; change to another one") from None
    for i, word in enumerate(argv):
        flag, _, text = word.partition("=")
        if mask_credentials(word) != word:
            flag = next((name for name in reversed(argv[: i + 1]) if name.startswith("--")), word)
            raise UserError(
                f"{flag.partition('=')[0]}: its value holds a token or a login, which process lists and run.json "
                "would show; give it by HF_TOKEN, WANDB_API_KEY, or the login of the program that asks for it"
            )
        if flag.startswith("--") and text == "--":  # of which argparse makes an empty list
            raise UserError(f"{flag} --: expected another value")


def _is_name(value: str | Path) -> bool:
    try:
        path = os.fsencode(value)
    except UnicodeEncodeError:  # half of a pair of JSON's or YAML's `\\ud800`
        return False
    return 0 not in path and len(path) < 4096 and max(map(len, path.split(b"/"))) <= 255  # Linux: PATH_MAX, NAME_MAX
