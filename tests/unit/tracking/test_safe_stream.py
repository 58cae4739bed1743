"""Output that is closed, full, broken or of another alphabet costs the display and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.errors import UserError, escape_controls
from trainer.tracking.console import ProgressBar, show_plan
from trainer.tracking.records import EventRecord
from trainer.tracking.safe_stream import SafeStream, escape_lines

PROGRAM = r"""
import os, sys
from trainer.tracking.safe_stream import protect_standard_streams
protect_standard_streams()
from trainer.tracking.console import ProgressBar, show_plan
own = os.open("own", os.O_WRONLY | os.O_CREAT)  # must not get the number of a stream that was closed
show_plan([("data", "\u6f22\u5b57 \udcff")])
progress = ProgressBar(10, 1.0)
for number in range(2000):
    progress.print_line("line %d \xe9 " % number + "x" * 100)
print("note", file=sys.stderr, flush=True)
os.system("echo from a child; echo from a child >&2")
progress.close(0)
open("done", "w").close()
"""


def run_program(folder: Path, redirection: str, **variables: str) -> "subprocess.CompletedProcess[bytes]":
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} program.py {redirection}"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "> /dev/full 2> /dev/full", "| head -1 > head"],
)
def test_a_stream_that_takes_nothing_costs_the_display_only(tmp_path, redirection):
    process = run_program(tmp_path, redirection)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "done").exists()
    assert (tmp_path / "own").read_bytes() == b""
    assert b"Traceback" not in process.stderr
    assert b"Exception ignored" not in process.stderr


@pytest.mark.parametrize(
    "variables", [{"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_an_alphabet_without_a_character_shows_it_escaped(tmp_path, variables):
    process = run_program(tmp_path, "", **variables)
    assert process.returncode == 0, process.stderr
    assert b"data  \\u6f22\\u5b57" in process.stdout


def test_a_stream_that_breaks_within_is_given_up(tmp_path):
    with open("/dev/full", "w") as file:
        stream = SafeStream(file)
        for _ in range(3):
            assert stream.write("x" * 100_000) == 100_000
            stream.flush()
        assert not stream.isatty()
        stream.close()


HOSTILE = "\x1b]0;owned\x07\x1b[2Jdata\nsecond\r\u202e\udcff\x9b31m"


def test_errors_are_one_line_without_control_characters():
    text = str(UserError(f"--data {HOSTILE}: no such file"))
    assert text.isprintable()
    assert "\\x1b[2J" in text
    assert escape_controls("naïve 漢字 🙂\xa0ok") == "naïve 漢字 🙂\xa0ok"


def test_names_from_outside_reach_the_terminal_escaped(tmp_path):
    with open(tmp_path / "shown", "w+") as file:
        show_plan([("data", HOSTILE)], stream=file)
        ProgressBar(1, 1.0, stream=file).log(EventRecord(event="note", step=1, message=HOSTILE, time=0.0))
        file.flush()
        file.seek(0)
        lines = file.read().splitlines()
    assert len(lines) == 3, "an event's text may have lines, a value of the plan has one"
    assert all(line.isprintable() for line in lines)


def test_lines_stay_lines():
    assert escape_lines("a\nb\tc") == "a\nb\\tc"
