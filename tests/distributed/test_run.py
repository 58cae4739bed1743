"""What a run leaves: one real run on two ranks, read back."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from helpers.launch_ranks import train
from helpers.tiny_inputs import tiny_argv

from trainer.config.settings import Settings
from trainer.data.dataset import load
from trainer.data.prepare import prepare
from trainer.data.sampler import epoch_order, step_counts
from trainer.tracking.eval_records import EVAL_RECORDS_FOLDER, read_evaluations

SECRETS = {"WANDB_API_KEY": "f00dfeed" * 5, "HF_TOKEN": "hf_" + "Tq9" * 12, "HUB_PASSWORD": "correct-horse-battery"}
PROXY = {"https_proxy": "http://proxyuser:proxy-pass-word@127.0.0.1:9"}


@pytest.fixture(scope="module")
def finished_run(tiny_model, data_files, tmp_path_factory) -> dict[str, Any]:
    """A finished run: two epochs in steps of 4 examples over 2 ranks, with accumulation, evaluated within the epoch."""
    out = tmp_path_factory.mktemp("run") / "lora"
    text = "--mode lora --objective completion --block-size 32 --global-batch 4 --micro-batch 1 --epochs 2"
    text += " --eval-every 3 --wandb offline --lr 1e-2"
    output = train(
        tiny_argv(tiny_model, data_files, text),
        out=out,
        world_size=2,
        env={"WANDB_MODE": "offline", **SECRETS, **PROXY},
    )
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("step", "eval", "epoch", "event")}
    metadata = json.loads((out / "run.json").read_text())
    return {"out": out, "output": output, "about": metadata, **by_kind}


def test_no_key_or_token_of_the_environment_is_written_or_printed(finished_run):
    """Also in the W&B files and the model card."""
    contents = {path: path.read_bytes() for path in finished_run["out"].rglob("*") if path.is_file()}
    assert any(path.suffix == ".wandb" for path in contents)
    for secret in (*SECRETS.values(), "proxy-pass-word"):
        assert [path for path, content in contents.items() if secret.encode() in content] == []
        assert secret not in finished_run["output"]


def test_every_step_of_a_run_is_a_record_with_every_column(finished_run):
    steps = finished_run["step"]
    columns = {"kind", "step", "epoch", "samples", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "time"}
    assert [row["step"] for row in steps] == list(range(1, 15)), "25 rows are 7 steps of 4, the last of 1"
    assert all(set(row) == columns for row in steps)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in steps)
    assert [row["samples"] for row in steps][5:8] == [24, 25, 29], "the ragged step counts one example"
    assert [row["epoch"] for row in steps][5:8] == pytest.approx([24 / 25, 1.0, 1 + 4 / 25])
    assert [row["lr"] for row in steps] == pytest.approx([1e-2 * (14 - n) / 14 for n in range(14)])
    assert all(a["time"] < b["time"] and a["tokens"] < b["tokens"] for a, b in pairwise(steps))


def test_the_losses_of_the_records_give_each_reported_loss_to_the_last_bit(finished_run):
    """A run is evaluated at the start, when due and at the end."""
    evals, val = finished_run["eval"], finished_run["about"]["data"]["val"]
    columns = {"kind", "step", "epoch", "samples", "tokens", "loss", "perplexity", "eval_tokens", "time"}
    assert [row["step"] for row in evals] == [0, 3, 6, 9, 12, 14]
    assert evals[-1]["loss"] < evals[0]["loss"], "it learns"
    table = read_evaluations(finished_run["out"] / EVAL_RECORDS_FOLDER)
    assert len(table) == val["examples"] * len(evals)
    for evaluation in evals:
        assert set(evaluation) == {*columns, "bits_per_byte"}
        assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["loss"]))
        assert evaluation["eval_tokens"] == val["num_target_tokens"]
        rows = table[table["step"] == evaluation["step"]]
        assert len(rows) == val["examples"]
        assert math.fsum(rows["nll"]) / rows["targets"].sum() == evaluation["loss"]
        assert evaluation["bits_per_byte"] == math.fsum(rows["nll"]) / math.log(2) / rows["bytes"].sum()


def test_the_epoch_record_is_the_token_mean_of_its_steps(finished_run, tiny_model):
    assert [row["epoch"] for row in finished_run["epoch"]] == [1.0, 2.0]
    settings = Settings(**finished_run["about"]["settings"])
    data = load(prepare(settings.data, model=tiny_model, global_batch=4).folder)
    for number, row in enumerate(finished_run["epoch"]):
        order = epoch_order(data.train, seed=42, epoch=number, global_batch=4, group_by_length=True)
        counted = [step_counts(data.train, order, place, 4)[1] for place in range(7)]
        losses = [step["loss"] for step in finished_run["step"][7 * number : 7 * number + 7]]
        mean = sum(loss * n for loss, n in zip(losses, counted, strict=True)) / sum(counted)
        assert row["train_loss"] == pytest.approx(mean, rel=1e-12)


def test_run_json_records_the_resolved_plan_and_the_last_row_summarises_the_run(finished_run):
    metadata, last, evals = finished_run["about"], finished_run["event"][-1], finished_run["eval"]
    assert metadata["mode"] == "lora"
    assert finished_run["output"].count("validation loss") >= 7, "of one rank"
    assert {"--data", "--lr", "--eval-every"} <= set(metadata["overridden"])
    resolved = metadata["resolved"]
    assert (resolved["ranks"], resolved["accumulation"], resolved["total_steps"]) == (2, 2, 14)
    assert metadata["deepspeed"]["zero_optimization"]["stage"] == 0
    assert "of state fit; --ds-config zero1 to zero3 shard it" in resolved["ds_reason"]
    assert [entry["path"] for entry in metadata["execution"]] == ["eager"]
    assert (metadata["data"]["train"]["records"], metadata["data"]["val"]["examples"]) == (25, 9)
    assert metadata["model"]["trainable"] == 4_096
    assert metadata["versions"]["deepspeed"]
    assert last["event"] == "finished"
    facts = last["facts"]
    assert facts["final"] == {"step": 14, "epoch": 2.0, "loss": evals[-1]["loss"]}
    assert facts["best"]["loss"] == min(row["loss"] for row in evals)
    assert facts["wall_seconds"] > evals[-1]["time"]
    assert facts["device_hours"] == pytest.approx(facts["wall_seconds"] * 2 / 3600)
    checkpoint = finished_run["out"] / "checkpoints" / "step-000014"
    assert facts["checkpoint_bytes"] == sum(path.stat().st_size for path in checkpoint.iterdir())
    assert facts["peak_memory_bytes"] > 50 * 2**20
    assert "reloaded and checked" in facts["export"]
