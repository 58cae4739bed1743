"""Sizes that read well: files of at most 300 lines, functions of at most 50 lines and six parameters.

What is larger says why in its docstring, in a sentence that begins with "Long:" (a file, a function) or "Parameters:".
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 50, 6


def list_files() -> list[Path]:
    return sorted(path for folder in ("trainer", "launch", "tests") for path in (ROOT / folder).rglob("*.py"))


def find_offenders(path: Path) -> Iterator[str]:
    """`file: N lines`, `file:function`, of what is too large and does not say why."""
    text, name = path.read_text(), str(path.relative_to(ROOT))
    tree = ast.parse(text)
    if text.count("\n") > MAX_FILE_LINES and "Long:" not in (ast.get_docstring(tree) or ""):
        yield name
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        is_test = node.name.startswith("test_") or any("fixture" in ast.unparse(d) for d in node.decorator_list)
        parameters = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if (num_lines > MAX_FUNCTION_LINES and "Long:" not in docstring) or (
            len(parameters) > MAX_PARAMETERS and not is_test and "Parameters:" not in docstring
        ):
            yield f"{name}: {node.name}"


def test_files_and_functions_are_short_or_say_why_not():
    offenders = {offender for path in list_files() for offender in find_offenders(path)}
    assert not offenders


def test_what_is_too_long_or_takes_too_many_parameters_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = (
        "def f(a, b, c, d, e, f, g): pass\ndef g():\n" + "    x = 1\n" * 50 + "def h(self, a, b, c, d, e, f): pass\n"
    )
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text("\n" * 301)
    (tmp_path / "c.py").write_text('"""Data.\n\nLong: a table.\n"""\n' + "\n" * 301)
    actual = [list(find_offenders(tmp_path / name)) for name in ("a.py", "b.py", "c.py")]
    assert actual == [["a.py: f", "a.py: g"], ["b.py"], []]


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone: the second of a pair is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
