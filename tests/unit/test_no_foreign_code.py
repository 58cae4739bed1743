"""What could run code that stands in a file or a flag: every place in the product, and why it is safe."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pty"}
FORBIDDEN_CALLS = (
    "eval exec compile __import__ breakpoint os.system os.popen torch.load yaml.load yaml.unsafe_load yaml.full_load "
    "runpy.run_path runpy.run_module import_module"
)
STARTS_A_PROGRAM = {"subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"}
#: {(file, call): why no one else's code runs there}; modules imported by a name that stands in the source need no entry
ALLOWED = {
    ("trainer/tools/doctor/prove.py", "torch.load"): "tensors of its own temporary folder, weights_only",
    ("trainer/training/scorers.py", "exec_module"): "FILE.py of --score FILE.py:function, never of run.json alone",
    ("trainer/tools/processes.py", "runpy.run_path"): "launch/train.py of this checkout",
}


def find_risky_calls(tree: ast.Module) -> Iterator[str]:
    """Names of calls and imports that may run code from outside; a program started by a text instead of a list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS)
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        first = node.args[0] if node.args else None
        if name in FORBIDDEN_CALLS.split() and not (name == "import_module" and isinstance(first, ast.Constant)):
            yield name
        if name.endswith("exec_module"):
            yield "exec_module"
        if name in STARTS_A_PROGRAM and ("shell" in keywords or isinstance(first, ast.Constant | ast.JoinedStr)):
            yield f"{name} by a text"
        if "allow_pickle" in keywords:
            yield "allow_pickle"
        is_trusting = name.endswith(".from_pretrained") and name.startswith("Auto") and "**" not in ast.unparse(node)
        trust = keywords.get("trust_remote_code")
        if (is_trusting and trust is None) or (trust is not None and ast.unparse(trust) != "False"):
            yield f"{name} with trust_remote_code or a question on the terminal"


def test_no_code_of_a_file_or_a_flag_is_run():
    risky = set()
    for path in sorted(path for folder in ("trainer", "launch") for path in (ROOT / folder).rglob("*.py")):
        risky |= {(str(path.relative_to(ROOT)), call) for call in find_risky_calls(ast.parse(path.read_text()))}
    assert risky == set(ALLOWED)
