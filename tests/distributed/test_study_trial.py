"""One trial of a study as it is started: a real run in a process of its own, and what it sees."""

import json
import re
from pathlib import Path

from helpers.tiny_inputs import tiny_argv

from trainer.tools.study import planning, trial_process
from trainer.tools.study.trial_process import Slot, start_run
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations


def run(argv: list[str], folder: Path, *gpus: str) -> int | None:
    process = start_run(Slot(gpus=gpus, num_threads=1), argv, folder, group="study-a")
    process.join(200)
    return process.exitcode


def test_a_trial_of_the_search_is_a_whole_run_that_never_sees_the_test_records(tiny_model, data_files, tmp_path):
    text = "--mode full --objective completion --block-size 32 --global-batch 6 --eval-batch 4 --lr 0.003 --max-steps 3"
    argv = tiny_argv(tiny_model, data_files, text, "--test-fraction", "0.2", "--export", "none")
    assert run([*argv, "--output-dir", str(tmp_path / "run")], tmp_path / "trial") == 0
    assert "nothing exported" in (tmp_path / "trial" / "log").read_text()
    assert not (tmp_path / "run" / "model").exists()
    assert set(read_evaluations(tmp_path / "run" / EVAL_RECORDS_FOLDER)["split"]) == {"val"}
    metadata = json.loads((tmp_path / "run" / "run.json").read_text())
    assert metadata["data"]["test"]["examples"] > 0, "held out all the same"
    assert metadata["wandb"]["group"] == "study-a"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 3]
    assert rows[-1]["facts"]["peak_memory_bytes"] > 0


def test_a_study_reads_its_length_and_its_data_from_the_plan_of_a_run(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    argv = ["--block-size", "64", "--max-steps", "7"]
    num_steps, fingerprint = planning.resolve_run(("full", "lora"), argv, Slot(gpus=(), num_threads=1))
    assert num_steps == 7
    assert re.fullmatch("[0-9a-f]{12}", fingerprint)


def test_a_trial_with_gpus_starts_anew_sees_only_them_and_has_a_rank_on_each(tmp_path, monkeypatch):
    """A GPU that a fork's parent has looked at cannot be used by the fork."""
    script = tmp_path / "script.py"
    monkeypatch.setattr(trial_process, "TRAIN_SCRIPT", script)
    script.write_text(
        "import os, sys\n"
        "print(sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('RANK'), 'torch' in sys.modules)\n"
        "sys.exit(3)\n"
    )
    assert run(["alone"], tmp_path / "alone", "5") == 3
    assert (tmp_path / "alone" / "log").read_text() == "alone 5 None False\n"
    script.write_text(script.read_text().replace("sys.exit(3)", ""))
    assert run(["two"], tmp_path / "two", "2", "3") == 0
    lines = (tmp_path / "two" / "log").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("two")) == ["two 2,3 0 False", "two 2,3 1 False"]
