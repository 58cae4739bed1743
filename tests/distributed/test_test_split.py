"""Test and retained text through the real program: before training and at the exported weights, never in between."""

import json
import math
import shutil
from pathlib import Path

import pytest
from helpers.launch_ranks import train
from helpers.tiny_inputs import TEMPLATE_FLAGS, write_records

from trainer.report.run_data import read_folder
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations


@pytest.fixture(scope="module")
def split_argv(tiny_model, data_files, session_dir) -> list[str]:
    retained = session_dir / "retained.txt"  # 5 blocks of 32: 34 texts of 4 tokens and their ends, 10 left out
    retained.write_text("".join(f"w{i} w{i + 1} w{i + 2} w{i + 3}\n" for i in range(34)))
    val, test = (
        write_records(session_dir / f"{name}-twin.jsonl", num_records=9, seed=2, unknown_word=name)
        for name in ("val", "test")
    )
    return (
        f"--mode full --model {tiny_model} --data {data_files[0]} --val-data {val} --test-data {test} "
        f"--retain-data {retained} --objective completion --block-size 32 --global-batch 4 --micro-batch 1 "
        "--max-steps 14 --eval-every 3 --save-every 3 --lr 0.1 --wandb disabled --preset demo"
    ).split() + list(TEMPLATE_FLAGS)


def read_run(folder: Path):
    """(events of test and retained text, {(step, split): rows}, all records)."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = dict(iter(read_evaluations(folder / EVAL_RECORDS_FOLDER).groupby(["step", "split"])))
    events = [record for record in records if record.get("event") in ("test_evaluation", "retain_evaluation")]
    return events, evaluations, records


@pytest.fixture(scope="module")
def best_run(split_argv, session_dir) -> Path:
    """A run on two ranks whose best weights are exported."""
    out = session_dir / "tested-best"
    train([*split_argv, "--export", "best", "--score", "f1", "--ds-config", "zero3"], out=out, world_size=2)
    return out


@pytest.mark.slow
def test_the_test_split_is_evaluated_before_training_and_at_the_exported_weights_only(best_run):
    events, evaluations, records = read_run(best_run)
    (finished,) = [record for record in records if record.get("event") == "finished"]
    chosen_step = finished["facts"]["exported"]["step"]
    assert [(event["step"], event["event"]) for event in events] == [
        (step, f"{split}_evaluation") for step in (0, chosen_step) for split in ("test", "retain")
    ]
    assert {step for step, split in evaluations if split != "val"} == {0, chosen_step}
    for event in events:
        split = event["event"].removesuffix("_evaluation")
        rows = evaluations[event["step"], split]
        assert len(rows) == {"test": 9, "retain": 5}[split]
        assert event["facts"]["num_target_tokens"] == rows["targets"].sum()
        assert math.fsum(rows["nll"]) / rows["targets"].sum() == event["facts"]["loss"]
        num_bytes = rows["bytes"].sum()
        assert event["facts"]["bits_per_byte"] == math.fsum(rows["nll"]) / math.log(2) / num_bytes
    val = [record for record in records if record["kind"] == "eval"]
    best = min(val[1:], key=lambda record: record["loss"])
    assert chosen_step == best["step"] < val[-1]["step"]
    assert next(event["facts"]["loss"] for event in events if event["step"]) == best["loss"], "the same tokens"
    test_before, retain_before, test_after, retain_after = (event["facts"]["loss"] for event in events)
    assert test_after < test_before
    assert read_folder(best_run).forgetting == retain_after - retain_before != 0


@pytest.mark.slow
def test_a_resumed_run_has_each_evaluation_of_each_record_once(best_run, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(best_run, folder, symlinks=True)
    steps = sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))
    train(["--mode", "full", "--resume", f"step-{steps[0]}"], out=folder, world_size=2)
    before, after = read_run(best_run), read_run(folder)
    assert [event["facts"] for event in after[0]] == [event["facts"] for event in before[0]]
    assert set(after[1]) == set(before[1])
    for key, rows in before[1].items():
        assert rows.equals(after[1][key]), key
    assert before[1][after[0][-1]["step"], "test"]["score_f1"].notna().all(), "texts and scores, too"
