"""The terminal is a display, not the run: what it cannot take is lost, and the run goes on."""

import contextlib
import os
import sys
from typing import Any, TextIO


class SafeStream:
    """A text stream that takes every text: nothing written to it raises. Characters that its encoding lacks are written
    as Python writes them (`\\u6f22`). When it is closed, full or broken, what is written from then on goes nowhere."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as we do
        with contextlib.suppress(AttributeError, ValueError):  # a stream of its own kind, or closed
            self._stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: self._stream.flush())

    def isatty(self) -> bool:
        return not self._stream.closed and self._stream.isatty()

    def _try(self, call: Any) -> None:
        try:
            call()
        except (OSError, ValueError):
            # What is still in the buffer goes nowhere too: Python would fail on it at its exit.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect_standard_streams() -> None:
    """Make stdout and stderr safe; where one was closed its number is taken, so that no file of ours gets it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
