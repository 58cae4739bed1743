"""The argument parser of every program here: a mistake is one line, and an unknown flag is answered with ours."""

import argparse
import contextlib
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

from trainer.config.errors import UserError, mask_credentials
from trainer.config.fields import Accepts, PositiveInt, what_is_expected
from trainer.config.files import expand_user_path, require_place_for_folder
from trainer.config.spellings import FALSE, SPELLED_PARTS, is_value, read_table
from trainer.config.text import shorten

HELP_HINT = "(--help lists the flags)"


def value_type(annotation: Any, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """The `type` of a flag whose value has this annotation."""

    def parse(text: str) -> Any:
        value: Any = text
        with contextlib.suppress(ValueError):  # what is accepted is said below
            value = convert(text)
        if expected := what_is_expected(annotation, value):
            raise argparse.ArgumentTypeError(f"{shorten(text, 80)}: expected {expected}")
        return value

    return parse


whole_number = value_type(PositiveInt, int)
whole_numbers = value_type(
    Annotated[tuple[PositiveInt, ...], Accepts("whole numbers from 1 with commas between them")],
    lambda text: tuple(int(part) for part in text.split(",")),
)


def user_path(text: str) -> str:
    """The `type` of a flag that takes a path as a text; that of `Path` is the same."""
    try:
        return expand_user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text, 80)}: {error}") from None


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
        raise UserError(f"{message} {HELP_HINT}")

    def parse_known_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """argparse's own; UserError for all values that a flag does not take, and for keys, tokens and logins."""
        parsed, problems = self._parse(args, namespace)
        if problems:
            raise UserError(*problems)
        return parsed

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        """The parsed arguments; UserError also for flags that are not known, with the ones that were meant."""
        parsed, problems = self.parse_all(args, namespace)
        if problems:
            raise UserError(*problems)
        return parsed

    def parse_all(self, argv: Sequence[str], namespace: Any = None) -> tuple[Any, list[str]]:
        (parsed, unknown), problems = self._parse(argv, namespace)
        strays = []
        while unknown:
            flag, has_value, value = unknown.pop(0).partition("=")
            if not flag.startswith("-"):
                strays.append(f"{flag}{has_value}{value}")
                continue
            if not has_value and unknown and is_value(unknown[0]):
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
                separator = " " if ": expected " in error.message else ": "
                problems.append(f"{error.argument_name}{separator}{error.message}")
                names = (error.argument_name or "").split("/")
                places = [i for i, word in enumerate(words) if word.partition("=")[0] in names]
                if not places:  # of an argument without a flag
                    raise UserError(*problems) from None
                for i in reversed(places):
                    takes_next = "=" not in words[i] and i + 1 < len(words) and is_value(words[i + 1])
                    del words[i : i + 1 + takes_next]
            except UserError as error:  # what is missing
                raise UserError(*problems, *error.args) from None
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
        """One line that answers an unknown flag with the nearest one, or with why there is none."""
        table, shown, other = read_table(), f"{flag} {value}".rstrip(), self.companion.flags() if self.companion else {}
        if flag in other:  # from a file, which the other parser does not read
            return f"{flag}: belongs on the command line only"
        flags, answers = self.flags() | other, dict[str, str]()
        if "--lr" in flags:  # a run's
            answers |= {name: f"--{name}" for part in SPELLED_PARTS for name in table[part]}
            answers |= {name: ours.partition(" ")[0] for name, ours in table["same"].items()}
            answers |= {name: answer for name, (_, answer) in table["only"].items()}
        answers |= {name: a for name, a in table["elsewhere"].items() if a[0] != "-" or a.split()[0] in flags}
        answers |= {name.lstrip("-").replace("-", "_"): name for name in flags}
        name = flag.lstrip("-").lower().replace("-", "_")
        nearest = next(iter(difflib.get_close_matches(name, answers, n=1, cutoff=0.8)), "")
        answer = answers.get(nearest, f"unknown flag {HELP_HINT}")
        if " " in answer and answer.startswith("-") and value.lower() in (*FALSE, "none"):  # a switch that is off
            return f"{shown}: leave it out; {answer} would turn it on"
        return f"{shown}: did you mean {answer}?" if answer.startswith("-") else f"{shown}: {answer}"


def _refuse_words(argv: Sequence[str]) -> None:
    """UserError for a word with a key, token or login (run.json would keep it), an empty list or a gone folder."""
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
