"""Sizes that read well: files of at most 300 lines, functions of at most 50 lines and six parameters.

What is larger says why in its docstring, in a sentence that begins with "Long:" (a file, a function) or "Parameters:".
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 300, 50, 6

#: What is still to be cut; nothing is ever added.
KNOWN: set[str] = {
    "tests/distributed/test_cuda_graphs.py",
    "tests/distributed/test_cuda_graphs.py: take_steps",
    "tests/distributed/test_diagnostics.py",
    "tests/distributed/test_diagnostics.py: make_run_records",
    "tests/distributed/test_engine.py",
    "tests/distributed/test_export.py",
    "tests/distributed/test_generation.py",
    "tests/distributed/test_invariance.py: assert_cells_match",
    "tests/distributed/test_resume.py",
    "tests/distributed/test_wandb_logger.py",
    "tests/distributed/test_wandb_report.py",
    "tests/faults/test_damage.py",
    "tests/faults/test_kills.py",
    "tests/helpers/fake_runs.py: make_metadata",
    "tests/helpers/fake_runs.py: make_records",
    "tests/helpers/fake_wandb.py",
    "tests/helpers/matrix.py: train_plain_loop",
    "tests/unit/data/test_preprocess.py",
    "tests/unit/model/test_lora.py",
    "tests/unit/report/test_html.py",
    "tests/unit/tools/test_doctor.py",
    "tests/unit/tracking/test_console.py",
    "trainer/config/reference.py: disagreements",
    "trainer/distributed/engine.py",
    "trainer/export/export_cli.py: _build_reference_outputs",
    "trainer/export/folder.py: export_folder",
    "trainer/export/model_card.py: render_model_card",
    "trainer/export/run_export.py: export_run",
    "trainer/kernels/cpu_attention.py: blockwise_attention_forward",
    "trainer/kernels/fused_lora.py: forward",
    "trainer/kernels/linear_cross_entropy.py",
    "trainer/kernels/linear_cross_entropy.py: forward",
    "trainer/model/build.py: build_model",
    "trainer/model/demo/text.py",
    "trainer/report/lr_range_plot.py: plot_lr_range_test",
    "trainer/run.py",
    "trainer/training/checkpoint.py",
    "trainer/training/diagnostics/loss_rules.py",
}


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
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        num_parameters = len([p for p in parameters if p not in ("self", "cls")])
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if (num_lines > MAX_FUNCTION_LINES and "Long:" not in docstring) or (
            num_parameters > MAX_PARAMETERS and not is_test and "Parameters:" not in docstring
        ):
            yield f"{name}: {node.name}"


def test_files_and_functions_are_short_or_say_why_not():
    offenders = {offender for path in list_files() for offender in find_offenders(path)}
    assert not offenders - KNOWN


def test_what_is_too_long_or_takes_too_many_parameters_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    source = (
        "def f(a, b, c, d, e, f, g): pass\ndef g():\n" + "    x = 1\n" * 50 + "def h(self, a, b, c, d, e, f): pass\n"
    )
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text("\n" * 301)
    (tmp_path / "c.py").write_text('"""Data.\n\nLong: a table.\n"""\n' + "\n" * 301)
    found = [list(find_offenders(tmp_path / name)) for name in ("a.py", "b.py", "c.py")]
    assert found == [["a.py: f", "a.py: g"], ["b.py"], []]


def test_no_two_test_files_have_one_name():
    """pytest imports them by their names alone: the second of a pair is not collected."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
