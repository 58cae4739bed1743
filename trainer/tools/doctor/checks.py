"""One thing that the doctor looked at, and what it found."""

from typing import NamedTuple

OK, WARNING, ERROR = LEVELS = ("ok", "warning", "error")


class Check(NamedTuple):
    """`remedy` is empty where there is nothing to do."""

    level: str
    name: str
    message: str
    remedy: str = ""


def judge(is_bad: bool, level: str, name: str, message: str, remedy: str) -> Check:
    return Check(level, name, message, remedy) if is_bad else Check(OK, name, message)
