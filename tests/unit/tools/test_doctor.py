"""The doctor: each check is ok where it should be and speaks, with a remedy, where something is planted."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engines import plan_run
from helpers.fake_runs import make_run_folder
from helpers.tiny_inputs import TEMPLATE_FLAGS, tiny_argv

from trainer.config import cli
from trainer.config.choices import DS_CONFIG_NAMES
from trainer.distributed import machine
from trainer.distributed.process_group import simulated_context
from trainer.tools.doctor import doctor


@pytest.mark.parametrize(("ranks", "level"), [(2, "ok"), (3, "error")])
def test_doctor_counts_the_gpus_of_this_machine(ranks, level, monkeypatch):
    gpus = [SimpleNamespace(name="A100", total_memory=2**36)] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    assert doctor.check_gpus(ranks).level == level


def test_the_memory_of_a_rank_is_within_the_limit_of_its_container(tmp_path, monkeypatch):
    """What a container has read of files counts as used, and is given back."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    files = {"memory.max": 2000, "memory.current": 1500, "memory.stat": "anon 900\ninactive_file 300\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(f"{content}\n")
    context = simulated_context(2)
    assert (context.free_host_bytes(), context.least_memory_bytes()) == (400, 1000)
    (tmp_path / "memory.max").write_text("max\n")
    assert context.free_host_bytes() > 2**20


@pytest.fixture(scope="module")
def doctor_inputs(tiny_model: str, data_files: tuple[str, str]) -> dict[str, Any]:
    argv = tiny_argv(tiny_model, data_files, "--mode lora --objective completion --block-size 32 --global-batch 4")
    planned = plan_run(argv, simulated_context(1), on_meta=True)
    return {"request": cli.parse_args(argv), "plan": planned.plan, "data": planned.data}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("", {"rehearsal": "ok", "resume": "ok"}),
        ("other course", {"rehearsal": "ok", "resume": "error"}),
        ("crash", {"rehearsal": "error"}),
    ],
)
def test_a_rehearsal_says_what_failed(doctor_inputs, fault, expected, tmp_path, monkeypatch):
    def start(slot, argv, folder):
        if fault != "crash":
            final_loss = 4.6 if fault == "other course" and "--resume" in argv else 4.5
            shutil.rmtree(folder / "run", ignore_errors=True)
            make_run_folder(folder / "run", losses={0: 5.0, 1: final_loss}, epochs=1)
        (folder / "log").write_text("error: --lr: no\n")
        return SimpleNamespace(exitcode=2 if fault == "crash" else 0, join=lambda: None)

    monkeypatch.setattr(doctor, "start_run", start)
    request, plan = (doctor_inputs[name] for name in ("request", "plan"))
    output = replace(plan.settings.output, output_dir=str(tmp_path / "run"))
    plan = replace(plan, settings=replace(plan.settings, output=output))
    results = list(doctor.rehearse(request, plan))
    assert {check.name: check.level for check in results} == expected, results
    assert all(check.level == "ok" or check.remedy for check in results)
    assert not list(tmp_path.iterdir()), "nothing is left"
    assert fault != "crash" or results[0].message == "failed: --lr: no"


def run_doctor(argv: list[str], capsys: Any, **options: Any) -> tuple[int, str]:
    """(exit code, what was printed)."""
    code = doctor.run_doctor(cli.parse_args(argv), world_size=options.pop("ranks", 1), **options)
    return code, capsys.readouterr().out


def test_doctor_foretells_the_memory_of_a_gpu_that_is_not_here(tiny_model, data_files, tmp_path, capsys, monkeypatch):
    """Of 24 GiB and of one that is too small, on a machine without any."""
    monkeypatch.chdir(tmp_path)
    text = "--mode lora --objective completion --block-size 32 --global-batch 4 --output-dir run"
    argv = tiny_argv(tiny_model, data_files, text)
    for gpu_memory_bytes, expected_code, level in ((24 * 2**30, 0, "ok"), (2**20, 1, "error")):
        code, printed = run_doctor(argv, capsys, ranks=2, gpu_memory_bytes=gpu_memory_bytes)
        assert code == expected_code, printed
        assert f"bf16 on 2 x GPU of {gpu_memory_bytes / 2**30:g} GiB" in printed
        assert re.search(rf"{level} +memory .* a GPU\n", printed)
        rows = [line for line in printed.splitlines() if line.startswith("  zero")]
        assert [row.split()[0] for row in rows] == list(DS_CONFIG_NAMES)
        assert all(("does not fit" in row) == (level == "error") for row in rows)
        assert all(int(re.findall(r"(\d+) MiB", row)[5]) >= 600 for row in rows), "with CUDA's own"


def test_doctor_warns_of_what_the_plan_warns_of_and_a_run_folder_in_use_is_an_error(
    tiny_model, data_files, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "rehearse", lambda *_: ())
    text = "--mode full --objective completion --block-size 32 --global-batch 4 --output-dir run"
    leaked = tiny_argv(tiny_model, (data_files[0], data_files[0]), f"{text} --allow-leakage")
    code, printed = run_doctor(leaked, capsys)
    assert code == 0
    assert re.search("warning  warning +25 of 25 validation records are not new: 25 equal", printed), printed
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    code, printed = run_doctor(tiny_argv(tiny_model, data_files, text), capsys)
    assert code == 1
    assert re.search("error +run folder +run already holds a run", printed)
    assert "1 errors" in printed


@pytest.mark.parametrize(
    ("more", "output", "remedy"),
    [
        ("--global-batch 5", "--global-batch 5: expected a multiple of 2 (", "try --global-batch 6"),
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
    code, printed = run_doctor([*flags.split(), "--preset", "demo", *TEMPLATE_FLAGS], capsys, ranks=2)
    assert code == 1
    assert output in printed
    assert f"remedy        {remedy}" in printed
    assert "1 errors" in printed


@pytest.mark.sweep  # five starts of the program: a minute on one quiet core
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rehearsal_passes_on_real_ranks(tiny_model, data_files, tmp_path, ranks, capsys):
    text = f"--mode lora --objective completion --block-size 32 --global-batch 4 --output-dir {tmp_path}/run"
    code, printed = run_doctor(tiny_argv(tiny_model, data_files, text), capsys, ranks=ranks)
    assert code == 0, printed
    assert re.search("ok +rehearsal +4 steps", printed)
    assert re.search("ok +resume +from step 2: losses bit for bit the same", printed)
