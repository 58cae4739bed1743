"""The comparison and Weights & Biases: runs read back, the Report and the card, by the real client in processes."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import launch_ranks
from helpers.fake_runs import make_metadata, make_records, make_run_folder, write_run_folder
from helpers.fake_wandb import ENTITY, FakeWandb, child_env
from helpers.tiny_inputs import tiny_argv

from trainer.config import reference
from trainer.config.errors import UserError
from trainer.report.comparable import comparison_blockers, group_by_seed, reference_blockers
from trainer.report.load import is_wandb_path, load_runs, metadata_from_config, read_offline
from trainer.report.run_data import read_folder
from trainer.report.wandb_report import REFERENCE_RUN_ID
from trainer.tracking.records import EventRecord, to_line
from trainer.tracking.wandb_keys import AXES, wandb_config

SCRIPT = Path(__file__).parents[2] / "launch" / "compare.py"
#: writes the rows of a run as a training process does; arguments: run.json's content, folder, mode of W&B
LOG_RUN_CODE = """
import json, sys
from pathlib import Path
from helpers.fake_runs import make_records
from trainer.tracking.wandb_logger import start_wandb
run, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
run["wandb"]["mode"] = sys.argv[3]
sink = start_wandb(run, folder)
for record in make_records(run, retained=(1.0, 1.25), scores={"f1": 0.5}):
    sink.log(record)
sink.close(0)
"""


def run_python(
    folder: Path, *argv: object, server: FakeWandb | None = None, python: str = sys.executable, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """A process in `folder` that knows nobody's W&B login, or with `server` one there."""
    own_variables = {"HOME": str(folder), "TRAINER_CACHE": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "mpl")}
    env = child_env(**{**own_variables, **(server.env(folder) if server else {}), **variables})
    command = [python, *map(str, argv)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


def log_wandb_run(folder: Path, mode: str, **variables: str) -> None:
    folder.mkdir(parents=True)
    content = json.dumps(make_metadata("lora"))
    process = run_python(folder, "-c", LOG_RUN_CODE, content, folder, mode, **variables)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def offline_run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run as an offline W&B folder, moved away from its run folder."""
    folder = tmp_path_factory.mktemp("offline") / "run"
    log_wandb_run(folder, "offline")
    moved = tmp_path_factory.mktemp("elsewhere") / "copied"
    next(folder.glob("wandb/offline-run-*")).rename(moved)
    return moved


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    """On loopback."""
    with FakeWandb() as fake:
        yield fake
    assert not fake.unknown_requests


@pytest.fixture
def run_compare(tmp_path: Path, fast_python: str) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Runs launch/compare.py in `tmp_path`: `run_compare(argument, ..., server=, VARIABLE=)`."""
    return partial(run_python, tmp_path, SCRIPT, python=fast_python)


# --- runs read back ---


def test_an_offline_wandb_folder_reads_as_the_run_folder_does(offline_run_dir, tmp_path) -> None:
    content = make_metadata("lora")
    records = make_records(content, retained=(1.0, 1.25), scores={"f1": 0.5})
    ours = read_folder(write_run_folder(tmp_path / "ours", content, records))
    (theirs,), problems = load_runs([str(offline_run_dir)])
    assert problems == []
    axes = ("step", "epoch", "loss")
    columns = {"steps": (*axes, "samples", "tokens", "lr", "grad_norm"), "evals": (*axes, "perplexity")}
    for kind, names in (columns | {"epochs": ("step", "epoch", "train_loss")}).items():
        for name in names:
            np.testing.assert_array_equal(getattr(ours, kind)[name], getattr(theirs, kind)[name], f"{kind} {name}")
    assert (theirs.run_id, theirs.name, theirs.mode, theirs.state) == (ours.run_id, ours.name, ours.mode, "finished")
    assert theirs.summary == ours.summary
    assert theirs.forgetting == ours.forgetting == 0.25
    assert theirs.scores == ours.scores == {"f1": 0.5}
    assert comparison_blockers(ours, theirs) == []
    assert {**theirs.metadata, "wandb": None} == {**ours.metadata, "wandb": None}
    assert reference_blockers(theirs) == reference_blockers(ours)
    theirs.metadata["settings"]["train"]["seed"] = 7
    assert len(group_by_seed([ours, theirs])) == 1, "as two seeds of one setting"


def test_a_truncated_or_foreign_wandb_file_is_read_as_far_as_it_goes_or_reported(
    offline_run_dir: Path, tmp_path: Path
) -> None:
    whole = next(offline_run_dir.glob("*.wandb")).read_bytes()
    torn = tmp_path / "run-lora0042.wandb"
    notes = ""
    for end in (len(whole) * 2 // 3, len(whole) * 2 // 3 + 1):  # no record is one byte: one of them is inside of one
        torn.write_bytes(whole[:end])
        run = read_offline("x", [torn])
        assert 0 < len(run.steps["step"]) < 90
        assert "still going" in run.notes[-1], "whole records alone tell no cut from a run that goes on"
        notes += run.notes[0]
    assert "cut off" in notes
    for content, message in ((b"something else", "is not a W&B run file"), (whole[:7], "holds no run")):
        torn.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_offline("x", [torn])
    with pytest.raises(UserError, match="holds 2 W&B runs"):
        read_offline("x", [tmp_path / "run-a.wandb", tmp_path / "run-b.wandb"])


def test_a_wandb_run_of_older_keys_or_of_the_card_is_refused_and_paths_of_wandb_are_known() -> None:
    config = wandb_config(json.loads(json.dumps(make_metadata("lora"))))
    with pytest.raises(UserError, match="`run` of its W&B config: schema_version is 4, expected"):  # keys val/*
        metadata_from_config({**config, "run": {**config["run"], "schema_version": 4}})
    with pytest.raises(UserError, match="the card itself"):
        metadata_from_config({"mode": "reference"})
    assert is_wandb_path("entity/project/abcd1234")
    assert not any(map(is_wandb_path, ("runs/full", "a/b/c/d", "/abs/a/b", "./a/b", "../a/b")))


def test_a_run_on_the_wandb_server_reads_as_its_run_folder_does(server: FakeWandb, tmp_path: Path) -> None:
    content = make_metadata("lora")
    log_wandb_run(tmp_path / "run", "online", **server.env(tmp_path))
    code = (
        "import json, sys; from trainer.report.load import load_runs; (run,), problems = load_runs([sys.argv[1]]);"
        "print(json.dumps([run.run_id, run.state, run.mode, run.evals['loss'].tolist(), run.steps['loss'].tolist(),"
        "problems, dict(run.metadata), dict(run.summary)]))"
    )
    path = f"{ENTITY}/{content['wandb']['project']}/{content['run_id']}"
    process = run_python(tmp_path, "-c", code, path, server=server)
    assert process.returncode == 0, process.stderr
    run_id, state, mode, evals, steps, problems, metadata, end = json.loads(process.stdout)
    ours = read_folder(write_run_folder(tmp_path / "ours", content, make_records(content)))
    assert (run_id, state, mode, problems) == (ours.run_id, "finished", "lora", [])
    assert (evals, steps) == (ours.evals["loss"].tolist(), ours.steps["loss"].tolist())
    assert metadata["data"]["fingerprint"] == content["data"]["fingerprint"]
    assert end["wall_seconds"] == 100.0


def test_a_run_that_the_server_does_not_have_no_login_and_a_server_that_is_gone_are_one_line(
    server: FakeWandb, run_compare: Any, tmp_path: Path
) -> None:
    make_run_folder(tmp_path / "full")
    gone = server.env(tmp_path) | {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_HTTP_TIMEOUT": "1"}
    for arguments, options, message in (
        ([f"{ENTITY}/p/gone0000"], {"server": server}, "W&B does not give it: Could not find run"),
        ([f"{ENTITY}/p/gone0000"], {}, "gone0000: no such run"),
        (["full", "--wandb-report", f"{ENTITY}/p"], gone, f"--wandb-report {ENTITY}/p: W&B did not take it ("),
    ):
        process = run_compare(*arguments, **options)
        assert process.returncode == 2
        assert message in process.stderr
        assert "Traceback" not in process.stderr


# --- the Report ---


def test_the_wandb_report_spec_is_written_without_any_network(server: FakeWandb, run_compare: Any, tmp_path) -> None:
    """Verdict, tables and panels, the run set by config.mode, the card dashed and grey."""
    for mode in ("full", "lora"):
        folder = make_run_folder(tmp_path / mode, mode)
        texts = [{"prompt": "Where?", "reference": "Here.", "base": "a a a", "completion": f"By {mode}."}]
        event = EventRecord(event="samples", step=90, message="", time=1.0, facts={"epoch": 3.0, "texts": texts})
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(to_line(event) + "\n")
    process = run_compare("full", "lora", "--wandb-report-json", "specs/report.json", server=server)
    assert process.returncode == 0, process.stderr
    assert (server.operations, server.connections) == ([], 0)
    spec = json.loads((tmp_path / "specs" / "report.json").read_text())
    text = "\n".join(block["content"] for block in spec["blocks"] if block["type"] == "markdown-block")
    assert "Cannot tell whether LoRA (rank 8, lr 0.005) is as good as full (lr 0.0005)" in text
    assert re.search(r"Where\?.*Here\..*a a a.*By full\..*By lora\.", text, re.DOTALL)
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


def test_real_runs_are_synced_compared_and_reported(
    server: FakeWandb, run_compare: Any, tiny_model: str, data_files: tuple[str, str], tmp_path: Path
) -> None:
    """Both modes trained for real and offline, compared from folder and W&B file, sent with the card, and reported."""
    for mode in ("full", "lora"):
        text = f"--mode {mode} --objective completion --block-size 32 --global-batch 4 --epochs 2 --save-every never"
        argv = tiny_argv(tiny_model, data_files, f"{text} --lr 1e-2 --wandb offline --wandb-tags night,{mode}")
        launch_ranks.train(argv, out=tmp_path / mode, env={"WANDB_MODE": "offline", "WANDB_LOG_MODEL": "end"})
    card, again = (run_compare("--log-card", "gpt2-full-vs-lora") for _ in range(2))
    assert "logged offline, send it with `wandb sync" in card.stdout, card.stderr
    assert "already logged" in again.stdout
    folders = {mode: next((tmp_path / mode / "wandb").glob("offline-run-*")) for mode in ("full", "lora")}
    (run_dir,) = tmp_path.glob("cache/card/*/wandb/offline-run-*")
    synced = run_python(tmp_path, "-m", "wandb", "sync", *folders.values(), run_dir, server=server)
    assert "ERROR" not in synced.stdout + synced.stderr
    runs, problems = load_runs([str(tmp_path / "full"), str(folders["lora"])])
    assert [(run.mode, run.state) for run in runs] == [("full", "finished"), ("lora", "finished")]
    assert problems == []
    for run in runs:
        there = server.runs[run.run_id]
        losses = {row["_step"]: row["eval/loss"] for row in there.history if "eval/loss" in row}
        assert losses == pytest.approx(dict(zip(run.evals["step"], run.evals["loss"], strict=True)))
        assert all(set(AXES) <= set(row) for row in there.history)
        assert {there.metric_definitions()[name]["axis"] for name in ("eval/*", "train/*")} == {"train/global_step"}
        assert there.config_values()["mode"] == run.mode
        assert {"night", run.mode} <= set(there.fields["tags"])
        log = there.files["output.log"].decode()
        assert log.count("  validation loss ") == len(run.evals["step"]), "what was printed"
    models = [artifact["content"] for artifact in server.artifacts.values() if artifact["artifactTypeName"] == "model"]
    names = {"adapter_model.safetensors", "model.safetensors"}
    assert sorted(name for model in models for name in names & set(model)) == sorted(names)
    assert {run.project for run in server.runs.values()} == {"gpt2-full-vs-lora"}
    check_reference_run(server)
    target = f"{ENTITY}/gpt2-full-vs-lora"
    for _ in range(2):
        process = run_compare("full", folders["lora"], "--card", "--wandb-report", target, server=server)
        assert process.returncode == 0, process.stderr
    assert re.search(r"LoRA .* full ", process.stdout)
    assert re.search(r" not comparable with the card: other data .*other tokenizer", process.stdout)
    assert server.operations.count("upsertView") == 2
    (view,) = server.views.values()
    assert f"W&B Report: {server.url}/{target}/reports/" in process.stdout
    assert (view["displayName"], view["type"]) == ("Full against LoRA, train", "runs")
    (grid,) = (block for block in view["spec"]["blocks"] if block["type"] == "panel-grid")
    assert set(grid["metadata"]["customRunColors"]) >= {run.run_id for run in runs} | {REFERENCE_RUN_ID}


# --- the card ---


def check_reference_run(server: FakeWandb) -> None:
    run = server.runs[REFERENCE_RUN_ID]
    rows = [(row["train/global_step"], row["train/epoch"], row["eval/loss"]) for row in run.history]
    assert rows == [(6_621, 1, 1.2262), (13_242, 2, 1.0048), (19_863, 3, 0.9414)]
    assert run.fields["jobType"] == "reference"
    assert run.metric_definitions()["eval/*"]["axis"] == "train/global_step"
    assert run.config_values()["mode"] == "reference"
    assert run.config_values()["unknown"] == list(reference.UNKNOWN_DATA)


def test_the_reference_run_is_logged_to_wandb_once(server: FakeWandb, run_compare: Any, tmp_path: Path) -> None:
    caches = ("cache", "elsewhere")  # from there it is found on the server
    first, again = (
        run_compare("--log-card", f"{ENTITY}/p", server=server, TRAINER_CACHE=str(tmp_path / cache)) for cache in caches
    )
    assert [process.returncode for process in (first, again)] == [0, 0], first.stderr
    assert "the card is logged in" in first.stdout
    assert "already logged" in again.stdout
    check_reference_run(server)
