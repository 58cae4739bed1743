"""The doctor: each check is ok where it should be and speaks, with a remedy, where something is planted."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import plan_run
from helpers.launch_ranks import make_process
from helpers.tiny_inputs import TEMPLATE_FLAGS, tiny_argv

from trainer.config import cli
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.tools import processes
from trainer.tools.doctor import checks, doctor, rehearsal
from trainer.tools.doctor.checks import LEVELS


def worst_levels(results: Any) -> dict[str, str]:
    """{what: level}, the worst of those of one name."""
    levels: dict[str, str] = {}
    for check in results:
        assert check.level == "ok" or check.remedy, f"{check} without a remedy"
        levels[check.name] = max(levels.get(check.name, "ok"), check.level, key=LEVELS.index)
    return levels


# --- environment ---


def test_doctor_checks_versions_against_the_supported_ranges():
    good = checks.check_packages(">=3.11", ["torch>=2", "numpy", "pytest>=99; extra == 'test'"])
    assert worst_levels(good) == {"packages": "ok"}
    needs = [f"torch<{torch.__version__.split('+')[0]}", "no-such-package>=1"]
    bad = list(checks.check_packages(">=3.99", needs))
    assert worst_levels(bad) == {"Python": "error", "torch": "error", "no-such-package": "error", "packages": "ok"}
    assert any("pip install 'no-such-package>=1'" in check.remedy for check in bad)


@pytest.mark.parametrize(("name", "level"), [("gpt2-full-vs-lora", "ok"), ("not-installed", "warning")])
def test_doctor_takes_the_ranges_from_the_installed_package(name, level, monkeypatch):
    monkeypatch.setattr(checks, "DISTRIBUTION", name)
    assert worst_levels(checks.check_environment(1))["packages"] == level


def test_doctor_names_what_train_refuses_about_this_host(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none0")
    check = next(check for check in checks.check_environment(2) if check.name == "host")
    assert (check.level, check.message) == ("error", "GLOO_SOCKET_IFNAME=none0: no such network interface")
    assert check.remedy.startswith("expected one of")


@pytest.mark.parametrize(
    ("ranks", "changes", "levels"),
    [
        (2, {}, {"GPUs": "ok", "bf16": "ok", "/dev/shm": "ok"}),
        (3, {}, {"GPUs": "error"}),
        (2, {"names": ["A100", "L4"]}, {"GPUs": "warning"}),
        (1, {"names": ["A100", "L4"]}, {"GPUs": "ok"}),
        (2, {"bf16": False}, {"bf16": "warning"}),
        (2, {"shm": 2**26}, {"/dev/shm": "error"}),
        (1, {"shm": 2**26}, {"/dev/shm": "ok"}),
    ],
)
def test_doctor_looks_at_the_gpus_of_this_machine(ranks, changes, levels, monkeypatch):
    values = {"names": ["A100", "A100"], "bf16": True, "shm": 2**34, **changes}
    gpus = [SimpleNamespace(name=name, total_memory=2**36) for name in values["names"]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: values["bf16"])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    monkeypatch.setattr(checks.machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=values["shm"]))
    found = worst_levels(checks.check_environment(ranks))
    assert {name: found[name] for name in levels} == levels


# --- data ---


def make_dataset(texts: list[list[int]], first: int) -> TokenDataset:
    return TokenDataset(
        ids=np.concatenate([np.asarray(text, dtype=np.uint16) for text in texts]),
        offsets=np.cumsum([0, *map(len, texts)]),
        target_mask=np.concatenate([np.arange(len(text)) >= first for text in texts]).astype(np.uint8),
    )


def make_data(train: list[list[int]], val: list[list[int]], first: int = 1) -> PreparedDataset:
    metadata: dict[str, Any] = {"repeated_in_train": len(train) - len(set(map(tuple, train)))}
    datasets = {"train": make_dataset(train, first), "val": make_dataset(val, first)}
    for split, dataset in datasets.items():
        num_target_tokens = int(dataset.num_target_tokens().sum())
        metadata[split] = {"examples": len(dataset), "records": len(dataset), "num_target_tokens": num_target_tokens}
    return PreparedDataset(**datasets, metadata=metadata, val_texts=(), folder=Path())


def make_texts(count: int, stride: int, length: int = 30) -> list[list[int]]:
    """Texts of 600 ids, all of which occur in 600 of them; no two strides make the same text."""
    return [[1 + (n + stride * position) % 600 for position in range(length)] for n in range(count)]


@pytest.mark.parametrize(
    ("levels", "data"),
    [
        ({"validation": "ok", "repeats": "ok", "masked": "ok"}, make_data(make_texts(600, 1), make_texts(200, 2))),
        ({"validation": "warning"}, make_data(make_texts(600, 1), make_texts(5, 2))),
        ({"repeats": "warning"}, make_data(make_texts(100, 1) * 2, make_texts(200, 2))),
        ({"masked": "warning"}, make_data(make_texts(600, 1), make_texts(200, 2), first=29)),
        ({"masked": "error"}, make_data(make_texts(600, 1), make_texts(200, 2), first=30)),
    ],
)
def test_doctor_finds_every_fault_planted_in_the_data(levels, data):
    assert worst_levels(checks.check_data(data)).items() >= levels.items()


# --- plan and memory ---


@pytest.fixture(scope="module")
def doctor_inputs(tiny_model: str, data_files: tuple[str, str]) -> dict[str, Any]:
    argv = tiny_argv(tiny_model, data_files, "--mode lora --objective completion --block-size 32 --global-batch 4")
    planned = plan_run(argv, simulated_context(1), on_meta=True)
    return {"request": cli.parse_args(argv), "plan": planned.plan, "data": planned.data}


def test_doctor_estimates_memory_for_every_zero_file_and_too_little_is_an_error(doctor_inputs, monkeypatch):
    plan = doctor_inputs["plan"]
    table = checks.build_memory_table(plan, 32)
    assert [row["ds_config"] for row in table] == list(DS_CONFIG_NAMES)
    assert [row["ds_config"] for row in table if row["chosen"]] == ["zero0"]
    assert set(worst_levels(checks.check_memory(plan, table)).values()) == {"ok"}
    monkeypatch.setattr(DistContext, "available_bytes", lambda self: 1000.0)
    small = checks.build_memory_table(plan, 32)
    assert not any(row["fits"] for row in small)
    assert worst_levels(checks.check_memory(plan, small)) == {"memory": "error"}


# --- the rehearsal, with a program that is quickly done in place of train.py ---

FAKE_TRAIN_SCRIPT = """
import json, os, sys, time
words = sys.argv[1:]
out = next(word for word in words if word.startswith("--output-dir=")).partition("=")[2]
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
def test_a_rehearsal_says_what_failed(doctor_inputs, fault, tmp_path, monkeypatch):
    line, expected = FAULTS[fault]
    script, near = tmp_path / "train.py", tmp_path / "near"
    script.write_text(FAKE_TRAIN_SCRIPT.replace("FAULT", line))
    near.mkdir()
    monkeypatch.setattr(processes, "TRAIN_SCRIPT", script)
    make_process(target=print, args=())  # starts the server from which this process forks all others
    request, plan, data = (doctor_inputs[name] for name in ("request", "plan", "data"))
    output = replace(plan.settings.output, output_dir=str(near / "run"))
    plan = replace(plan, settings=replace(plan.settings, output=output))
    measured: dict[str, Any] = {}
    results = list(rehearsal.rehearse(request, plan, 1 if fault == "slow" else 60, measured))
    levels = worst_levels(results)
    assert {what: levels[what] for what in expected} == expected, results
    assert set(levels) <= {"train", "evaluate", "save", "export", "resume", "rehearsal"}
    assert not list(near.iterdir()), "nothing is left"
    if fault == "crash":
        assert "--lr: no" in results[0].message
    if fault == "sound":
        assert measured["step_seconds"] == pytest.approx(2.0), "10 tokens at 5 a second, the first step left out"
        costs = {check.name: check for check in rehearsal.estimate_costs(plan, data, measured, 7.0)}
        assert "steps of 2.00 s" in costs["time"].message
        assert costs["disk"].level == "ok"
        costs = worst_levels(rehearsal.estimate_costs(plan, data, {**measured, "checkpoint_bytes": 2**60}, 7.0))
        assert costs["disk"] == "error"


# --- the command ---


def run_doctor(
    argv: list[str],
    capsys: Any,
    *,
    ranks: int = 1,
    gpu_memory_bytes: int | None = None,
    limit_seconds: float | None = None,
    as_json: bool = True,
) -> tuple[int, str]:
    """(exit code, what was printed)."""
    code = doctor.run_doctor(
        cli.parse_args(argv),
        world_size=ranks,
        gpu_memory_bytes=gpu_memory_bytes,
        as_json=as_json,
        limit_seconds=limit_seconds,
    )
    return code, capsys.readouterr().out


def test_doctor_foretells_the_memory_of_a_gpu_that_is_not_here(tiny_model, data_files, tmp_path, capsys, monkeypatch):
    """Of 24 GiB and of one that is too small, on a machine without any."""
    monkeypatch.chdir(tmp_path)
    text = "--mode lora --objective completion --block-size 32 --global-batch 4 --output-dir run"
    argv = tiny_argv(tiny_model, data_files, text)
    for gpu_memory_bytes, expected_code, level in ((24 * 2**30, 0, "ok"), (2**20, 1, "error")):
        code, printed = run_doctor(argv, capsys, ranks=2, gpu_memory_bytes=gpu_memory_bytes)
        report = json.loads(printed)
        assert code == expected_code, [check for check in report["checks"] if check["level"] == "error"]
        assert report["plan"]["precision"] == f"bf16 on 2 x GPU of {gpu_memory_bytes / 2**30:g} GiB"
        memory = next(check for check in report["checks"] if check["name"] == "memory")
        assert memory["level"] == level
        assert "a GPU" in memory["message"]
        assert all(row["peak"] > 600 * 2**20 for row in report["memory"]), "with CUDA's own"
        assert report["measured"] == {}


def test_doctor_json_holds_all_checks_and_the_exit_code_says_whether_there_are_errors(
    tiny_model, data_files, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = "--mode full --objective completion --block-size 32 --global-batch 4 --output-dir run"
    code, printed = run_doctor(tiny_argv(tiny_model, data_files, text), capsys)
    report = json.loads(printed)
    assert (code, report["error"]) == (0, 0), report["checks"]
    assert {check["section"] for check in report["checks"]} >= {"environment", "run", "data"}
    assert [row["ds_config"] for row in report["memory"]] == list(DS_CONFIG_NAMES)
    leaked = tiny_argv(tiny_model, (data_files[0], data_files[0]), f"{text} --allow-leakage")
    _, printed = run_doctor(leaked, capsys)
    warnings = [check["message"] for check in json.loads(printed)["checks"] if check["level"] == "warning"]
    assert any(w.startswith("25 of 25 validation records are not new: 25 equal") for w in warnings)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    code, printed = run_doctor(tiny_argv(tiny_model, data_files, text), capsys)
    assert code == 1
    assert [check["name"] for check in json.loads(printed)["checks"] if check["level"] == "error"] == ["run folder"]


@pytest.mark.parametrize(
    ("more", "output", "remedy"),
    [
        ("--global-batch 5", "--global-batch 5: expected a multiple of 2 ranks", "try --global-batch 6"),
        ("--output-dir {file}/run", "cannot write there: Not a directory", "name another folder with --output-dir"),
        ("--wandb online", "--wandb online: not logged in", "run `wandb login`"),
    ],
)
def test_doctor_reports_what_train_would_refuse_before_data_are_read(
    more, output, remedy, tiny_model, capsys, tmp_path, monkeypatch
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login of whoever runs the tests
    (tmp_path / "file").touch()
    flags = f"--mode full --model {tiny_model} --data missing.csv --block-size 16 {more.format(file=tmp_path / 'file')}"
    code, printed = run_doctor([*flags.split(), "--preset", "demo", *TEMPLATE_FLAGS], capsys, ranks=2, as_json=False)
    assert code == 1
    assert output in printed
    assert f"remedy        {remedy}" in printed
    assert "1 errors" in printed


@pytest.mark.sweep  # five starts of the program: a minute on one quiet core
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rehearsal_passes_on_real_ranks(tiny_model, data_files, tmp_path, ranks, capsys):
    text = f"--mode lora --objective completion --block-size 32 --global-batch 4 --output-dir {tmp_path}/run"
    code, printed = run_doctor(tiny_argv(tiny_model, data_files, text), capsys, ranks=ranks, limit_seconds=400.0)
    report = json.loads(printed)
    assert code == 0, [check for check in report["checks"] if check["level"] == "error"]
    messages = {check["name"]: check["message"] for check in report["checks"] if check["section"] == "rehearsal"}
    assert set(messages) == {"train", "evaluate", "save", "export", "resume"}
    assert messages["resume"] == "from step 2: losses bit for bit the same"
    assert report["measured"]["step_seconds"] > 0
