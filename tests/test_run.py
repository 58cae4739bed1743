"""What a run leaves: one real run of each mode on two ranks, read back."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATES
from ranks import train

from trainer.config.schema import Batch, Settings
from trainer.training.loop import Course


@pytest.fixture(scope="module", params=["full", "lora"])
def left(request, tiny, records, tmp_path_factory) -> dict[str, Any]:
    """A finished run: two epochs in steps of 4 examples over 2 ranks, with accumulation, evaluated within the epoch."""
    out = tmp_path_factory.mktemp("run") / request.param
    words = f"--mode {request.param} --model {tiny} --data {records[0]} --val-data {records[1]} --objective completion"
    words += " --block-size 32 --global-batch 4 --micro-batch 1 --epochs 2 --eval-every 3 --wandb offline --lr 1e-2"
    words += " --also tensorboard --profile 2"
    output = train([*words.split(), *TEMPLATES], out=out, ranks=2, env={"WANDB_MODE": "offline"})
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    about = json.loads((out / "run.json").read_text())
    return {"mode": request.param, "out": out, "rows": rows, "output": output, "about": about}


def of(left: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in left["rows"] if row["kind"] == kind]


def test_every_step_is_a_row_with_every_column(left):
    steps = of(left, "step")
    columns = {"kind", "step", "epoch", "samples", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "time"}
    assert [row["step"] for row in steps] == list(range(1, 15)), "25 rows are 7 steps of 4, the last of 1"
    assert all(set(row) == columns for row in steps)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in steps)
    assert [row["samples"] for row in steps][5:8] == [24, 25, 29], "the ragged step counts one example"
    assert [row["epoch"] for row in steps][5:8] == pytest.approx([24 / 25, 1.0, 1 + 4 / 25])
    assert [row["lr"] for row in steps] == pytest.approx([1e-2 * (14 - n) / 14 for n in range(14)])
    assert all(a["time"] < b["time"] and a["tokens"] < b["tokens"] for a, b in pairwise(steps))


def test_it_is_evaluated_at_the_start_when_due_and_at_the_end(left):
    evals = of(left, "eval")
    columns = {"kind", "step", "epoch", "samples", "tokens", "loss", "perplexity", "eval_tokens", "time"}
    assert [row["step"] for row in evals] == [0, 3, 6, 9, 12, 14]
    assert all(set(row) == columns for row in evals)
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss"])) for row in evals)
    assert {row["eval_tokens"] for row in evals} == {left["about"]["data"]["val"]["counted_tokens"]}
    assert evals[-1]["loss"] < evals[0]["loss"], "it learns"


def test_the_epoch_row_is_the_token_mean_of_its_steps(left, tiny):
    from trainer.data.dataset import load, prepare
    from trainer.data.sampler import epoch_order, step_counts

    epochs = of(left, "epoch")
    assert [row["epoch"] for row in epochs] == [1.0, 2.0]
    settings = Settings.from_dict(left["about"]["settings"])
    data = load(prepare(settings.data, model=tiny, global_batch=4).folder)
    for number, row in enumerate(epochs):
        order = epoch_order(data.train, seed=42, epoch=number, global_batch=4, shuffle=True, by_length=True)
        counted = [step_counts(data.train, order, place, 4)[2] for place in range(7)]
        losses = [step["loss"] for step in of(left, "step")[7 * number : 7 * number + 7]]
        mean = sum(loss * n for loss, n in zip(losses, counted, strict=True)) / sum(counted)
        assert row["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_a_second_sink_has_the_same_rows_from_one_rank(left):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((left["out"] / "tensorboard").iterdir())) == 1
    losses = EventAccumulator(str(left["out"] / "tensorboard")).Reload().Scalars("val/loss")
    assert [(row.step, row.value) for row in losses] == [
        (row["step"], pytest.approx(row["loss"], rel=1e-7)) for row in of(left, "eval")
    ]


def test_a_profile_has_its_trace_and_its_ten_largest_operations(left):
    import gzip

    trace = json.loads(gzip.decompress((left["out"] / "profile" / "trace.json.gz").read_bytes()))
    assert any("matmul" in event.get("name", "") or "addmm" in event.get("name", "") for event in trace["traceEvents"])
    lines = (left["out"] / "profile" / "top.md").read_text().splitlines()
    assert len(lines) == 2 + 10
    assert "profile of 2 steps in" in left["output"]


def test_run_json_says_what_was_decided(left):
    about = left["about"]
    assert about["mode"] == left["mode"]
    assert {"--data", "--lr", "--eval-every"} <= set(about["overridden"])
    assert about["resolved"]["ranks"] == 2
    assert about["resolved"]["accumulation"] == 2
    assert about["resolved"]["total_steps"] == 14
    assert about["deepspeed"]["zero_optimization"] == {"stage": 0}
    assert about["resolved"]["state_in_common"]
    assert about["data"]["train"]["records"] == 25
    assert about["data"]["val"]["examples"] == 9
    assert len(about["data"]["fingerprint"]) >= 16
    assert about["model"]["trainable"] == (8_656 if left["mode"] == "full" else 4_096)
    assert about["versions"]["deepspeed"]
    assert about["hardware"]["cores"] >= 1


def test_the_last_row_sums_the_run_up(left):
    last = left["rows"][-1]
    assert (last["kind"], last["event"]) == ("event", "finished")
    facts = last["facts"]
    evals = of(left, "eval")
    assert facts["final"] == {"step": 14, "epoch": 2.0, "loss": evals[-1]["loss"]}
    assert facts["best"]["loss"] == min(row["loss"] for row in evals)
    assert facts["wall_seconds"] > evals[-1]["time"]
    assert facts["device_hours"] == pytest.approx(facts["wall_seconds"] * 2 / 3600)
    checkpoint = left["out"] / "checkpoints" / "step-000014"
    assert facts["checkpoint_bytes"] == sum(path.stat().st_size for path in checkpoint.iterdir())
    assert facts["peak_memory_bytes"] > 50 * 2**20
    assert "reloaded and checked" in facts["export"]


def test_weights_and_biases_has_the_same_losses(left):
    import subprocess

    import wandb

    file = next((left["out"] / "wandb").glob("offline-run-*/run-*.wandb"))
    core = str(Path(wandb.__file__).parent / "bin" / "wandb-core")
    words = [core, "leet", "inspect", "--no-observability", "--json", "--run-file", str(file), str(file.parent.parent)]
    answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    items = [row["history"]["item"] for row in map(json.loads, answer.stdout.splitlines()) if row["type"] == "history"]
    kept = {name: [item[name] for item in items if name in item] for name in ("train/loss", "val/loss")}
    assert kept["train/loss"] == pytest.approx([row["loss"] for row in of(left, "step")], rel=1e-12)
    assert kept["val/loss"] == pytest.approx([row["loss"] for row in of(left, "eval")], rel=1e-12)


def test_the_terminal_shows_one_voice_and_the_table(left):
    assert left["output"].count("validation loss") >= 7
    assert left["output"].count("not comparable with the card: ") == 1
    assert left["output"].count("card val") == 1
    assert "Warning" not in left["output"]


def course(every: str, total: int = 10) -> Course:
    from trainer.config.cli import read

    settings = read(["--mode", "full", "--eval-every", every]).settings
    return Course(
        settings=settings, batch=Batch(micro=1, accumulation=1, ranks=1), total_steps=total, steps_per_epoch=4
    )


@pytest.mark.parametrize(
    ("every", "steps"),
    [("epoch", [4, 8, 10]), ("3", [3, 6, 9, 10]), ("never", [10]), ("1", list(range(1, 11))), ("99", [10])],
)
def test_due_every_so_many_steps_every_epoch_or_never_but_always_at_the_end(every, steps):
    plan = course(every)
    assert [step for step in range(1, 11) if plan.due(every, step)] == steps
