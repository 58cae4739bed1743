"""The run on Weights & Biases: what is sent, under which names, and that no trouble there stops training. The client is
the real one in real processes, offline or against the stand-in on loopback (`fake_wandb.py`)."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_runs import make_metadata, make_records, write_run_folder
from helpers.fake_wandb import API_KEY, FakeWandb, child_env
from transformers.integrations.integration_utils import rewrite_logs

from trainer.config.errors import UserError
from trainer.config.reference import CURVE
from trainer.config.settings import OutputSettings
from trainer.tracking.records import EpochRecord, EvalRecord, EventRecord, OtherEvalRecord, Record, StepRecord
from trainer.tracking.wandb_keys import AXES, reference_row, wandb_row
from trainer.tracking.wandb_logger import check_loggers, upload_run, wandb_block, wandb_mode

METADATA = make_metadata("lora")
RECORDS = make_records(METADATA)  # 90 steps in 3 epochs, 4 evaluations, 3 means, the end
LAST_STEP = 90


def test_every_wandb_row_has_the_three_axes_and_the_reference_run_the_same_keys() -> None:
    for record in RECORDS[:-1]:
        row = wandb_row(record)
        assert isinstance(record, StepRecord | EvalRecord | EpochRecord)
        assert [row[axis] for axis in AXES] == [record.step, record.epoch, record.samples, record.tokens]
        assert len(row) > 4
    assert wandb_row(RECORDS[-1]) == {}
    logs = dict.fromkeys(("loss", "grad_norm", "learning_rate", "epoch", "global_step", "eval_loss"))
    assert set(rewrite_logs(logs)) <= {name for record in RECORDS for name in wandb_row(record)}, "the Trainer's names"
    assert set(reference_row(CURVE[0])) <= {name for record in RECORDS for name in wandb_row(record)}
    other = OtherEvalRecord(**{k: x for k, x in vars(RECORDS[0]).items() if k != "row_nll"}, val_set="other")
    assert {"eval_other/loss", "eval_other/perplexity"} <= set(wandb_row(other))
    assert reference_row(CURVE[2])["eval/loss"] == 0.9414  # the card's training table


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of a user who is logged in nowhere, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    return os.environ  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("flag", "variables", "mode"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": API_KEY}, "online"),
        (None, {"WANDB_API_KEY": API_KEY, "WANDB_MODE": "dryrun"}, "offline"),
        (None, {"WANDB_MODE": "online"}, "offline"),  # nobody is logged in: wandb would ask for a key
        (None, {"WANDB_DISABLED": "true", "WANDB_API_KEY": API_KEY}, "disabled"),
        ("offline", {"WANDB_DISABLED": "true"}, "offline"),
        ("online", {"WANDB_API_KEY": API_KEY, "WANDB_MODE": "offline"}, "online"),
    ],
)
def test_the_wandb_mode_is_the_flag_then_the_variable_then_the_login(flag, variables, mode, environ) -> None:
    environ |= variables
    assert wandb_mode(flag) == mode


def test_a_wandb_login_is_found_in_netrc_for_the_server_in_use(tmp_path: Path, environ) -> None:
    with pytest.raises(UserError, match="--wandb online: not logged in; run `wandb login`"):
        wandb_mode("online")
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {API_KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode(None) == "online"
    environ["WANDB_BASE_URL"] = "https://wandb.example.org"
    (tmp_path / "other").write_text("machine wandb.example.org login user password " + API_KEY)
    (tmp_path / "other").chmod(0o600)
    environ["NETRC"] = str(tmp_path / "other")
    assert wandb_mode(None) == "online"
    for broken in (b"machine\nmachine machine", b"machine \xe9"):  # nobody is logged in
        (tmp_path / "other").write_bytes(broken)
        assert wandb_mode(None) == "offline"
    del environ["NETRC"], environ["WANDB_BASE_URL"]
    (tmp_path / ".config" / "wandb").mkdir(parents=True)
    (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert wandb_mode(None) == "offline", "`wandb offline` was called"


@pytest.mark.parametrize(
    ("flag", "variables", "expected"),
    [
        (None, {}, {"project": "gpt2-full-vs-lora", "group": "full-vs-lora-acled-2024"}),
        (None, {"WANDB_PROJECT": "theirs", "WANDB_RUN_ID": "night-7"}, {"project": "theirs", "id": "night-7"}),
        ("ours", {"WANDB_PROJECT": "theirs", "WANDB_RUN_GROUP": "theirs"}, {"project": "ours", "group": "ours"}),
    ],
)
def test_the_wandb_run_is_named_by_flags_then_variables_then_by_us(flag, variables, expected, environ) -> None:
    environ |= variables
    block = wandb_block(OutputSettings(wandb_project=flag, wandb_group=flag), "exports/acled 2024.csv")
    assert {name: block[name] for name in expected} == expected
    environ |= {"WANDB_RUN_ID": "a/b", "WANDB_LOG_MODEL": "checkpoint"}
    with pytest.raises(UserError, match="WANDB_RUN_ID a/b: expected "):
        wandb_block(OutputSettings(), "events.csv")
    with pytest.raises(UserError, match="WANDB_LOG_MODEL checkpoint: expected end "):
        check_loggers(OutputSettings())


def test_an_upload_without_a_login_or_a_run_is_one_line(tmp_path: Path, environ) -> None:
    with pytest.raises(UserError, match=r"no run\.json there"):
        upload_run(tmp_path / "none")
    folder = write_run_folder(tmp_path / "run", METADATA, RECORDS)
    with pytest.raises(UserError, match=r"--upload .*run: not logged in to W&B"):
        upload_run(folder)


# the real client

CHILD_CODE = """
import logging, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from helpers.fake_runs import make_metadata, make_records
from trainer.tracking import wandb_logger

wandb_logger.INIT_TIMEOUT_SECONDS = wandb_logger.FINISH_TIMEOUT_SECONDS = 3

def forbid(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "localhost", "::1"):
        print("CONNECT", args[1], flush=True)
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "localhost", "::1"):
        print("LOOKUP", args[0], flush=True)
sys.addaudithook(forbid)

logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("trainer").setLevel(logging.INFO)
mode, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = make_metadata("lora", wandb__mode=mode)
records = make_records(run)
previous = [record for record in records if record.step <= first] if first else None
start = lambda: wandb_logger.start_wandb(run, Path("run"), previous_records=previous)
sink = wandb_logger.OptionalLogger("W&B", start, Path("run"))
for record in records:
    if first <= record.step <= last and not (first and record.step == first):
        sink.log(record)
"""
CLOSE_CODE = "sink.close(0)\n"
KILL_SERVICE_CODE = "import psutil; [process.kill() for process in psutil.Process().children(recursive=True)]\n"
KILL_CODE = "os.kill(os.getpid(), signal.SIGKILL)\n"


def start_child(folder: Path, *arguments: object, code: str, **variables: str) -> "subprocess.Popen[str]":
    """A process in which `code` runs with these arguments, folder/run being there."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, env=child_env(HOME=str(folder), **variables), text=True, **pipes)


def run_child(
    folder: Path,
    mode: str,
    *,
    first_step: int = 0,
    last_step: int = LAST_STEP,
    code: str = CLOSE_CODE,
    **variables: str,
) -> tuple[int, str]:
    """(exit code, output) of a process that logs the rows of these steps of a lora run into folder/run, and has said
    nothing on stderr."""
    process = start_child(folder, mode, first_step, last_step, code=CHILD_CODE + code, **variables)
    output, errors = process.communicate(timeout=60)
    assert errors == ""
    return process.returncode, output


def run_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/wandb/offline-run-*/run-*.wandb"))


def sync_offline_runs(server: FakeWandb, folder: Path) -> str:
    """Send every offline run of `folder` to the stand-in; the client's output."""
    command = [sys.executable, "-m", "wandb", "sync", *(str(file.parent) for file in run_files(folder))]
    process = subprocess.run(
        command, cwd=folder, env=child_env(**server.env(folder)), capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert "ERROR" not in process.stderr, process.stderr  # the exit code alone says nothing
    return process.stdout + process.stderr


def assert_history(history: list[dict[str, Any]], records: list[Record]) -> None:
    """Each row of the history has the numbers of the records of its step, to the last bit, in order."""
    expected: dict[int, dict[str, float]] = {}
    for record in records:
        if not isinstance(record, EventRecord):
            expected.setdefault(record.step, {}).update(wandb_row(record))
    assert [row["_step"] for row in history] == list(expected)
    for row in history:
        assert {name: value for name, value in row.items() if not name.startswith("_")} == expected[row["_step"]]


def test_an_offline_run_opens_no_connection_and_sync_sends_every_row_axes_and_config(tmp_path: Path) -> None:
    """Neither Python connects (an audit hook in the process prints each attempt) nor wandb-core (its proxy heard
    nothing)."""
    folder = tmp_path / "offline"
    with FakeWandb() as listener:
        proxies = {name: listener.url for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
        exit_code, output = run_child(folder, "offline", **proxies)
    assert (exit_code, listener.connections) == (0, 0)
    (file,) = run_files(folder)
    assert output == f"W&B: offline, send it later with `wandb sync {file.parent.relative_to(folder)}`\n"
    assert [path.name for path in folder.iterdir()] == ["run"]
    assert [path.name for path in (folder / "run").iterdir()] == ["wandb"]
    with FakeWandb() as server:
        sync_offline_runs(server, folder)
    run = server.runs[METADATA["run_id"]]
    assert_history(run.history, RECORDS)
    names = [run.fields[name] for name in ("displayName", "jobType", "groupName", "tags")]
    assert names == [METADATA["name"], "train", "full-vs-lora-acled-demo", ["lora", "demo-base", "acled-demo"]]
    assert {run.metric_definitions()[name]["axis"] for name in ("eval/*", "train/*")} == {"train/global_step"}
    assert run.summary["eval/loss"]["min"] == min(r.loss for r in RECORDS if isinstance(r, EvalRecord))
    assert (run.summary["wall_seconds"], run.summary["best/step"]) == (100, LAST_STEP)
    assert (run.config_values()["mode"], run.config_values()["trainable_parameters"]) == ("lora", 19_000)
    assert (run.project, run.exit_code, server.unknown_requests) == ("gpt2-full-vs-lora", 0, [])


EXTRAS_CODE = """
from trainer.tracking.records import EventRecord
run["data"]["source"] = "a" * 65 + ".csv"  # W&B takes no tag that is longer than 64
text = {"prompt": "p", "reference": "r", "base": "b", "completion": "c"}
for record in list(records):
    if record.kind == "eval":
        axes = {"epoch": record.epoch, "samples": record.samples, "tokens": record.tokens}
        facts = {**axes, "texts": [text]}
        records.append(EventRecord(event="samples", step=record.step, message="", time=0.0, facts=facts))
        facts = {"code": "diverging", "topic": "diverging"}
        records.append(EventRecord(event="diagnosis", step=record.step, message="up", time=0.0, facts=facts))
records.sort(key=lambda record: record.step)
"""


@pytest.mark.parametrize("unanswered", [(), ("ArtifactType", "CreateArtifact", "NotifyScriptableRunAlert")])
def test_an_online_run_sends_all_but_secrets_and_a_table_or_an_alert_that_fails_costs_itself_only(
    unanswered: tuple[str, ...], tmp_path: Path
) -> None:
    hub_token, git_token = "hf_" + "Tq9" * 12, "ghs_" + "aB3" * 12
    remote = ["git", "remote", "add", "origin", f"https://{git_token}:x-oauth-basic@example.org/a/b.git"]
    author = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    for command in (["git", "init", "-q"], ["git", *author, "commit", "-qm", "x", "--allow-empty"], remote):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    code = CHILD_CODE.replace("previous = ", EXTRAS_CODE + "previous = ") + CLOSE_CODE
    with FakeWandb(unanswered) as server:
        variables = {"HF_TOKEN": hub_token, **server.env(tmp_path)}
        process = start_child(tmp_path, "online", 0, LAST_STEP, code=code, **variables)
        output, errors = process.communicate(timeout=60)
    run = server.runs[METADATA["run_id"]]
    assert (process.returncode, run.exit_code, errors) == (0, 0, "")
    assert output.startswith(f"W&B: {server.url}/{run.entity}/{run.project}/runs/{run.name}\n")
    assert run.fields["tags"] == ["lora", "demo-base", "a" * 64]
    rows = [{name: x for name, x in row.items() if not name.startswith("sample/")} for row in run.history]
    assert_history(rows, RECORDS)
    contents = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in (API_KEY, hub_token, git_token):
        assert not any(secret.encode() in content for content in [repr(run).encode(), *contents])
    if unanswered:
        assert output.count("failed (") == output.count("W&B: the table of samples failed (") == 1
    else:
        assert "failed" not in output
        assert server.alerts == [f"WARN diverging (step {step}): up" for step in (0, 30, 60, 90)]
        assert len([name for name in run.files if name.startswith("media/table/sample/texts")]) == 4
        assert server.unknown_requests == []


def upload(folder: Path, server: FakeWandb) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "launch/doctor.py", "--upload", str(folder)]
    return subprocess.run(command, env=child_env(**server.env(folder.parent)), capture_output=True, text=True)


def test_a_run_that_lost_wandb_is_shown_as_failed_and_completed_later_by_whole_rows(tmp_path) -> None:
    """W&B is lost at step 20, the run stopped by a signal after step 30, before the evaluation there; its rows are
    uploaded, then it is resumed."""
    failing = """
row = wandb_logger.wandb_row
def fail_once(record):
    if record.step == 20:
        raise RuntimeError("gone")
    return row(record)
wandb_logger.wandb_row = fail_once
for record in records"""
    metadata = make_metadata("lora", wandb__mode="online")
    stopped = [record for record in RECORDS if record.step < 30 or (record.step == 30 and record.kind == "step")]
    write_run_folder(tmp_path / "stopped", metadata, stopped)
    write_run_folder(tmp_path / "finished", metadata, RECORDS)
    with FakeWandb() as server:
        code = CHILD_CODE.replace("\nfor record in records", failing)
        process = start_child(tmp_path, "online", 0, LAST_STEP, code=code + CLOSE_CODE, **server.env(tmp_path))
        output, errors = process.communicate(timeout=60)
        run = server.runs[METADATA["run_id"]]
        assert (process.returncode, errors, output.count("W&B failed (gone)")) == (0, "", 1)
        assert ([row["_step"] for row in run.history], run.exit_code) == (list(range(20)), 1)
        address = f"{server.url}/{run.entity}/{run.project}/runs/{run.name}"
        sent, rows = upload(tmp_path / "stopped", server), "but that of step 30, which a resume sends, are on W&B"
        assert (sent.stdout, sent.stderr) == (f"all rows of {tmp_path}/stopped {rows}: {address}\n", "")
        assert ([row["_step"] for row in run.history], run.exit_code) == (list(range(30)), 1)
        code = "print(sink._logger._last_logged_step)\n" + CLOSE_CODE
        assert run_child(tmp_path, "online", first_step=30, code=code, **server.env(tmp_path))[1].endswith("\n29\n")
        assert_history(run.history, RECORDS)
        sent = upload(tmp_path / "finished", server)
        assert (sent.stdout, sent.stderr) == (f"all rows of {tmp_path}/finished are on W&B: {address}\n", "")
    assert_history(run.history, RECORDS)
    assert (run.exit_code, server.unknown_requests) == (0, [])


def test_rows_that_the_server_refuses_are_said_once_and_an_upload_does_not_claim_them(tmp_path) -> None:
    write_run_folder(tmp_path / "uploaded", make_metadata("lora", wandb__mode="online"), RECORDS)
    with FakeWandb(row_status=403) as server:
        exit_code, output = run_child(tmp_path, "online", **server.env(tmp_path))
        sent = upload(tmp_path / "uploaded", server)
    assert (exit_code, output.count("W&B failed (its server refused the rows); going on without it")) == (0, 1)
    assert (sent.returncode, sent.stdout, sent.stderr.count("\n")) == (1, "", 1)
    assert "the rows are not all on W&B (its server refused the rows); try again later" in sent.stderr


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_wandb_server_that_never_answers_costs_a_line_and_little_time(tmp_path: Path, silent_port: int) -> None:
    began = time.monotonic()
    url = f"http://127.0.0.1:{silent_port}"
    exit_code, output = run_child(tmp_path, "online", WANDB_BASE_URL=url, WANDB_API_KEY=API_KEY)
    assert time.monotonic() - began < 45
    assert (exit_code, output.count("\n"), output.count("W&B failed (")) == (0, 1, 1)
    assert "metrics.jsonl has every row; send them later with `python launch/doctor.py --upload run`" in output


@pytest.mark.slow
def test_a_wandb_server_that_dies_within_the_run_costs_no_record_and_little_time(tmp_path: Path) -> None:
    with FakeWandb() as server:
        code = CHILD_CODE.replace(
            "\nfor record in records", "\nprint('STARTED', flush=True); sys.stdin.readline()\nfor record in records"
        )
        process = start_child(tmp_path, "online", 0, LAST_STEP, code=code + CLOSE_CODE, **server.env(tmp_path))
        assert process.stdout is not None
        while "STARTED" not in process.stdout.readline():
            assert process.poll() is None
    out, err = process.communicate("go\n", timeout=60)  # the server is gone now
    assert (process.returncode, err) == (0, "")
    assert out.count("W&B failed (") == 1


@pytest.mark.slow
def test_a_killed_wandb_run_loses_a_second_its_resume_repeats_no_step_and_wandbs_variables_reach_the_client(tmp_path):
    """Killed at step 50, its service first, as DeepSpeed's launcher does when another rank has failed. Resumed from a
    checkpoint of step 30: the rows 31 to 49 lie in the first file already."""
    (tmp_path / "elsewhere").mkdir()
    variables = {"ENTITY": "team", "NAME": "mine", "NOTES": "a note", "TAGS": "night, second", "JOB_TYPE": "sweep"}
    variables |= {"DIR": str(tmp_path / "elsewhere"), "RUN_ID": "other", "CONSOLE": "wrap", "SAVE_CODE": "true"}
    environ = {f"WANDB_{name}": value for name, value in variables.items()}
    code = "time.sleep(2)\n" + KILL_SERVICE_CODE + KILL_CODE
    assert run_child(tmp_path, "offline", last_step=50, code=code, **environ)[0] == -signal.SIGKILL
    time.sleep(1.1)  # run folders are named by the second
    exit_code, output = run_child(tmp_path, "offline", first_step=30, **environ)
    assert exit_code == 0
    assert "W&B: WANDB_RUN_ID other is ignored: --resume continues " in output
    assert [file.parts[-4] for file in run_files(tmp_path)] == ["elsewhere", "elsewhere"]
    with FakeWandb() as server:
        sync_offline_runs(server, tmp_path)
    run = server.runs[METADATA["run_id"]]
    assert_history(run.history, RECORDS)
    names = [run.entity, *(run.fields[name] for name in ("displayName", "notes", "jobType"))]
    assert names == ["team", "mine", "a note", "sweep"]
    assert run.fields["tags"] == ["lora", "demo-base", "acled-demo", "night", "second"]
    assert "output.log" in run.files, "WANDB_CONSOLE brings the console back"
