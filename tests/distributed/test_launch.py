"""The command as people type it: the real launchers, real processes, real exit codes."""

import json
import os
import re
from pathlib import Path

import pytest
from helpers.launch_ranks import run_on_ranks, run_train_script, train
from helpers.process_groups import LaunchedRun
from helpers.tiny_inputs import tiny_argv


def run_without_login(cwd: str, argv: list[str]) -> int:
    """launch/train.py in this process and folder, without the W&B login of whoever runs the tests."""
    os.chdir(cwd)
    os.environ["HOME"] = cwd
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        os.environ.pop(name, None)
    return run_train_script(argv)


def run_forked(argv: list[str], cwd: Path) -> tuple[int, str]:
    """(exit code, output) of launch/train.py in a forked process: a fresh one takes seconds to import."""
    code = run_on_ranks(1, run_without_login, str(cwd), argv, log=cwd / "log")
    return code, (cwd / "log").read_text()


@pytest.fixture(scope="module")
def argv(tiny_model: str, data_files: tuple[str, str]) -> list[str]:
    return tiny_argv(tiny_model, data_files, "--block-size 16 --global-batch 4 --max-steps 3")


def read_losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in records if row["kind"] in ("step", "eval")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "num_ranks"),
    [("deepspeed", 1), *(pytest.param(*case, marks=pytest.mark.sweep) for case in (("torchrun", 2), ("python", 1)))],
)
def test_the_launchers_start_the_run_that_the_other_tests_start(launcher, num_ranks, argv, tmp_path):
    """`deepspeed` starts two ranks in faults/test_kills.py, torchrun some over ssh in faults/test_hosts.py."""
    flags = ["--mode", "lora", *argv, "--export", "none"]
    run = LaunchedRun(launcher, flags, out=tmp_path / "run", num_ranks=num_ranks)
    assert run.wait(240) == [0], run.output
    output = run.output
    assert output.count("done    3 steps in ") == 1, "one voice, whatever the number of ranks"
    assert output.index("Loading PyTorch") < output.index("What is trained") < output.index("next ")
    assert "Traceback" not in output
    assert "Warning" not in output.replace("[WARNING] [r", "")  # the launcher's own two lines are not ours
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "metrics.jsonl", "checkpoints"} <= left
    train(flags, out=tmp_path / "forked", world_size=num_ranks)
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "forked")


@pytest.mark.slow
def test_a_mistake_on_the_command_line_is_one_line_once_and_exit_code_2(argv, tmp_path):
    run = LaunchedRun("deepspeed", ["--mode", "full", *argv, "--lr", "-1"], out=tmp_path / "run")
    assert run.wait(240) == [2], run.output
    assert run.output.count("error: ") == 1
    assert "--lr -1" in run.output
    assert "Traceback" not in run.output
    assert not run.out.exists(), "nothing was begun"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mode full --ds-config zero9", ["--ds-config zero9", "zero2_offload"]),
        ("--mode lora --lora-target-modules c_attn,q_proj", ["--lora-target-modules q_proj", "c_attn, c_fc, c_proj"]),
        ("--mode full --resume", ["--resume", "no run"]),
        ("--mode full --wandb online", ["--wandb online"]),
        ("--mode full --output-dir taken", ["taken is not empty; expected another --output-dir"]),
    ],
)
def test_each_mistake_names_its_flag(flags, message, tmp_path):
    """And is found before data are looked for: there are none."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    code, output = run_forked(["--model", "demo-base", *flags.split(), "--data", "missing.csv"], tmp_path)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2, output
    assert len(lines) == 1, output
    assert all(word in lines[0] for word in message), lines
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_plan_and_trains_nothing(argv, tmp_path):
    code, output = run_forked(["--mode", "lora", *argv, "--dry-run"], tmp_path)
    assert code == 0, output
    batch = "4 micro-batch x 1 accumulation x 1 rank = 4"
    for text in ("trainable", "4,096", batch, "zero0", "runs/lora-train", "3 in all"):
        assert text in " ".join(output.split()), text
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/lora-train/model").mkdir(parents=True)
    (tmp_path / "runs/lora-train/run.json").write_text("a run's")
    time_before = (tmp_path / "runs/lora-train").stat().st_mtime_ns
    code, output = run_forked(["--mode", "lora", *argv, "--show-example", "1"], tmp_path)
    assert code == 0, output
    assert re.search(r"example 1: 16 tokens, 15 of them target tokens\n[^⟦⟧|]+(\|⟦[^⟦⟧]+⟧){15}\n", output)
    assert "runs/lora-train already holds a run; add --resume to continue it" in output
    assert (tmp_path / "runs/lora-train").stat().st_mtime_ns == time_before, "nothing was written beside the run"
