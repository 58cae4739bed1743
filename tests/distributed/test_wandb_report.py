"""The comparison as a W&B Report, with the card as a run, and real runs there, by the real client in processes."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import launch_ranks
from helpers.fake_runs import make_run_folder
from helpers.fake_wandb import ENTITY, FakeWandb, child_env
from helpers.tiny_inputs import tiny_argv
from transformers.integrations.integration_utils import rewrite_logs

from trainer.config import reference
from trainer.report.run_data import read_folder
from trainer.report.wandb_report import REFERENCE_RUN_ID
from trainer.tracking.wandb_keys import AXES

SCRIPT = Path(__file__).parents[2] / "launch" / "compare.py"


def run_python(folder: Path, *argv: object, server: FakeWandb, **variables: str) -> "subprocess.CompletedProcess[str]":
    """A process in `folder` that knows nobody's W&B login but the one there."""
    env = child_env(**{"HOME": str(folder), "MPLCONFIGDIR": str(folder / "mpl"), **server.env(folder), **variables})
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    """On loopback."""
    with FakeWandb() as fake:
        yield fake
    assert not fake.unknown_requests


def test_a_server_that_is_gone_is_one_line_and_the_report_on_disk_is_written(server, tmp_path) -> None:
    make_run_folder(tmp_path / "full")
    gone = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_HTTP_TIMEOUT": "1"}
    process = run_python(tmp_path, SCRIPT, "full", "--wandb-report", f"{ENTITY}/p", server=server, **gone)
    assert process.returncode == 2
    assert f"--wandb-report {ENTITY}/p: W&B did not take it (" in process.stderr
    assert "Traceback" not in process.stderr
    assert (tmp_path / "comparison" / "report.html").exists()


LOG_CODE = """
import json, sys, wandb
run = wandb.init(project="p", id="theirs")
for row in json.loads(sys.argv[1]):
    run.log(row)
run.finish()
"""
#: several comparisons in one process, which takes seconds to start; each argument is a command line
COMPARE_CODE = """
import runpy, sys
main = runpy.run_path(sys.argv[1])["main"]
print([main(line.split()) for line in sys.argv[2:]])
"""


def test_a_run_of_the_trainer_on_wandb_is_plotted_and_one_that_is_gone_is_a_line(
    server: FakeWandb, tmp_path: Path
) -> None:
    for mode in ("full", "lora"):
        make_run_folder(tmp_path / mode, mode)
    logs = [{"loss": 4 - n / 9, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": n / 9} for n in (1, 9)]
    logs.append({"eval_loss": 2.25, "eval_runtime": 1.0, "epoch": 1.0})
    rows = [rewrite_logs(log) | {"train/global_step": step} for step, log in zip((10, 90, 90), logs, strict=True)]
    process = run_python(tmp_path, "-c", LOG_CODE, json.dumps(rows), server=server)
    assert process.returncode == 0, process.stderr
    lines = [f"full {ENTITY}/p/gone", f"full lora {ENTITY}/p/theirs"]
    process = run_python(tmp_path, "-c", COMPARE_CODE, SCRIPT, *lines, server=server)
    assert process.stdout.endswith("\n[2, 0]\n"), process.stderr
    (gone,) = process.stderr.splitlines()
    assert gone.startswith(f"error: {ENTITY}/p/gone: W&B does not give it: ")
    name = server.runs["theirs"].fields.get("displayName", "theirs")
    assert f"{name} is a run of Hugging Face's Trainer: plotted, never ranked." in process.stdout
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert f"{name}: 2.2500" in page
    assert "var(--trainer)" in page


def test_a_wandb_report_has_verdict_tables_panels_and_the_card_and_is_updated(
    server: FakeWandb, tmp_path: Path
) -> None:
    """The run set is by config.mode, the card dashed and grey, and logged once, or completed."""
    for mode in ("full", "lora"):
        make_run_folder(tmp_path / mode, mode)
    num_upserts = []
    for i in range(3):
        process = run_python(tmp_path, SCRIPT, "full", "lora", "--wandb-report", f"{ENTITY}/p", server=server)
        assert process.returncode == 0, process.stderr
        num_upserts.append(server.operations.count("UpsertBucket"))
        card = server.runs[REFERENCE_RUN_ID]
        if i == 0:  # as after an upload that timed out
            card.history, card.summary = card.history[:1], {"_step": 6_621}
    assert f"W&B Report: {server.url}/{ENTITY}/p/reports/" in process.stdout
    assert server.operations.count("upsertView") == 3
    (view,) = server.views.values()
    assert (view["displayName"], view["type"]) == ("Full against LoRA, acled-demo", "runs")
    spec = view["spec"]
    text = "\n".join(block["content"] for block in spec["blocks"] if block["type"] == "markdown-block")
    assert "Cannot tell whether LoRA (rank 8, lr 0.005) is as good as full (lr 0.0005)" in text
    assert re.search(r"\| +1 \| +30 \| 1\.2262 \| 2\.4463 \|", text)
    assert "unknown of the card" in text.lower()
    (grid,) = (block for block in spec["blocks"] if block["type"] == "panel-grid")
    (runs,) = grid["metadata"]["runSets"]
    (mode,) = (row for row in runs["filters"]["filters"] if row["key"] == {"section": "config", "name": "mode"})
    assert (mode["op"], mode["value"]) == ("IN", ["full", "lora", "reference"])
    panels = grid["metadata"]["panelBankSectionConfig"]["panels"]
    plots = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    train = [("train/epoch", f"train/{name}") for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")]
    losses = [("train/epoch", "eval/loss"), ("_runtime", "eval/loss"), ("tokens", "train/loss")]
    assert {(plot["xAxis"], *plot["metrics"]) for plot in plots} == {*train, *losses}
    assert Counter(panel["viewType"] for panel in panels)["Run Comparer"] == 1
    assert plots[0]["overrideMarks"] == {"lora0042:eval/loss": "dashed", f"{REFERENCE_RUN_ID}:eval/loss": "dashed"}
    assert "#767676" in str(grid["metadata"]["customRunColors"][REFERENCE_RUN_ID])
    positions = [(panel["layout"]["x"], panel["layout"]["y"]) for panel in panels]
    assert len(set(positions)) == len(positions), "panels on top of one another"
    rows = [(row["train/global_step"], row["train/epoch"], row["eval/loss"]) for row in card.history]
    assert rows == [(6_621, 1, 1.2262), (13_242, 2, 1.0048), (19_863, 3, 0.9414)]
    assert num_upserts[0] < num_upserts[1] == num_upserts[2], "not again once it is whole"
    assert card.fields["jobType"] == "reference"
    assert card.metric_definitions()["eval/*"]["axis"] == "train/global_step"
    assert (card.config_values()["mode"], card.config_values()["unknown"]) == ("reference", [*reference.UNKNOWN_DATA])


def test_a_real_run_is_synced_with_its_rows_tags_printed_lines_and_model(
    server: FakeWandb, tiny_model: str, data_files: tuple[str, str], tmp_path: Path
) -> None:
    text = "--mode lora --objective completion --block-size 32 --global-batch 4 --epochs 2 --save-every never"
    argv = tiny_argv(tiny_model, data_files, f"{text} --lr 1e-2 --wandb offline --wandb-tags night,lora")
    launch_ranks.train(argv, out=tmp_path / "run", env={"WANDB_MODE": "offline", "WANDB_LOG_MODEL": "end"})
    synced = run_python(tmp_path, "-m", "wandb", "sync", *tmp_path.glob("run/wandb/offline-run-*"), server=server)
    assert "ERROR" not in synced.stdout + synced.stderr
    run = read_folder(tmp_path / "run")
    there = server.runs[run.run_id]
    losses = {row["_step"]: row["eval/loss"] for row in there.history if "eval/loss" in row}
    assert losses == pytest.approx(dict(zip(run.evals["step"], run.evals["loss"], strict=True)))
    assert all(set(AXES) <= set(row) for row in there.history)
    assert {there.metric_definitions()[name]["axis"] for name in ("eval/*", "train/*")} == {"train/global_step"}
    assert (there.config_values()["mode"], there.project) == ("lora", "gpt2-full-vs-lora")
    assert {"night", "lora"} <= set(there.fields["tags"])
    assert there.files["output.log"].decode().count("  validation loss ") == len(losses), "what was printed"
    (model,) = (each["content"] for each in server.artifacts.values() if each["artifactTypeName"] == "model")
    assert "adapter_model.safetensors" in model
