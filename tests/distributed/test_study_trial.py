"""One trial of a study as it is started: a real run in a process of its own, and what it sees."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.launch_ranks import make_process, train
from helpers.tiny_inputs import tiny_argv

from trainer.tools import processes
from trainer.tools.processes import Slot, run_environ, start_process, start_run
from trainer.tools.study.study import write_plan
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations, write_evaluation

CPU = Slot(gpus=(), num_threads=1)


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    """The server from which this process forks all others, with what tests need."""
    make_process(target=print, args=())


def run(argv: list[str], folder: Path, slot: Slot = CPU) -> tuple[int | None, str]:
    """(exit code, output)."""
    process = start_run(slot, argv, folder, group="study-a")
    process.join(200)
    return process.exitcode, (folder / "log").read_text()


def test_a_trial_of_the_search_is_a_whole_run_that_never_sees_the_test_records(tiny_model, data_files, tmp_path):
    text = "--mode full --objective completion --block-size 32 --global-batch 6 --eval-batch 4 --lr 0.003 --max-steps 3"
    argv = tiny_argv(tiny_model, data_files, text, "--test-fraction", "0.2", "--export", "none")
    exit_code, output = run([*argv, "--output-dir", str(tmp_path / "run")], tmp_path / "trial")
    assert exit_code == 0, output
    assert not (tmp_path / "run" / "model").exists()
    assert set(read_evaluations(tmp_path / "run" / EVAL_RECORDS_FOLDER)["split"]) == {"val"}
    metadata = json.loads((tmp_path / "run" / "run.json").read_text())
    assert metadata["data"]["test"]["examples"] > 0, "held out all the same"
    assert metadata["wandb"]["group"] == "study-a"
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 3]
    assert rows[-1]["facts"]["peak_memory_bytes"] > 0


def read_rows(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_the_base_is_evaluated_once_for_all_runs_of_it_and_again_where_it_is_another(tiny_model, data_files, tmp_path):
    """What is taken over is seen by its mark: the first run's losses before training, one of them raised by 1."""
    text = "--objective completion --block-size 32 --global-batch 6 --eval-batch 4 --lr 0.003 --max-steps 2"
    argv = tiny_argv(tiny_model, data_files, text, "--test-fraction", "0.2", "--base-from", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    for name, more in {
        "first": ("--mode", "full"),
        "lora": ("--mode", "lora", "--seed", "7"),
        "bf16": ("--mode", "full", "--precision", "bf16"),
        "other-data": ("--mode", "full", "--test-fraction", "0.3"),
    }.items():
        folder = tmp_path / "runs" / name
        train([*argv, *more, "--export", "last"], out=folder)
        base = read_evaluations(folder / EVAL_RECORDS_FOLDER).query("step == 0")
        if name == "first":
            marked = {
                split: rows.assign(nll=rows["nll"] + (rows.index == rows.index[0]))
                for split, rows in base.groupby("split")
            }
            for split, rows in marked.items():
                write_evaluation(folder / EVAL_RECORDS_FOLDER, rows, step=0, split=split, nll=rows["nll"])
        is_taken_over = [
            base.query("split == @split")["nll"].tolist() == rows["nll"].tolist() for split, rows in marked.items()
        ]
        assert is_taken_over == [name == "lora"] * 2, name
        initial_loss = next(row["loss"] for row in read_rows(folder) if row["kind"] == "eval")
        rows = base.query("split == 'val'")
        assert initial_loss == pytest.approx(rows["nll"].sum() / rows["targets"].sum(), rel=1e-12)


def test_a_study_reads_its_length_and_its_data_from_the_plan_of_a_run_and_says_what_cannot_be_planned(tmp_path):
    argv = ["--mode", "lora", "--block-size", "64", "--max-steps", "7", "--output-dir", str(tmp_path / "run")]
    path = tmp_path / "plan.json"
    for more, exit_code in (["--test-fraction", "0.2"], 0), (["--lora-target-modules", "none"], 2):
        process = start_process(write_plan, (CPU, [*argv, *more], path), tmp_path, run_environ(CPU), False)
        process.join(100)
        assert process.exitcode == exit_code, (tmp_path / "log").read_text()
    num_steps, fingerprint, num_units, warning = json.loads(path.read_text())
    assert (num_steps, num_units > 20, warning) == (7, True, "")
    assert re.fullmatch("[0-9a-f]{12}", fingerprint)
    assert (tmp_path / "log").read_text().startswith("error: --lora-target-modules none")


def test_a_trial_with_gpus_starts_anew_sees_only_them_and_has_a_rank_on_each(tmp_path, monkeypatch):
    """A GPU that a fork's parent has looked at cannot be used by the fork."""
    script = tmp_path / "script.py"
    monkeypatch.setattr(processes, "TRAIN_SCRIPT", script)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")  # in which the rows of all trials would end
    script.write_text(
        "import os, sys\n"
        "facts = sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('RANK'), 'torch' in sys.modules\n"
        "assert 'WANDB_RUN_ID' not in os.environ\n"
        "sys.stdout.write(' '.join(map(str, facts)) + '\\n')\n"  # at once: torchrun's ranks have no buffer
        "sys.exit(3)\n"
    )
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "log").write_text("of an earlier run\n")
    assert run(["alone"], tmp_path / "alone", Slot(gpus=("5",), num_threads=1)) == (3, "alone 5 None False\n")
    script.write_text(script.read_text().replace("sys.exit(3)", ""))
    exit_code, output = run(["two"], tmp_path / "two", Slot(gpus=("2", "3"), num_threads=1))
    assert exit_code == 0
    lines = sorted(line for line in output.splitlines() if line.startswith("two"))
    assert lines == ["two 2,3 0 False", "two 2,3 1 False"]
