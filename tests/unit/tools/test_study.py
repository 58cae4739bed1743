"""The study: which runs it makes, that it goes on where it was, and the table they come to."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.fake_runs import make_metadata, make_run_folder

from trainer.config.errors import UserError
from trainer.tools.study import study

ROOT = Path(__file__).parents[3]
DEFAULT_GRID: dict[str, Any] = {
    "methods": ("full", "lora", "dora", "lora-nf4"), "seeds": (1, 2), "lora_ranks": (8, 2), "full_factors": (1.0, 3.0),
    "lora_factors": (10.0, 30.0), "other_factors": (10.0,),
}  # fmt: skip

#: In place of launch/train.py: notes when it began and ended, and leaves a run as that would. A rate of 1 fails.
STUB_TRAIN_SCRIPT = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers.fake_runs import make_metadata, make_records, write_run_folder
from trainer.config import cli
request = cli.parse_args()
settings, out = request.settings, Path(request.settings.run_folder)
with open(out.parent / "log", "a") as log:
    log.write(f"+ {{out.name}} {{'again' if request.resume else 'first'}}\\n")
time.sleep(0.3)
with open(out.parent / "log", "a") as log:
    log.write(f"- {{out.name}}\\n")
if settings.train.lr == 1:
    print("some traceback\\nerror: learnt nothing", file=sys.stderr)
    sys.exit(1)
run = make_metadata(settings.mode, seed=settings.train.seed, settings=settings.as_dict(),
                    resolved__lr=settings.train.lr)
(out / "run.json").unlink(missing_ok=True)
(out / "metrics.jsonl").unlink(missing_ok=True)
out.exists() and out.rmdir()
write_run_folder(out, run, make_records(run, floor=1 + settings.train.lr))
"""


@pytest.fixture
def stub_runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs of the stub."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").write_text(STUB_TRAIN_SCRIPT.format(tests=str(ROOT / "tests")))
    monkeypatch.setattr(study, "LAUNCH_FOLDER", tmp_path / "launch")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def load_study_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_script", ROOT / "launch" / "study.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- which runs ---


def test_the_study_runs_every_method_with_every_seed_one_seed_after_the_other():
    made = study.build_runs(study.SearchSpace(**DEFAULT_GRID), Path("s"), ["--max-steps", "5"])
    assert [trial.name for trial in made[:8]] == [
        "full-lr0.0005-s1", "full-lr0.0015-s1", "lora-r8-lr0.005-s1", "lora-r8-lr0.015-s1", "lora-r2-lr0.005-s1",
        "lora-r2-lr0.015-s1", "dora-r8-lr0.005-s1", "lora-nf4-r8-lr0.005-s1",
    ]  # fmt: skip
    assert [trial.name.replace("-s2", "-s1") for trial in made[8:]] == [trial.name for trial in made[:8]]
    last = made[-1].settings
    assert (last.method, last.lora.rank, last.train.lr, last.train.seed) == ("lora-nf4", 8, 0.005, 2)
    assert (last.train.max_steps, last.run_folder, last.output.num_samples) == (5, "s/lora-nf4-r8-lr0.005-s2", 0)


def test_study_lr_factors_multiply_the_presets_rate_or_the_one_that_is_passed():
    grid = study.SearchSpace(**{**DEFAULT_GRID, "methods": ("full", "lora"), "seeds": (1,), "lora_ranks": (8,)})
    rates = [trial.settings.train.lr for trial in study.build_runs(grid, Path("s"), ["--preset", "card"])]
    assert rates == pytest.approx([3e-5, 9e-5, 3e-4, 9e-4])
    rates = [trial.settings.train.lr for trial in study.build_runs(grid, Path("s"), ["--lr", "0.1"])]
    assert rates == pytest.approx([0.1, 0.3, 1, 3])


@pytest.mark.parametrize(
    ("passed", "grid", "words"),
    [
        (["--seed", "3"], {}, "--seed: the study sets it"),
        (["--output-dir=x"], {}, "--output-dir=x: the study sets it"),
        (["--max-step", "3"], {}, "--max-step 3: did you mean --max-steps 3?"),
        (["--block-size", "1"], {}, "--block-size 1: expected 2 tokens or more"),
        ([], {"methods": ("lara",)}, "--methods lara: expected some of full, lora"),
        ([], {"seeds": (1, 1)}, "--seeds: expected one value or more, none of them twice"),
    ],
)
def test_a_mistake_in_a_study_is_found_before_anything_runs(passed, grid, words):
    with pytest.raises(UserError) as caught:
        study.build_runs(study.SearchSpace(**{**DEFAULT_GRID, **grid}), Path("s"), passed)
    assert str(caught.value).startswith(words)


def test_a_mistake_in_the_study_script_is_one_line(capsys):
    for words in (["--workers", "0"], ["--seeds", "1,x"], ["--ranks", "0"], ["--mode", "full"]):
        assert load_study_script().main(words) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {words[0]}")
        assert (said.err.count("\n"), said.out) == (1, "")


# --- running ---


def make_study_runs(out: Path, *passed: str, **grid: Any) -> list[study.StudyRun]:
    small = {"methods": ("full", "lora"), "lora_ranks": (8,), "full_factors": (1.0,), "lora_factors": (10.0,)}
    return study.build_runs(study.SearchSpace(**{**DEFAULT_GRID, **small, **grid}), out, passed)


def test_a_study_runs_at_most_its_workers_at_once_and_each_run_once(stub_runs_dir):
    said: list[str] = []
    assert study.execute_runs(make_study_runs(stub_runs_dir, seeds=(1, 2, 3)), 2, said.append) == []
    assert said[0] == "6 runs, 0 of them finished before"
    assert sorted(said[1:])[0] == "full-lr0.0005-s1: validation loss 1.0338"  # the stub's curve after three epochs
    running, most = 0, 0
    for line in (stub_runs_dir / "log").read_text().splitlines():
        running += 1 if line[0] == "+" else -1
        most = max(most, running)
    assert most == 2
    again = study.execute_runs(make_study_runs(stub_runs_dir, seeds=(1, 2, 3, 4)), 2, said.append)
    assert again == []
    assert "8 runs, 6 of them finished before" in said
    assert (stub_runs_dir / "log").read_text().count("+") == 8


def test_a_study_resumes_an_interrupted_run(stub_runs_dir):
    (trial, *_) = made = make_study_runs(stub_runs_dir, seeds=(1,))
    make_run_folder(
        trial.folder, metadata=make_metadata("full", seed=1, settings=trial.settings.as_dict()), finished=False
    )
    assert study.execute_runs(made, 1, lambda line: None) == []
    assert [line for line in (stub_runs_dir / "log").read_text().splitlines() if line[0] == "+"] == [
        "+ full-lr0.0005-s1 again", "+ lora-r8-lr0.005-s1 first",
    ]  # fmt: skip


def test_a_study_refuses_a_finished_run_with_other_settings(stub_runs_dir):
    study.execute_runs(make_study_runs(stub_runs_dir, seeds=(1,)), 1, lambda line: None)
    for more, words in (
        (["--max-steps", "9"], "max_steps None, now it is 9"),
        (["--data", "b.csv"], "data acled-demo"),
    ):
        with pytest.raises(UserError, match=f"full-lr0.0005-s1 holds a run with {words}"):
            study.execute_runs(make_study_runs(stub_runs_dir, *more, seeds=(1,)), 1, lambda line: None)


def test_a_failed_run_of_a_study_is_reported_and_stops_no_other(stub_runs_dir):
    failed = study.execute_runs(make_study_runs(stub_runs_dir, "--lr", "0.1", seeds=(1,)), 1, lambda line: None)
    assert failed == ["lora-r8-lr1-s1: error: learnt nothing"]
    assert (
        len(
            study.read_groups(
                [stub_runs_dir / "full-lr0.1-s1", stub_runs_dir / "lora-r8-lr1-s1", stub_runs_dir / "none"]
            )
        )
        == 1
    )


def test_the_study_script_compares_prints_the_table_and_resumes(stub_runs_dir, tmp_path, capfd):
    study_script = load_study_script()
    words = [
        "--output-dir",
        str(stub_runs_dir),
        "--methods",
        "full,lora",
        "--ranks",
        "8",
        "--seeds",
        "1,2",
        "--workers",
        "2",
    ]
    assert study_script.main([*words, "--full-factors", "1,3", "--lora-factors", "10"]) == 0
    said = capfd.readouterr().out
    assert "LoRA reached" in said, "the comparison's verdict"
    assert (stub_runs_dir / "comparison" / "report.html").is_file()
    table = (stub_runs_dir / "study.md").read_text()
    assert table in said
    assert table.startswith("| way | rank | learning rate | trainable | validation loss | seeds | to the best full |")
    assert table.count("\n|") == 4
    assert study_script.main([*words, "--full-factors", "2000", "--lora-factors", "10"]) == 1
    assert "error: full-lr1-s1: error: learnt nothing" in capfd.readouterr().err


# --- the table ---


def test_the_study_table_names_the_best_of_each_method_its_spread_and_edge_values(tmp_path):
    folders = []

    def left(mode: str, rate: float, losses: tuple[float, ...], rank: int = 8, adapter: str = "lora") -> None:
        for seed, loss in enumerate(losses):
            run = make_metadata(
                mode, seed=seed, resolved__lr=rate, settings__lora__rank=rank, settings__lora__adapter=adapter
            )
            run["settings"]["train"]["lr"] = rate
            folders.append(make_run_folder(tmp_path / str(len(folders)), metadata=run, losses={0: 4.0, 3: loss}))

    left("full", 0.001, (2.0, 2.02, 1.98))
    left("full", 0.003, (2.2, 2.3, 2.1))
    left("lora", 0.01, (2.3, 2.31, 2.29))
    left("lora", 0.03, (2.21, 2.2, 2.19))
    left("lora", 0.1, (2.4, 2.5, 2.3))
    left("lora", 0.01, (2.5,), rank=2)
    left("lora", 0.01, (2.25, 2.35, 2.3), adapter="dora")
    lines = study.markdown_table(study.read_groups(reversed(folders)))
    assert lines[2:9] == [
        "| **full** | - | 0.001 | 2,000,000 | **2.0000 ± 0.0200** | 3 | - |",
        "| full | - | 0.003 | 2,000,000 | 2.2000 ± 0.1000 | 3 | +0.2000 |",  # t = 3.4 at 2.2 degrees: 4.0 is needed
        "| lora | 2 | 0.01 | 19,000 | 2.5000 | 1 | +0.5000 |",
        "| lora | 8 | 0.01 | 19,000 | 2.3000 ± 0.0100 | 3 | +0.3000* |",
        "| **lora** | 8 | 0.03 | 19,000 | **2.2000 ± 0.0100** | 3 | +0.2000* |",
        "| lora | 8 | 0.1 | 19,000 | 2.4000 ± 0.1000 | 3 | +0.4000* |",
        "| **dora** | 8 | 0.01 | 19,000 | **2.3000 ± 0.0500** | 3 | +0.3000* |",
    ]
    assert lines[11:] == ["full: 0.001 is the smallest rate tried; a better one may lie beyond it."]
