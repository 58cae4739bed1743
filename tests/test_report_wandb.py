"""The comparison and Weights & Biases: runs read back, the Report and the card, by the real client in processes."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
from conftest import TEMPLATES
from fake_wandb import ENTITY, FakeWandb, child_env
from run_folders import facts, make, rows, write

from trainer.config import reference
from trainer.report import comparability
from trainer.report.comparison import compare
from trainer.report.load import gather
from trainer.report.run_data import Run, Unreadable, read_folder
from trainer.report.wandb_reference import CARD_ID
from trainer.report.wandb_runs import is_wandb_path, nested, read_offline, run_facts

SCRIPT = Path(__file__).parents[1] / "launch" / "compare.py"
#: writes the rows of a run as a training process does; arguments: run.json's content, folder, last step or 0, mode
TRAIN = """
import json, os, sys
from pathlib import Path
from run_folders import rows
from trainer.log import start_wandb
run, folder, last, mode = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
run["wandb"]["mode"] = mode
sink = start_wandb(run, folder)
for record in rows(run):
    if not last or record.step <= last:
        sink.write(record)
if last:
    import time
    time.sleep(2.5)  # rows are on disk a second later
    os._exit(9)
sink.close(0)
"""


def train(folder: Path, content: dict[str, Any], last: int = 0, mode: str = "offline", **variables: str) -> Path:
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", TRAIN, json.dumps(content), str(folder), str(last), mode]
    done = subprocess.run(
        command, env=child_env(HOME=str(folder), **variables), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == (9 if last else 0), done.stderr
    return folder


def same_rows(a: Run, b: Run) -> None:
    for kind, names in (
        ("steps", ("step", "epoch", "samples", "tokens", "loss", "lr", "grad_norm")),
        ("evals", ("step", "epoch", "loss", "perplexity")),
        ("epochs", ("step", "epoch", "train_loss")),
    ):
        for name in names:
            np.testing.assert_array_equal(getattr(a, kind)[name], getattr(b, kind)[name], err_msg=f"{kind} {name}")


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run as an offline W&B folder, moved away from its run folder."""
    folder = train(tmp_path_factory.mktemp("offline") / "run", facts("lora"))
    moved = tmp_path_factory.mktemp("elsewhere") / "copied"
    next(folder.glob("wandb/offline-run-*")).rename(moved)
    return moved


def test_an_offline_folder_reads_as_the_run_folder_does(offline: Path, tmp_path: Path) -> None:
    content = facts("lora")
    ours = read_folder(write(tmp_path / "ours", content, rows(content)))
    (theirs,), problems = gather([str(offline)])
    assert problems == []
    same_rows(ours, theirs)
    assert (theirs.run_id, theirs.name, theirs.mode, theirs.state) == (ours.run_id, ours.name, ours.mode, "finished")
    assert theirs.end == ours.end
    assert comparability.why_not(ours, theirs) == []
    for path in (
        "model.trainable",
        "model.share",
        "resolved.ds_config",
        "resolved.ranks",
        "settings.train.seed",
        "settings.train.lr",
        "settings.lora.rank",
        "data.source",
        "data.train.examples",
        "hardware",
        "versions",
        "resolved.steps_per_epoch",
    ):
        assert theirs.fact(path) == ours.fact(path), path
    assert comparability.why_not_card(theirs) == comparability.why_not_card(ours)


def test_our_reader_sees_the_rows_that_wandbs_own_tool_sees(offline: Path) -> None:
    import wandb

    file = next(offline.glob("*.wandb"))
    core = Path(wandb.__file__).parent / "bin" / "wandb-core"
    command = [str(core), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file), str(offline)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    items = [json.loads(line)["history"]["item"] for line in lines if '"history"' in line]
    theirs = {item["_step"]: item["val/loss"] for item in items if "val/loss" in item}
    run = read_offline("x", [file])
    assert dict(zip(run.evals["step"].tolist(), run.evals["loss"].tolist(), strict=True)) == theirs
    assert len(run.steps["step"]) == sum("train/loss" in item for item in items) == 90


def test_a_killed_offline_run_gives_what_it_left(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", facts("full"), last=40)
    (run,), problems = gather([str(folder / "wandb")])
    assert run.evals["step"].tolist() == [0, 30]
    assert run.steps["step"][-1] == 40 or run.steps["step"][-1] == 39  # the last row may still be open
    assert "still going" in problems[0].text


def test_a_torn_or_foreign_file_is_said(offline: Path, tmp_path: Path) -> None:
    whole = next(offline.glob("*.wandb")).read_bytes()
    torn = tmp_path / "run-lora0042.wandb"
    torn.write_bytes(whole[: len(whole) * 2 // 3])
    run = read_offline("x", [torn])
    assert "cut off" in run.notes[0]
    assert 0 < len(run.steps["step"]) < 90
    torn.write_bytes(b"something else")
    with pytest.raises(Unreadable, match="is not a W&B run file"):
        read_offline("x", [torn])
    torn.write_bytes(whole[:7])
    with pytest.raises(Unreadable, match="holds no run"):
        read_offline("x", [torn])
    with pytest.raises(Unreadable, match="holds 2 W&B runs"):
        read_offline("x", [tmp_path / "run-a.wandb", tmp_path / "run-b.wandb"])


def test_run_json_comes_back_whole_from_the_config() -> None:
    from trainer.tracking.wandb_keys import wandb_config

    content = json.loads(json.dumps(facts("lora")))
    config = json.loads(json.dumps(wandb_config(content)))
    assert run_facts(config) == content
    assert config["lr"] == content["resolved"]["lr"], "and flat, for W&B's columns"
    with pytest.raises(Unreadable, match="another program"):
        run_facts({"lr": 1e-3})
    with pytest.raises(Unreadable, match="the card itself"):
        run_facts({"mode": "card"})


def test_paths_and_nesting() -> None:
    assert is_wandb_path("entity/project/abcd1234")
    assert not any(map(is_wandb_path, ("runs/full", "a/b/c/d", "/abs/a/b", "./a/b", "../a/b")))
    assert nested({"best/loss": 1, "best/step": 2, "wall": 3}, "/") == {"best": {"loss": 1, "step": 2}, "wall": 3}


# the server, on loopback


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with FakeWandb() as fake:
        yield fake
    assert not fake.unknown


def compare_py(
    folder: Path, server: FakeWandb | None, *arguments: object, **variables: str
) -> "subprocess.CompletedProcess[str]":
    own = {"HOME": str(folder), "TRAINER_CACHE": str(folder / "cache"), "MPLCONFIGDIR": str(folder / "mpl")}
    env = child_env(**{**own, **(server.env(folder) if server else {}), **variables})
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_a_run_on_the_server_reads_as_its_run_folder_does(server: FakeWandb, tmp_path: Path) -> None:
    content = facts("lora")
    train(tmp_path / "run", content, mode="online", **server.env(tmp_path))
    code = (
        "import json, sys; from trainer.report.load import gather; (run,), problems = gather([sys.argv[1]]);"
        "print(json.dumps([run.run_id, run.state, run.mode, run.evals['loss'].tolist(), run.steps['loss'].tolist(),"
        "problems, dict(run.facts), dict(run.end)]))"
    )
    path = f"{ENTITY}/{content['wandb']['project']}/{content['run_id']}"
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        env=child_env(HOME=str(tmp_path), **server.env(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run_id, state, mode, evals, steps, problems, got, end = json.loads(done.stdout)
    ours = read_folder(write(tmp_path / "ours", content, rows(content)))
    assert (run_id, state, mode, problems) == (ours.run_id, "finished", "lora", [])
    assert (evals, steps) == (ours.evals["loss"].tolist(), ours.steps["loss"].tolist())
    assert got["data"]["fingerprint"] == content["data"]["fingerprint"]
    assert end["wall_seconds"] == 100.0


def test_a_run_that_the_server_does_not_have_is_one_line(server: FakeWandb, tmp_path: Path) -> None:
    done = compare_py(tmp_path, server, f"{ENTITY}/p/gone0000")
    assert done.returncode == 2
    assert "W&B does not give it: Could not find run" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_login_nothing_is_asked(tmp_path: Path) -> None:
    done = compare_py(tmp_path, None, "entity/project/abcd1234")
    assert done.returncode == 2
    assert "to read it from W&B, run `wandb login` or set WANDB_API_KEY first" in done.stderr


SAVE = """
import sys
from pathlib import Path
from trainer.report.comparison import compare
from trainer.report.gather import gather
from trainer.report.wandb_report import save
found = compare(*gather(["full", "lora"]))
for folder in ("comparison", "comparison", "elsewhere"):  # the second is found by its note, the third by its title
    Path(folder).mkdir(exist_ok=True)
    print(save(found, sys.argv[1], "p", Path(folder)))
"""


def test_the_report_is_saved_once_and_updated_after(server: FakeWandb, tmp_path: Path) -> None:
    make(tmp_path / "full")
    make(tmp_path / "lora", "lora")
    env = child_env(HOME=str(tmp_path), **server.env(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", SAVE, ENTITY], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    (address,) = set(done.stdout.splitlines())
    assert address.startswith(f"{server.url}/{ENTITY}/p/reports/")
    assert server.operations.count("upsertView") == 3
    (view,) = server.views.values()
    assert (view["displayName"], view["type"], view["projectName"]) == ("Full against LoRA, acled-demo", "runs", "p")
    check_spec(view["spec"])


def test_real_runs_are_compared_sent_and_reported(
    server: FakeWandb, tiny: str, records: tuple[str, str], tmp_path: Path
) -> None:
    """Both modes trained for real and offline, compared from folder and W&B file, sent with the card, and reported."""
    for mode in ("full", "lora"):
        words = f"--mode {mode} --model {tiny} --data {records[0]} --val-data {records[1]} --objective completion"
        words += " --block-size 32 --global-batch 4 --epochs 2 --save-every never --lr 1e-2 --wandb offline"
        ranks.train([*words.split(), *TEMPLATES], out=tmp_path / mode, env={"WANDB_MODE": "offline"})
    card = compare_py(tmp_path, None, "--log-card", "gpt2-full-vs-lora")
    assert card.returncode == 0, card.stderr
    folders = {mode: next((tmp_path / mode / "wandb").glob("offline-run-*")) for mode in ("full", "lora")}
    (sent,) = tmp_path.glob("cache/card/*/wandb/offline-run-*")
    sync = [sys.executable, "-m", "wandb", "sync", *map(str, folders.values()), str(sent)]
    env = child_env(HOME=str(tmp_path), **server.env(tmp_path))
    synced = subprocess.run(sync, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "ERROR" not in synced.stdout + synced.stderr
    runs, problems = gather([str(tmp_path / "full"), str(folders["lora"])])
    assert [(run.mode, run.state) for run in runs] == [("full", "finished"), ("lora", "finished")]
    assert problems == []
    for run in runs:
        there = server.runs[run.run_id]
        losses = {row["_step"]: row["val/loss"] for row in there.history if "val/loss" in row}
        assert losses == pytest.approx(dict(zip(run.evals["step"], run.evals["loss"], strict=True)))
        assert all({"epoch", "samples", "tokens"} <= set(row) for row in there.history)
        assert there.metrics()["train/*"]["axis"] == there.metrics()["val/*"]["axis"] == "epoch"
        assert there.values()["mode"] == run.mode
    assert {run.project for run in server.runs.values()} == {"gpt2-full-vs-lora"}
    check_card(server)
    done = compare_py(tmp_path, server, "full", folders["lora"], "--wandb-report", f"{ENTITY}/gpt2-full-vs-lora")
    assert done.returncode == 0, done.stderr
    assert re.search(r"LoRA .*full.*comparable with the card: other data, other tokenizer", done.stdout)
    (view,) = server.views.values()
    (grid,) = (block for block in view["spec"]["blocks"] if block["type"] == "panel-grid")
    assert set(grid["metadata"]["customRunColors"]) >= {run.run_id for run in runs} | {CARD_ID}


def test_the_spec_is_written_without_any_network(server: FakeWandb, tmp_path: Path) -> None:
    make(tmp_path / "full")
    make(tmp_path / "lora", "lora")
    done = compare_py(tmp_path, server, "full", "lora", "--wandb-report-json", "specs/report.json")
    assert done.returncode == 0, done.stderr
    assert server.operations == []
    assert server.connections == 0
    check_spec(json.loads((tmp_path / "specs" / "report.json").read_text()))


def check_spec(spec: dict[str, Any]) -> None:
    """Verdict, tables and panels, the run set by config.mode, the card dashed and grey."""
    text = "\n".join(block["content"] for block in spec["blocks"] if block["type"] == "markdown-block")
    assert "LoRA reached 95.0% of full's improvement" in text
    assert "| 1 | card | 6,621 |" in text
    assert "unknown of the card" in text.lower()
    (grid,) = (block for block in spec["blocks"] if block["type"] == "panel-grid")
    (runs,) = grid["metadata"]["runSets"]
    (mode,) = (one for one in runs["filters"]["filters"] if one["key"] == {"section": "config", "name": "mode"})
    assert (mode["op"], mode["value"]) == ("IN", ["full", "lora", "card"])
    panels = grid["metadata"]["panelBankSectionConfig"]["panels"]
    lines = {
        (panel["config"]["xAxis"], *panel["config"]["metrics"])
        for panel in panels
        if panel["viewType"] == "Run History Line Plot"
    }
    assert lines == {
        ("epoch", "val/loss"),
        ("epoch", "train/loss"),
        ("epoch", "train/loss_epoch"),
        ("tokens", "train/loss"),
        ("_runtime", "val/loss"),
        ("epoch", "train/lr"),
        ("epoch", "train/grad_norm"),
        ("epoch", "train/tokens_per_second"),
    }
    kinds = [panel["viewType"] for panel in panels]
    assert kinds.count("Bar Chart") == 2
    assert kinds.count("Scatter Plot") == 1
    assert kinds.count("Run Comparer") == 1
    first = next(panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot")
    assert first["overrideMarks"] == {"lora0042:val/loss": "dashed", f"{CARD_ID}:val/loss": "dashed"}
    assert first["overrideColors"][f"{CARD_ID}:val/loss"]["color"] == "#767676"
    places = [(panel["layout"]["x"], panel["layout"]["y"]) for panel in panels]
    assert len(set(places)) == len(places), "panels on top of one another"


def test_a_server_that_is_gone_is_one_line(tmp_path: Path) -> None:
    with FakeWandb() as fake:
        env = fake.env(tmp_path)  # and then it is closed
    make(tmp_path / "full")
    done = compare_py(tmp_path, None, "full", "--wandb-report", f"{ENTITY}/p", WANDB_HTTP_TIMEOUT="3", **env)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --wandb-report {ENTITY}/p: W&B did not take it (")
    assert "Traceback" not in done.stderr


def test_the_card_is_logged_once_online(server: FakeWandb, tmp_path: Path) -> None:
    first, again = (compare_py(tmp_path, server, "--log-card", f"{ENTITY}/p") for _ in range(2))
    (tmp_path / "other").mkdir()
    elsewhere = subprocess.run(
        [sys.executable, str(SCRIPT), "--log-card", f"{ENTITY}/p"],
        cwd=tmp_path / "other",
        env=child_env(HOME=str(tmp_path), TRAINER_CACHE=str(tmp_path / "elsewhere"), **server.env(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [done.returncode for done in (first, again, elsewhere)] == [0, 0, 0], first.stderr
    assert "the card is logged in" in first.stdout
    assert "already logged" in again.stdout
    assert "already logged" in elsewhere.stdout
    check_card(server)


def check_card(server: FakeWandb) -> None:
    run = server.runs[CARD_ID]
    assert [(row["_step"], row["epoch"], row["val/loss"]) for row in run.history] == [
        (6_621, 1, 1.2262),
        (13_242, 2, 1.0048),
        (19_863, 3, 0.9414),
    ]
    assert run.fields["jobType"] == "reference"
    assert run.metrics()["val/*"]["axis"] == "epoch"
    assert run.values()["mode"] == "card"
    assert run.values()["unknown"] == list(reference.UNKNOWN_DATA)


def test_the_card_is_logged_once_offline(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    home = {"TRAINER_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    first, again = (compare_py(tmp_path / place, None, "--log-card", "p", **home) for place in ("", "other"))
    assert [done.returncode for done in (first, again)] == [0, 0], first.stderr
    assert "logged offline, send it with `wandb sync" in first.stdout
    assert "already logged" in again.stdout
    assert len(list((tmp_path / "cache" / "card").glob("p/wandb/offline-run-*"))) == 1


def test_a_comparison_of_runs_from_both_places_is_one_comparison(offline: Path, tmp_path: Path) -> None:
    found = compare(*gather([str(make(tmp_path / "full")), str(offline)]))
    assert found.verdict.sentence.startswith("LoRA reached 95.0% of full's improvement")
