"""What the READMEs name exists: every path, every flag, every test."""

import ast
import functools
import re
from pathlib import Path

import pytest

from trainer.config.cli import build_parser

ROOT = Path(__file__).parents[2]
READMES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *ROOT.glob(".github/*.md")])

#: Flags of other programs that our commands are started with.
OUTSIDE_FLAGS = {
    "--num_gpus": "deepspeed",
    "--num_nodes": "deepspeed",
    "--hostfile": "deepspeed",
    "--master_port": "deepspeed",
    "--nproc_per_node": "torchrun",
    "--nnodes": "torchrun",
    "--node_rank": "torchrun",
    "--master_addr": "torchrun",
    "--signal": "sbatch",
    "--enable-lora": "vllm",
    "--lora-modules": "vllm",
    "--outfile": "llama.cpp",
    "--model_args": "lm_eval",
    "--tasks": "lm_eval",
}
#: What a run, a comparison or a study writes: named in a README, absent from the repository.
GENERATED = ("STUDY/", "runs/", "comparison/", "checkpoints/", "model/", "wandb/", "studies/", "benchmarks/")
OWN_PATH = r"(trainer|launch|tests|ds_configs|\.github|\.ci)(/[\w.*-]+)*/?"
SUFFIXES = (".py", ".md", ".json", ".toml", ".yml", ".png", ".safetensors")
GENERATED_FILES = {
    "run.json",
    "metrics.jsonl",
    "config.json",
    "report.html",
    "answer.json",
    "rule.json",
    "index.json",
    "README.md",
    "bench.json",
    "suggestion.json",
    "convert_hf_to_gguf.py",  # the last is llama.cpp's
}


def code_of(text: str) -> str:
    """Code blocks and code spans of a Markdown text, and the targets of its links."""
    blocks = re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [target for target in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in target]
    return "\n".join([*blocks, *re.findall(r"`([^`]+)`", prose), *links])


@functools.cache
def own_flags() -> frozenset[str]:
    """Flags of launch/train.py, and whatever a script hands to add_argument as it stands."""
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    for path in [*ROOT.glob("launch/*.py"), *ROOT.glob("trainer/**/*.py"), *ROOT.glob("tests/helpers/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("add", "add_argument")):
                flags |= {a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")}
    return frozenset(flags)


def paths_in(text: str) -> set[str]:
    """What reads as a path of this repository: it has a slash or the suffix of a file we have."""
    words = re.findall(r"[\w./*<>-]+", text)
    return {
        word.rstrip(".")
        for word in words
        if (word.endswith(SUFFIXES) or re.fullmatch(OWN_PATH, word))
        and "<" not in word
        and not word.startswith(("/", "--"))
    }


def exists(path: str, readme: Path) -> bool:
    return any(any(base.glob(path.rstrip("/"))) for base in (ROOT, readme.parent))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_readme_names_exists(readme):
    named = paths_in(code_of(readme.read_text()))
    missing = [
        path
        for path in sorted(named)
        if not path.startswith(GENERATED) and path not in GENERATED_FILES and not exists(path, readme)
    ]
    assert not missing


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_that_a_readme_names_exists(readme):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code_of(readme.read_text())))
    assert not named - own_flags() - OUTSIDE_FLAGS.keys()


def test_every_test_that_a_readme_names_exists():
    """`distributed/test_x.py: test_y` or `test_y...` in the table of promises."""
    text = (ROOT / "tests" / "README.md").read_text()
    names = {
        node.name
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for name, is_beginning in re.findall(r"\b(test_\w+)(\.\.\.)?(?!\w*\.py)", re.sub(r"\w+\.py", "", text)):
        assert name in names or (is_beginning and any(known.startswith(name) for known in names)), name


def test_the_check_of_flags_would_notice_one_that_is_gone():
    assert "--lr" in own_flags()
    assert "--keep" not in own_flags()
    assert paths_in(code_of("see `trainer/no_such_file.py` and `--lr`")) == {"trainer/no_such_file.py"}
    assert not exists("trainer/no_such_file.py", ROOT / "README.md")
