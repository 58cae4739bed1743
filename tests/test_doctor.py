"""The doctor: each check is ok where it should be and speaks, with a remedy, where something is planted."""

import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TEMPLATES

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.config.schema import DS_NAMES
from trainer.data.dataset import Prepared, load, prepare
from trainer.data.token_dataset import Rows
from trainer.distributed.process_group import planned_world
from trainer.model.build import build, load_config
from trainer.tools.doctor import data_checks, doctor_cli, environment_checks, memory_checks, plan_checks, smoke_test
from trainer.tools.doctor.check_result import Check, guarded, size
from trainer.training.run_plan import make_plan


def levels(checks: Any) -> dict[str, str]:
    """{what: level}, the worst of those of one name."""
    found: dict[str, str] = {}
    for one in checks:
        assert one.level == "ok" or one.remedy, f"{one} without a remedy"
        found[one.what] = max(found.get(one.what, "ok"), one.level, key=("ok", "warning", "error").index)
    return found


# --- environment ---


def test_versions_are_held_against_the_installed_ranges():
    import torch

    good = environment_checks.packages((">=3.11", ["torch>=2", "numpy", "pytest>=99; extra == 'test'"]))
    assert levels(good) == {"packages": "ok"}
    bad = list(
        environment_checks.packages((">=3.99", [f"torch<{torch.__version__.split('+')[0]}", "no-such-package>=1"]))
    )
    assert levels(bad) == {"Python": "error", "torch": "error", "no-such-package": "error", "packages": "ok"}
    assert any("pip install 'no-such-package>=1'" in one.remedy for one in bad)
    assert levels(environment_checks.packages(None)) == {"packages": "warning"}
    assert environment_checks._requirements() is not None, "the ranges come from the installed package"


def test_a_port_in_use_is_named_and_a_free_one_offered():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        found = environment_checks.port(taken.getsockname()[1])
    assert found.level == "warning"
    assert "--master_port" in found.remedy


def test_variables_are_named_but_never_shown(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    environ = {"HF_TOKEN": "secret", "NCCL_DEBUG": "INFO", "PYTHONPATH": "x", "WANDB_API_KEY": "secret", "EDITOR": "vi"}
    alone, many = (environment_checks.variables(environ, several) for several in (False, True))
    assert (alone.level, many.level) == ("ok", "warning")
    assert "HF_TOKEN, WANDB_API_KEY" in many.found, "NCCL_ and PYTHON are forwarded, EDITOR changes nothing"
    assert "secret" not in many.found
    (tmp_path / ".deepspeed_env").write_text("HF_TOKEN=secret\nWANDB_API_KEY=secret\n")
    assert environment_checks.variables(environ, True).level == "ok"


def test_builds_leftovers_and_addresses(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert levels(environment_checks.builds()) == {"op builds": "ok"}
    (tmp_path / "py311" / "cpu_adam").mkdir(parents=True)
    (tmp_path / "py311" / "cpu_adam" / "lock").touch()
    assert levels(environment_checks.builds()) == {"op builds": "warning"}
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
    assert levels(environment_checks.builds()) == {"op builds": "warning"}
    assert not list(environment_checks.leftovers(tmp_path))
    (tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0").write_bytes(b"1")
    assert levels(environment_checks.leftovers(tmp_path)) == {"/dev/shm": "warning"}
    assert levels(environment_checks.addresses({"MASTER_ADDR": "no-such-host.invalid"})) == {"MASTER_ADDR": "error"}
    assert levels(environment_checks.addresses({"MASTER_ADDR": "127.0.0.1"})) == {"MASTER_ADDR": "ok"}


def test_threads_are_held_against_the_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert environment_checks.threads(cores).level == "ok"
    assert environment_checks.threads(cores + 1).level == "warning"
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores + 1))
    assert environment_checks.threads(1).remedy == f"OMP_NUM_THREADS={cores}"


# --- data ---


def rows_of(texts: list[list[int]], first: int = 1) -> Rows:
    return Rows(
        ids=np.concatenate([np.asarray(text, dtype=np.uint16) for text in texts]),
        offsets=np.cumsum([0, *map(len, texts)]), first=np.full(len(texts), first, dtype=np.int32),
    )  # fmt: skip


def prepared(train: list[list[int]], val: list[list[int]], first: int = 1, left_out: int = 0) -> Prepared:
    rows = {"train": rows_of(train, first), "val": rows_of(val, first)}
    facts: dict[str, Any] = {
        side: {
            "records": len(rows[side]) + (left_out if side == "train" else 0), "examples": len(rows[side]),
            "tokens": len(rows[side].ids), "counted_tokens": int(rows[side].counted().sum()),
        }
        for side in rows
    }  # fmt: skip
    facts |= {"vocabulary": 3000, "tokenizer": "x", "notices": ["one notice"]}
    return Prepared(**rows, facts=facts, val_texts=(), pad_id=0, folder=Path())


def texts(count: int, stride: int, length: int = 30) -> list[list[int]]:
    """Texts of 600 ids, all of which occur in 600 of them; no two strides make the same text."""
    return [[1 + (n + stride * place) % 600 for place in range(length)] for n in range(count)]


def settings_of(objective: str, block: int = 32) -> Any:
    return cli.read(["--mode", "full", "--objective", objective, "--block-size", str(block)]).settings


@pytest.mark.parametrize("block", [32, 1024])
def test_sound_data_are_ok(block):
    """Whatever room a row has: rows are padded to the longest beside them, not to the block size."""
    found = list(data_checks.check(settings_of("completion", block), prepared(texts(600, 1), texts(200, 2))))
    assert set(levels(found).values()) == {"ok"}, [one for one in found if one.level != "ok"]
    assert any(one.found == "one notice" for one in found)


@pytest.mark.parametrize(
    ("what", "level", "data"),
    [
        ("validation", "warning", prepared(texts(600, 1), texts(5, 2))),
        ("duplicates", "warning", prepared(texts(300, 1), texts(300, 1))),
        ("repeats", "warning", prepared(texts(100, 1) * 2, texts(200, 2))),
        ("masked", "warning", prepared(texts(600, 1), texts(200, 2), first=29)),
        ("masked", "error", prepared(texts(600, 1), texts(200, 2), first=30)),
        ("too long", "warning", prepared(texts(600, 1), texts(200, 2), left_out=30)),
        ("coverage", "warning", prepared(texts(20, 1), [[2000 + n for n in range(30)] for _ in range(200)])),
    ],
)
def test_what_is_planted_in_the_data_is_found(what, level, data):
    assert levels(data_checks.check(settings_of("completion"), data))[what] == level


def test_texts_are_found_again_inside_blocks():
    """Blocks cut texts anywhere; what stands between two ends of text is compared."""
    train, val = texts(40, 1, 29), texts(3, 1, 29) + texts(7, 2, 29)
    flat = {
        side: [token for text in side_texts for token in [*text, 0]] for side, side_texts in (("t", train), ("v", val))
    }
    cut = {side: [ids[at : at + 16] for at in range(0, len(ids) - 15, 16)] for side, ids in flat.items()}
    found = list(data_checks.duplicates(settings_of("blocks"), prepared(cut["t"], cut["v"])))
    assert found[0].found.startswith("3 of 9 "), "the last text is cut off"


# --- plan and memory ---


@pytest.fixture(scope="module")
def visit(tiny: str, records: tuple[str, str]) -> dict[str, Any]:
    words = f"--mode lora --model {tiny} --data {records[0]} --val-data {records[1]} --objective completion"
    words += " --block-size 32 --global-batch 4"
    request = cli.read([*words.split(), *TEMPLATES])
    settings = request.settings
    data = load(prepare(settings.data, model=tiny, global_batch=4).folder)
    model = build(settings, on_meta=True)
    plan = make_plan(settings, planned_world(1), data, model.facts, load_config(settings.model))
    return {"request": request, "plan": plan, "model": model, "data": data}


def test_the_model_is_described(visit):
    found = {one.what: one for one in plan_checks.check_model(visit["plan"], visit["model"])}
    assert found["LoRA targets"].found == "8 layers: c_attn, c_fc, c_proj"
    assert found["Conv1D"].found.startswith("8 of the 8")
    assert found["tied weights"].level == "ok"
    assert "are one" in found["tied weights"].found
    assert f"{visit['model'].facts['trainable']:,}" in found["trainable"].found


def test_the_course_is_judged(visit):
    plan = visit["plan"]
    assert levels(plan_checks.check_course(plan))["steps"] == "ok"
    train = replace(plan.settings.train, warmup_steps=10**6, max_steps=3)
    output = replace(plan.settings.output, eval_every="50")
    late = replace(
        plan, settings=replace(plan.settings, train=train, output=output), course=replace(plan.course, total_steps=3)
    )
    found = levels(plan_checks.check_course(late))
    assert (found["steps"], found["learning rate"], found["--eval-every"]) == ("warning", "warning", "warning")


def test_memory_is_told_for_every_file_and_too_little_of_it_is_an_error(visit, monkeypatch):
    plan = visit["plan"]
    table = memory_checks.rows(plan, 32)
    assert [row.name for row in table] == list(DS_NAMES)
    assert [row.name for row in table if row.chosen] == ["zero0"]
    assert set(levels(memory_checks.check(plan, table)).values()) == {"ok"}
    monkeypatch.setattr(memory_checks, "available", lambda plan: 1000.0)
    small = memory_checks.rows(plan, 32)
    assert not any(row.fits for row in small)
    assert levels(memory_checks.check(plan, small)) == {"memory": "error"}


# --- the rehearsal, with a program that is quickly done in place of train.py ---

FAKE = """
import json, os, sys, time
words = sys.argv[1:]
out = words[words.index("--out") + 1]
again = "--resume" in words
os.makedirs(out, exist_ok=True)
rows = [] if not again else [json.loads(line) for line in open(out + "/metrics.jsonl")][:3]
if not again:
    rows.append({"kind": "eval", "step": 0, "time": 0.5, "loss": 5.0, "eval_tokens": 100})
for step in range(3 if again else 1, 5):
    rows.append({"kind": "step", "step": step, "time": step, "loss": 5.0 - 0.1 * step, "tokens": 10 * step,
                 "tokens_per_second": 5.0})
rows.append({"kind": "eval", "step": 4, "time": 5.0, "loss": 4.5, "eval_tokens": 100})
rows.append({"kind": "event", "event": "finished", "step": 4, "time": 6.0, "message": "",
             "facts": {"checkpoint_bytes": 1000, "export_bytes": 500, "peak_memory_bytes": 7, "export": "checked"}})
FAULT
open(out + "/metrics.jsonl", "w").write("".join(json.dumps(row) + chr(10) for row in rows))
"""
FAULTS = {
    "sound": ("", {"train": "ok", "evaluate": "ok", "save": "ok", "export": "ok", "resume": "ok"}),
    "crash": ("print('error: --lr: no'); sys.exit(2)", {"rehearsal": "error"}),
    "other course": ("rows[-3]['loss'] += 0.01 * again", {"resume": "error"}),
    "no resume": ("if again: print('boom'); sys.exit(1)", {"resume": "error"}),
    "slow": ("time.sleep(60)", {"rehearsal": "warning"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rehearsal_says_what_failed(visit, fault, tmp_path, monkeypatch):
    line, expected = FAULTS[fault]
    script = tmp_path / "train.py"
    script.write_text(FAKE.replace("FAULT", line))
    monkeypatch.setattr(smoke_test, "LAUNCH", script)
    limit = 3 if fault == "slow" else 60
    played = smoke_test.Rehearsal(visit["request"], visit["plan"], visit["data"], limit=limit, near=tmp_path / "near")
    checks = list(played.check())
    found = levels(checks)
    assert {what: found[what] for what in expected} == expected, checks
    assert set(found) <= {"train", "evaluate", "save", "export", "resume", "rehearsal"}
    assert not list((tmp_path / "near").iterdir()), "nothing is left"
    if fault == "crash":
        assert "--lr: no" in checks[0].found
    if fault == "sound":
        assert played.measured.step == pytest.approx(2.0), "10 tokens at 5 a second, the first step left out"
        costs = {one.what: one for one in smoke_test.costs(visit["plan"], visit["data"], played.measured, 7.0)}
        assert "steps of 2.00 s" in costs["time"].found
        assert costs["disk"].level == "ok"
        assert smoke_test.room(tmp_path, replace(played.measured, checkpoint=2**60), 2).level == "error"


def test_large_data_are_sampled_in_their_own_form(tmp_path, shelf, tiny):
    from conftest import write_records

    path = write_records(tmp_path / "large.jsonl", rows=4000, seed=3)
    words = f"--mode full --model {tiny} --data {path} --objective completion --block-size 32 --global-batch 2"
    request = cli.read([*words.split(), *TEMPLATES])
    data = load(prepare(request.settings.data, model=tiny, global_batch=2).folder)
    model = build(request.settings, on_meta=True)
    plan = make_plan(request.settings, planned_world(1), data, model.facts, load_config(request.settings.model))
    given = smoke_test._sample(request, plan, data, tmp_path)["data"]
    lines = {side: Path(given[side]).read_text().splitlines() for side in ("data", "val_data")}
    assert 8 <= len(lines["data"]) < 400, "4 steps of 2, and not much more"
    assert 1 <= len(lines["val_data"]) < 400
    assert not set(lines["data"]) & set(lines["val_data"])
    again = cli.read(cli.words(request, data=given)).settings
    assert prepare(again.data, model=tiny, global_batch=2).facts["train"]["examples"] >= 8


# --- the command ---


def test_a_mistake_becomes_a_check():
    def mistake() -> Any:
        yield Check(level="ok", what="a", found="b")
        raise UserError("--data x: no such file; expected CSV")

    found = list(guarded("run", mistake))
    assert [one.level for one in found] == ["ok", "error"]
    assert found[1].remedy == "expected CSV"


def run(words: list[str], capsys: Any, **more: Any) -> tuple[int, str]:
    code = doctor_cli.run(
        cli.read(words),
        environ={},
        ranks=more.pop("ranks", 1),
        rehearse=False,
        limit=1.0,
        as_json=more.pop("as_json", True),
    )
    return code, capsys.readouterr().out


def test_json_holds_everything_and_the_exit_code_counts_errors(tiny, records, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = f"--mode full --model {tiny} --data {records[0]} --val-data {records[1]} --objective completion"
    words += " --block-size 32 --global-batch 4 --out run"
    code, printed = run([*words.split(), *TEMPLATES], capsys)
    told = json.loads(printed)
    assert (code, told["error"]) == (0, 0), told["checks"]
    assert {one["section"] for one in told["checks"]} >= {"environment", "run", "data", "model", "steps"}
    assert [row["ds_config"] for row in told["memory"]] == list(DS_NAMES)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    code, printed = run([*words.split(), *TEMPLATES], capsys)
    assert code == 1
    assert [one["what"] for one in json.loads(printed)["checks"] if one["level"] == "error"] == ["run folder"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--global-batch 5", "5 examples / 2 ranks is not whole"),
        ("--out {file}/run", "cannot write there: Not a directory"),
        ("--wandb online", "--wandb online: not logged in"),
    ],
)
def test_what_the_run_would_refuse_is_an_error_before_data_are_read(
    more, said, tiny, records, capsys, tmp_path, monkeypatch
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login of whoever runs the tests
    (tmp_path / "file").touch()
    words = f"--mode full --model {tiny} --data missing.csv --block-size 16 {more.format(file=tmp_path / 'file')}"
    code, printed = run([*words.split(), *TEMPLATES], capsys, ranks=2, as_json=False)
    assert code == 1
    assert said in printed
    assert "1 errors" in printed


def test_sizes_are_written_for_people():
    assert (size(3.4 * 2**30), size(812 * 2**20)) == ("3.4 GiB", "812 MiB")


def test_words_give_the_request_back():
    line = ["--mode", "lora", "--lr", "0.001", "--lora-targets", "c_attn,c_fc", "--no-shuffle", "--out", "a b"]
    request = cli.read(line)
    again = cli.read(cli.words(request, train={"max_steps": 4}))
    assert again.settings.train.max_steps == 4
    assert again.settings.lora.targets == ("c_attn", "c_fc")
    assert not again.settings.data.shuffle
    assert again.settings.output.out == "a b"


@pytest.mark.sweep  # five starts of the program: a minute on one quiet core
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_real_rehearsal(tiny, records, tmp_path, ranks, capsys):
    words = f"--mode lora --model {tiny} --data {records[0]} --val-data {records[1]} --objective completion"
    words += f" --block-size 32 --global-batch 4 --out {tmp_path}/run"
    code = doctor_cli.run(
        cli.read([*words.split(), *TEMPLATES]), environ={}, ranks=ranks, rehearse=True, limit=400.0, as_json=True
    )
    told = json.loads(capsys.readouterr().out)
    assert code == 0, [one for one in told["checks"] if one["level"] == "error"]
    found = {one["what"]: one["found"] for one in told["checks"] if one["section"] == "rehearsal"}
    assert set(found) == {"train", "evaluate", "save", "export", "resume"}
    assert found["resume"] == "from step 2: losses bit for bit the same"
    assert told["measured"]["step"] > 0
    assert sys.executable
