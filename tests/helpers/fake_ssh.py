"""A stand-in for ssh, in front of the real one."""

from pathlib import Path

import pytest


def put_ssh_script(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let `ssh` be these lines of sh, in a file of this folder."""
    (folder / "ssh").write_text(f"#!/bin/sh\n{text}")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
