"""A user's mistake: one line, exit code 2, no traceback, and no key, token or login in any message."""

import os
import re
import sys
from collections.abc import Mapping

_SECRET_VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
_MIN_SECRET_LENGTH = 12  # of a variable's value; shorter ones could be a word of any text
#: Tokens by their form: Hugging Face's, GitHub's, W&B's.
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|wandb_v\d_\w{30,})")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password of a URL
MASK = "***"


class _OneLineError(Exception):
    @property
    def lines(self) -> list[str]:
        return [escape_controls(mask_credentials(str(text))) for text in self.args]  # names of files and runs are data

    def __str__(self) -> str:
        return "; ".join(self.lines)


class UserError(_OneLineError):
    """A mistake in a flag, a file or the environment; its text says what, where and what would be accepted. Several
    independent mistakes are several arguments, and a line each."""

    exit_code = 2


class TrainingError(_OneLineError):
    """The run cannot go on (a loss that is not a number, a full disk); what was written so far stays."""

    exit_code = 1


def permission_denied(error: PermissionError) -> UserError:
    """The line for a file that this user may not open, or a folder that it may not look into."""
    return UserError(f"{error.filename}: permission denied; let this user read it and the folders above it")


def report_error(error: UserError | TrainingError) -> int:
    """Print each mistake as one line, control characters escaped; returns the exit code."""
    print("\n".join(f"error: {line}" for line in error.lines or [""]), file=sys.stderr)
    return error.exit_code


def first_line(error: BaseException) -> str:
    """The first line of what a library says, its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(". :")


def escape_controls(text: str) -> str:
    """The text in one line: what a terminal would act on, or cannot show, as Python writes it (`\\n`, `\\x1b`)."""
    return "".join(
        c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else c.encode("unicode_escape").decode() for c in text
    )


def mask_credentials(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with every secret of the environment, every token and every login of a URL as `***`."""
    for name, value in environ.items():
        if len(value) >= _MIN_SECRET_LENGTH and _SECRET_VARIABLE.search(name):
            text = text.replace(value, MASK)
    return _TOKEN.sub(MASK, _LOGIN.sub(MASK, text))
