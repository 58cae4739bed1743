"""What the user can mend: one line, exit code 2, no traceback."""

import sys

from trainer.config.credentials import mask_credentials


class _OneLineError(Exception):
    def __str__(self) -> str:
        return escape_controls(mask_credentials(super().__str__()))  # names of files, columns and runs are data


class UserError(_OneLineError):
    """A mistake in a flag, a file or the environment; its text says what, where and what would be accepted."""

    exit_code = 2


class TrainingError(_OneLineError):
    """The run cannot go on (a loss that is not a number, a full disk); what was written so far stays."""

    exit_code = 1


def report_error(error: UserError | TrainingError) -> int:
    """Print the error as one line, control characters escaped; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def first_line(error: BaseException) -> str:
    """The first line of what a library says, its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(". :")


def escape_controls(text: str) -> str:
    """The text in one line: what a terminal would act on, or cannot show, as Python writes it (`\\n`, `\\x1b`)."""
    return "".join(
        c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else c.encode("unicode_escape").decode() for c in text
    )
