"""What the READMEs name exists: every path, every flag, every test."""

import ast
import functools
import re
from pathlib import Path

import pytest

from trainer.config.cli import build_parser

ROOT = Path(__file__).parents[2]
READMES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob(".github/*.md")])
each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))

#: Flags of deepspeed, torchrun, sbatch, vllm, llama.cpp and lm_eval.
OUTSIDE_FLAGS = (
    "--num_gpus --num_nodes --hostfile --master_port --nproc_per_node --nnodes --node_rank --master_addr --signal "
    "--enable-lora --lora-modules --outfile --model_args --tasks"
)
#: What a run, a comparison, a study or llama.cpp brings: named in a README, absent from the repository.
GENERATED = (
    *("STUDY/", "runs/", "comparison/", "checkpoints/", "model/", "wandb/", "studies/", "benchmarks/", "run.json"),
    *(
        "metrics.jsonl",
        "config.json",
        "report.html",
        "answer.json",
        "rule.json",
        "convert_hf_to_gguf.py",
        "FILE.py",
        "adapter_config.json",
    ),
)
OWN_PATH = r"(trainer|launch|tests|ds_configs|\.github|\.ci)(/[\w.*-]+)*/?|(?!/|--)[\w./*-]*\.(py|md|json|toml|yml|png)"


def code_of(text: str) -> str:
    """Code blocks and code spans of a Markdown text, and the targets of its links."""
    block = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    prose = block.sub("", text)
    links = [target for target in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in target]
    return "\n".join([*block.findall(text), *re.findall(r"`([^`]+)`", prose), *links])


def missing_paths(text: str, folder: Path) -> list[str]:
    """What reads as a path of this repository, and is none, from its root or from `folder`."""
    words = {word.rstrip(".") for word in re.findall(r"[\w./*<>-]+", code_of(text))}
    paths = [word for word in words if re.fullmatch(OWN_PATH, word) and not word.startswith(GENERATED)]
    return [path for path in paths if not any(any(base.glob(path.rstrip("/"))) for base in (ROOT, folder))]


@functools.cache
def own_flags() -> frozenset[str]:
    """Flags of launch/train.py, and whatever a script hands to add_argument as it stands."""
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    for path in [*ROOT.glob("launch/*.py"), *ROOT.glob("trainer/**/*.py"), *ROOT.glob("tests/helpers/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("add", "add_argument")):
                flags |= {a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")}
    return frozenset(flags)


@each_readme
def test_every_path_that_a_readme_names_exists(readme):
    assert not missing_paths(readme.read_text(), readme.parent)


@each_readme
def test_every_flag_that_a_readme_names_exists(readme):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code_of(readme.read_text())))
    assert not named - own_flags() - set(OUTSIDE_FLAGS.split())


def test_every_test_that_a_readme_names_exists():
    """`distributed/test_x.py: test_y` or `test_y...` in the table of promises."""
    text = re.sub(r"\w+\.py", "", (ROOT / "tests" / "README.md").read_text())
    code = "\n".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    for name, is_beginning in re.findall(r"\b(test_\w+)(\.\.\.)?", text):
        assert re.search(rf"def {name}{'' if is_beginning else '[(]'}", code), name
