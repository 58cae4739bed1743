"""What the user can mend: one line, exit code 2, no traceback."""


class UserError(Exception):
    """A mistake in a flag, a file or the environment; its text says what, where and what would be accepted."""

    is_reported_elsewhere: bool | None = None  #: whether another rank says it; None: not asked, rank 0 does


class TrainingError(Exception):
    """The run cannot go on (a loss that is not a number, a full disk); what was written so far stays."""

    is_reported_elsewhere: bool | None = None  #: as above
