"""`doctor.py --prove`: every stage, number of ranks and way to run steps against a plain loop; a wrong one is named."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.engines import plan_run
from helpers.launch_ranks import make_process
from helpers.tiny_inputs import tiny_argv

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.distributed.process_group import simulated_context
from trainer.distributed.stepper import PlainStepper
from trainer.tools.doctor import doctor, prove
from trainer.tools.doctor.prove import judge_row, list_rows
from trainer.tools.trial_engine import run_job


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    """The server from which this process forks all others, with what tests need."""
    make_process(target=print, args=())


def make_argv(model: str, data_files: tuple[str, str], mode: str, *flags: str) -> list[str]:
    text = f"--mode {mode} --objective completion --block-size 32 --global-batch 4"
    return tiny_argv(model, data_files, text, *flags)


@pytest.fixture(scope="module")
def planned(tiny_model: str, data_files: tuple[str, str]) -> Any:
    return plan_run(make_argv(tiny_model, data_files, "full"), simulated_context(1), on_meta=True)


@pytest.mark.parametrize(
    ("fields", "precision", "verdict"),
    [
        ({}, "fp32", "equal"),
        ({"loss_difference": 1e-4}, "fp32", "differs"),
        ({"weight_difference": 0.1}, "fp32", "differs"),
        (None, "fp32", "failed"),
        ({"problem": "steps are not recorded: why"}, "fp32", "fell back"),
    ],
)
def test_a_row_is_judged_by_its_losses_norms_and_weights(fields, precision, verdict):
    numbers = {"loss_difference": 1e-7, "norm_difference": 1e-6, "weight_difference": 0.001}
    row = {} if fields is None else {"problem": "", **numbers, **fields}
    assert judge_row(row, precision) == verdict


def test_the_rows_are_all_that_can_run_on_the_device(planned):
    def names(device: str, world_sizes: list[int]) -> list[tuple[str, int, str]]:
        context = replace(planned.plan.dist_context, device=torch.device(device))
        plan = replace(planned.plan, dist_context=context)
        rows = [row for world_size in world_sizes for row in list_rows(plan, world_size)]
        return [(row["ds_config"], row["world_size"], row["execution"]) for row in rows]

    assert names("cpu", [1, 2]) == [(f"zero{stage}", ranks, "eager") for ranks in (1, 2) for stage in range(4)]
    assert names("cpu", [3]) == [], "4 rows are not divided by 3"
    on_gpu = names("cuda", [2])
    assert [item for item in on_gpu if item[2] == "graphs"] == [("zero0", 2, "graphs")]
    assert ("zero3", 2, "eager") in on_gpu
    execution = replace(planned.plan.execution, precision="fp16")
    with pytest.raises(UserError, match="--precision fp16 with --prove"):
        next(prove.prove(replace(planned.plan, execution=execution), planned.data))


def measure_broken_row(job: dict[str, Any], dist_context: Any) -> Any:
    """With wrong gradients in zero0 on two ranks, and none in zero1."""
    if dist_context.world_size == 2:
        assert job["ds_config"] != "zero1", "boom in zero1"
        PlainStepper.grad_divisor = 2  # the gradient is the sum over the ranks twice
    return prove.measure_row(job, dist_context)


def run_prove(argv: list[str], ranks: int, capsys: Any) -> tuple[int, dict[str, str], dict[str, str]]:
    """(exit code, {row: level}, {row: message})."""
    code = doctor.run_doctor(cli.parse_args(argv), world_size=ranks, proves=True)
    proof = capsys.readouterr().out.partition("\nproof in ")[2]
    checks = re.findall(r"^  (ok|warning|error) +(zero\S+ x \d|plain PyTorch) +(.*)$", proof, re.M)
    return code, {name: level for level, name, _ in checks}, {name: message for _, name, message in checks}


def test_every_stage_on_one_and_two_ranks_gives_the_plain_loops_numbers(tiny_model, data_files, tmp_path, capsys):
    flags = ("--label-smoothing", "0.1", "--output-dir", str(tmp_path / "run"))
    code, levels, messages = run_prove(make_argv(tiny_model, data_files, "full", *flags), 2, capsys)
    assert code == 0, messages
    rows = [f"zero{stage} x {ranks}" for ranks in (1, 2) for stage in range(4)]
    assert list(levels) == [prove.PLAIN, *rows]
    assert set(levels.values()) == {"ok"}
    assert all(re.match(r"eager +equal: loss \de-\d\d, gradient norm ", messages[row]) for row in rows)


def test_a_stage_that_gives_other_numbers_or_dies_is_named_and_the_others_go_on(
    tiny_model, data_files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(prove, "run_job", lambda _, *args, **options: run_job(measure_broken_row, *args, **options))
    monkeypatch.setattr(prove, "STAGES", ("zero0", "zero1"))
    argv = make_argv(tiny_model, data_files, "lora", "--output-dir", str(tmp_path / "run"))
    code, levels, messages = run_prove(argv, 2, capsys)
    assert code == 1
    assert [level for name, level in levels.items() if " x " in name] == ["ok", "ok", "error", "error"]
    assert "eager    differs" in messages["zero0 x 2"]
    assert "boom in zero1" in messages["zero1 x 2"]
