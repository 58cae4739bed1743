"""How the rooms stand to one another: imports go one way, each outside package has one door, light rooms stay light."""

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trainer"

#: From the bottom up. A room imports only rooms of earlier sets; those of one set do not know one another.
ORDER = (
    {"config"},
    {"tracking", "data"},
    {"model"},
    {"report", "distributed"},
    {"training"},
    {"export"},
    {"tools"},
    {"run"},
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

#: Where an outside package may be imported.
DOORS = {
    "deepspeed": {"distributed"},
    "peft": {"model", "export/verify"},  # the worker loads a folder as its user would
    "bitsandbytes": {"model"},
    "datasets": {"data"},
    "huggingface_hub": {"data", "export"},
    "pyarrow": {"data", "tracking", "report"},
    "wandb": {"tracking", "report"},
    "yaml": {"config"},
    "wandb_workspaces": {"report"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "sacrebleu": {"training/scorers"},
    "rouge_score": {"training/scorers"},
}
TORCH_FREE = (
    "config.cli",
    "config.reference",
    "tracking.records",
    "training.schedule",
    "training.diagnostics",
    "distributed.watch",
    "distributed.launch_environment",
    "report.compare_cli",
    "tools.study.study",
    "tools.cluster",
)


def list_source_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """The dotted names that a file imports, anywhere in it, also by import_module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            assert isinstance(node.args[0], ast.Constant), f"{path}: a computed import"
            names.add(str(node.args[0].value))
    return frozenset(names)


def test_imports_go_one_way():
    for path in list_source_files():
        for name in imports_of(path):
            room, (package, other, *_) = room_of(path), [*name.split("."), ""]
            if package == "trainer" and other not in ("", room):
                assert LEVEL[other] < LEVEL[room], f"{path} imports {name}"
    assert {room_of(path) for path in list_source_files()} == set(LEVEL)
    assert all(not path.read_text() for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
    assert not {path.stem for path in list_source_files()} & {"utils", "util", "common", "helpers", "misc"}


@pytest.mark.parametrize("package", sorted(DOORS))
def test_an_outside_package_is_imported_only_where_allowed(package):
    users = [path for path in list_source_files() if package in {name.split(".")[0] for name in imports_of(path)}]
    assert users
    assert not [path for path in users if not DOORS[package] & {room_of(path), str(path.relative_to(PACKAGE))[:-3]}]


#: What is private to torch or DeepSpeed is named in one file for each, which says the version.
PRIVATE_NAME = re.compile(
    r"\btorch(\.\w+)*\._[a-z]\w|(deepspeed_engine|zero_optimizer|self\.optimizer)\._[a-z]|_hp_mapping|__compatible_ops__"
)
INTERNALS = ("trainer/model/torch_internals.py", "trainer/distributed/deepspeed_internals.py")


def test_private_names_of_torch_and_deepspeed_are_in_one_file_each():
    users = {str(path.relative_to(ROOT)) for path in list_source_files() if PRIVATE_NAME.search(path.read_text())}
    assert users == set(INTERNALS)


def test_the_loop_knows_no_logger_no_mode_and_no_file_and_only_the_launcher_starts_a_run():
    path = PACKAGE / "training" / "loop.py"
    names = [name for name in imports_of(path) if ".records" not in name]
    assert not any(name.startswith(("trainer.tracking.", "wandb")) for name in names)
    assert not any(w in path.read_text() for w in ("print(", "wandb", "open(", "argparse", ".rank ==", "lora"))
    scripts = [*list_source_files(), *(ROOT / "launch").glob("*.py")]
    assert [path.name for path in scripts if "trainer.run.run" in imports_of(path)] == ["train.py"]


def test_every_import_names_a_module_of_the_package_that_is_there():
    """mypy is told to pass over imports that it cannot find."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    packages = {module.rpartition(".")[0] for module in modules}
    for path in [*list_source_files(), *(ROOT / "launch").glob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("trainer."):
                assert node.module in modules | packages, path


LOOK = """
import importlib, json, sys
sys.path.insert(0, "launch")
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = ("torch", "transformers", "deepspeed", "peft", "datasets", "wandb", "matplotlib", "safetensors")
    print(json.dumps([name, [package for package in heavy if package in sys.modules]]))
"""


def test_what_answers_at_once_loads_none_of_the_heavy_packages():
    """A report is made, a mistake is found and --help is printed without them; and train silences them before."""
    names = [*(f"trainer.{name}" for name in TORCH_FREE), *(path.stem for path in (ROOT / "launch").glob("*.py"))]
    command = [sys.executable, "-c", LOOK, *names]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert [json.loads(line) for line in process.stdout.splitlines()] == [[name, []] for name in names], process.stderr
