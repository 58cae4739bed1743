"""Output that is closed, full, broken or of another alphabet costs the display and nothing else."""

import os
import subprocess
import sys

import pytest

from trainer.config.errors import UserError, escape_controls
from trainer.tracking.console import ProgressBar, show_plan
from trainer.tracking.records import EventRecord

PROGRAM = r"""
import os, sys
from trainer.tracking.safe_stream import protect_standard_streams
protect_standard_streams()
from trainer.tracking.console import ProgressBar, show_lines
own = os.open("own", os.O_WRONLY | os.O_CREAT)  # must not get the number of a stream that was closed
show_lines([("data", "\u6f22\u5b57 \udcff")])
progress = ProgressBar(10, 1.0)
for number in range(2000):
    progress.print_line("line %d \xe9 " % number + "x" * 100)
print("note", file=sys.stderr, flush=True)
os.system("echo from a child; echo from a child >&2")
progress.close(0)
open("done", "w").close()
"""
CLOSED_OR_FULL = ("<&- >&- 2>&-", "> /dev/full 2> /dev/full", "| head -1 > h")


@pytest.mark.parametrize(
    ("redirection", "variables", "shown"),
    [
        *((redirection, {}, b"") for redirection in CLOSED_OR_FULL),
        ("", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, b"data  \\u6f22\\u5b57"),
    ],
)
def test_a_stream_that_takes_nothing_or_not_every_character_costs_the_display_only(
    redirection, variables, shown, tmp_path
):
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} program.py {redirection}"],
        cwd=tmp_path,
        env={**os.environ, **variables},
        capture_output=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "done").exists()
    assert (tmp_path / "own").read_bytes() == b""
    assert shown in process.stdout
    assert not any(text in process.stderr for text in (b"Traceback", b"Exception ignored"))


HOSTILE = "\x1b]0;owned\x07\x1b[2Jdata\nsecond\r\u202e\udcff\x9b31m"


def test_names_from_outside_reach_the_terminal_escaped(capsys):
    error = str(UserError(f"--data {HOSTILE}: no such file"))
    assert "\\x1b[2J" in error
    show_plan([("", [("data", HOSTILE)])])
    ProgressBar(1, 1.0).log(EventRecord(event="note", step=1, message=HOSTILE, time=0.0))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "an event's text may have lines, a value of the plan has one"
    assert all(line.isprintable() for line in [error, *lines])
    assert escape_controls("naïve 漢字 🙂\xa0ok") == "naïve 漢字 🙂\xa0ok"
