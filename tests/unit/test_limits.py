"""Sizes that read well: files of at most 500 lines, functions of at most 100, one way to format."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 100
DENSER_STYLE = tuple(f"fmt: {switch}" for switch in ("skip", "off"))


def list_files() -> list[Path]:
    return sorted(path for folder in ("trainer", "launch", "tests") for path in (ROOT / folder).rglob("*.py"))


def find_offenders(path: Path) -> Iterator[str]:
    """The file, if it is too long or formatted by hand, and each function that is too long."""
    text, name = path.read_text(), str(path.relative_to(ROOT))
    if text.count("\n") > MAX_FILE_LINES or any(f"# {style}" in text for style in DENSER_STYLE):
        yield name
    for node in ast.walk(ast.parse(text)):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (node.end_lineno or node.lineno) - node.lineno + 1 > MAX_FUNCTION_LINES:
            yield f"{name}: {node.name}"


def test_files_and_functions_are_short():
    assert not [offender for path in list_files() for offender in find_offenders(path)]


def test_what_is_too_long_or_formatted_by_hand_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("def f():\n" + "    x = 1\n" * 99 + "def g():\n" + "    x = 1\n" * 100)
    (tmp_path / "b.py").write_text("\n" * 501)
    (tmp_path / "c.py").write_text(f"x = 1  # {DENSER_STYLE[0]}\n")
    actual = [list(find_offenders(tmp_path / name)) for name in ("a.py", "b.py", "c.py")]
    assert actual == [["a.py: g"], ["b.py"], ["c.py"]]


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone: the second of a pair is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
