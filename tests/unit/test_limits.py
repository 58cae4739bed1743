"""Sizes that read well: files of at most 500 lines, functions of at most 100, one way to format."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 100
DENSER_STYLE = tuple(f"# fmt: {switch}" for switch in ("skip", "off"))


def find_offenders(text: str) -> Iterator[str]:
    """Whether a file is too long or formatted by hand, and the name of each function that is too long."""
    if text.count("\n") > MAX_FILE_LINES or any(style in text for style in DENSER_STYLE):
        yield "file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from [node.name] * ((node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES)


def test_files_and_functions_are_short():
    files = [path for folder in ("trainer", "launch", "tests") for path in (ROOT / folder).rglob("*.py")]
    offenders = {path: list(find_offenders(path.read_text())) for path in files}
    assert {path: found for path, found in offenders.items() if found} == {}


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone: the second of a pair is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
