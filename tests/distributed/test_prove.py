"""`doctor.py --prove`: every stage, number of ranks and way to run steps against a plain loop; a wrong one is named."""

import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.engines import plan_run
from helpers.tiny_inputs import tiny_argv

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.distributed.process_group import simulated_context
from trainer.tools.doctor import doctor, prove
from trainer.tools.doctor.prove import judge_row, list_rows


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
        ({"loss_difference": 1e-4}, "bf16", "equal"),
        ({"norm_difference": float("inf")}, "bf16", "differs"),
        ({"weight_difference": 0.1}, "fp32", "differs"),
        (None, "fp32", "failed"),
        ({"problem": "steps are not recorded: why"}, "fp32", "fell back"),
    ],
)
def test_a_row_is_judged_by_its_losses_norms_and_weights(fields, precision, verdict):
    numbers = {"loss_difference": 1e-7, "norm_difference": 1e-6, "weight_difference": 0.001}
    row = {} if fields is None else {**numbers, **fields}
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


def test_fp16_is_refused_in_one_line(planned):
    execution = replace(planned.plan.execution, precision="fp16")
    with pytest.raises(UserError, match="--precision fp16 with --prove"):
        next(prove.prove(replace(planned.plan, execution=execution), planned.data, 1))


BROKEN_WORKER = """
from trainer.distributed.stepper import PlainStepper
from trainer.tools import trial_engine
from trainer.tools.doctor import prove
def measure_row(job, dist_context):
    is_broken = dist_context.world_size == 2 and job["ds_config"] == ("zero0" if {kind!r} == "wrong" else "zero1")
    if is_broken and {kind!r} == "dies":
        raise RuntimeError("boom in zero1")
    PlainStepper.grad_divisor = 2 if is_broken else 1  # the gradient is the sum over the ranks twice
    return prove.measure_row(job, dist_context)
trial_engine.run_rank(measure_row)
"""


def run_prove(argv: list[str], ranks: int, capsys: Any) -> tuple[int, dict[str, str], dict[str, str]]:
    """(exit code, {row: level}, {row: message})."""
    code = doctor.run_doctor(
        cli.parse_args(argv),
        world_size=ranks,
        as_json=True,
        limit_seconds=200.0,
        proves=True,
    )
    checks = [check for check in json.loads(capsys.readouterr().out)["checks"] if check["section"].startswith("proof")]
    return code, {c["name"]: c["level"] for c in checks}, {c["name"]: c["message"] for c in checks}


def test_every_stage_on_one_and_two_ranks_gives_the_plain_loops_numbers(
    tiny_model, data_files, tmp_path, capsys, fast_python, monkeypatch
):
    monkeypatch.setattr(sys, "executable", fast_python)
    flags = ("--label-smoothing", "0.1", "--output-dir", str(tmp_path / "run"))
    code, levels, messages = run_prove(make_argv(tiny_model, data_files, "full", *flags), 2, capsys)
    assert code == 0, messages
    rows = [f"zero{stage} x {ranks}" for ranks in (1, 2) for stage in range(4)]
    assert list(levels) == [prove.PLAIN, *rows, "numbers"]
    assert set(levels.values()) == {"ok"}
    content = json.loads((tmp_path / "run" / "prove.json").read_text())
    assert {item["verdict"] for item in content["rows"]} == {"equal"}
    assert all(item["step_ms"] > 0 and item["peak_memory_bytes"] > 2**26 for item in content["rows"])


@pytest.mark.parametrize(("kind", "expected"), [("wrong", "eager    differs"), ("dies", "boom in zero1")])
def test_a_stage_that_gives_other_numbers_or_dies_is_named_and_the_others_go_on(
    kind, expected, tiny_model, data_files, tmp_path, capsys, fast_python, monkeypatch
):
    monkeypatch.setattr(sys, "executable", fast_python)
    monkeypatch.setattr(prove, "WORKER_COMMAND", ("-c", BROKEN_WORKER.format(kind=kind)))
    monkeypatch.setattr(prove, "STAGES", ("zero0", "zero1"))
    argv = make_argv(tiny_model, data_files, "lora", "--output-dir", str(tmp_path / "run"))
    code, levels, messages = run_prove(argv, 2, capsys)
    assert code == 1
    bad = "zero0 x 2" if kind == "wrong" else "zero1 x 2"
    assert levels[bad] == "error"
    assert expected in messages[bad]
    assert levels["zero0 x 1"] == "ok"
    assert (levels["zero1 x 2"] == "ok") == (kind == "wrong")
