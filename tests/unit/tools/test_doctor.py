"""The doctor: each check is ok where it should be and speaks, with a remedy, where something is planted."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import plan_run
from helpers.fake_runs import make_run_folder
from helpers.tiny_inputs import TEMPLATE_FLAGS, tiny_argv

from trainer.config import cli
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.tools.doctor import checks, doctor
from trainer.tools.doctor.checks import LEVELS


def worst_levels(results: Any) -> dict[str, str]:
    """{what: level}, the worst of those of one name."""
    levels: dict[str, str] = {}
    for check in results:
        assert check.level == "ok" or check.remedy, f"{check} without a remedy"
        levels[check.name] = max(levels.get(check.name, "ok"), check.level, key=LEVELS.index)
    return levels


# --- environment ---


def test_doctor_checks_versions_against_the_supported_ranges(monkeypatch):
    good = checks.check_packages(">=3.11", ["torch>=2", "numpy", "pytest>=99; extra == 'test'"])
    assert worst_levels(good) == {"packages": "ok"}
    needs = [f"torch<{torch.__version__.split('+')[0]}", "no-such-package>=1"]
    bad = list(checks.check_packages(">=3.99", needs))
    assert worst_levels(bad) == {"Python": "error", "torch": "error", "no-such-package": "error", "packages": "ok"}
    assert any("pip install 'no-such-package>=1'" in check.remedy for check in bad)
    assert worst_levels(checks.check_environment(1))["packages"] == "ok", "by the installed package"
    monkeypatch.setattr(checks, "DISTRIBUTION", "not-installed")
    assert worst_levels(checks.check_environment(1))["packages"] == "warning"


@pytest.mark.parametrize(
    ("ranks", "shared_memory", "levels"),
    [
        (2, 2**34, {"GPUs": "ok", "/dev/shm": "ok"}),
        (3, 2**34, {"GPUs": "error"}),
        (2, 2**26, {"/dev/shm": "error"}),
        (1, 2**26, {"/dev/shm": "ok"}),
    ],
)
def test_doctor_looks_at_the_gpus_of_this_machine(ranks, shared_memory, levels, monkeypatch):
    gpus = [SimpleNamespace(name="A100", total_memory=2**36)] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    monkeypatch.setattr(checks.machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=shared_memory))
    found = worst_levels(checks.check_environment(ranks))
    assert {name: found[name] for name in levels} == levels


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({}, {"validation": "ok", "repeats": "ok", "masked": "ok"}),
        ({"val_examples": 5}, {"validation": "warning"}),
        ({"repeated": 300}, {"repeats": "warning"}),
        ({"targets": 1}, {"masked": "warning"}),
    ],
)
def test_doctor_finds_every_fault_planted_in_the_data(changes, levels):
    values = {"val_examples": 200, "repeated": 0, "targets": 20, **changes}
    val = {"records": 200, "examples": values["val_examples"], "num_target_tokens": 6000}
    metadata = {"train": {"records": 600}, "val": val, "repeated_in_train": values["repeated"]}
    counts = {"num_target_tokens": lambda: np.array([values["targets"]]), "lengths": lambda: np.array([30])}
    data = SimpleNamespace(metadata=metadata, train=SimpleNamespace(**counts))
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


# --- the rehearsal, with rows in place of train.py ---


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("", {"rehearsal": "ok", "resume": "ok"}),
        ("other course", {"rehearsal": "ok", "resume": "error"}),
        ("crash", {"rehearsal": "error"}),
        ("slow", {"rehearsal": "warning"}),
    ],
)
def test_a_rehearsal_says_what_failed(doctor_inputs, fault, expected, tmp_path, monkeypatch):
    def start(slot, argv, folder):
        exit_codes = {"slow": None, "crash": 2}
        if fault not in exit_codes:
            final_loss = 4.6 if fault == "other course" and "--resume" in argv else 4.5
            shutil.rmtree(folder / "run", ignore_errors=True)
            make_run_folder(folder / "run", losses={0: 5.0, 1: final_loss}, epochs=1)
        (folder / "log").write_text("error: --lr: no\n")
        end_it = SimpleNamespace(join=lambda _: None, terminate=lambda: None, kill=lambda: None)
        return SimpleNamespace(exitcode=exit_codes.get(fault, 0), **vars(end_it))

    monkeypatch.setattr(doctor, "start_run", start)
    request, plan = (doctor_inputs[name] for name in ("request", "plan"))
    output = replace(plan.settings.output, output_dir=str(tmp_path / "run"))
    plan = replace(plan, settings=replace(plan.settings, output=output))
    results = list(doctor.rehearse(request, plan, 60))
    assert worst_levels(results) == expected, results
    assert not list(tmp_path.iterdir()), "nothing is left"
    assert fault != "crash" or results[0].message == "failed: --lr: no"


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
        ("--output-dir {file}/run", "is not a folder", "name another one"),
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
    checks = {c["name"]: c["message"] for c in json.loads(printed)["checks"] if c["section"] == "rehearsal"}
    assert (code, list(checks)) == (0, ["rehearsal", "resume"]), printed
    assert checks["resume"] == "from step 2: losses bit for bit the same"
