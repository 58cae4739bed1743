"""Real runs: packed rows give the losses, norms and weights of one example a row, step by step."""

import json

import pytest
from helpers.launch_ranks import train
from helpers.tiny_inputs import TEMPLATE_FLAGS

TOLERANCE = 2e-5  # float32 sums in another order, over 14 steps


def test_a_packed_run_follows_the_run_of_single_rows_step_by_step(tiny_model, data_files, tmp_path):
    flags = f"--mode full --model {tiny_model} --data {data_files[0]} --val-data {data_files[1]}"
    flags += " --objective completion --block-size 32 --global-batch 8 --epochs 2 --wandb disabled --lr 1e-3"
    flags += " --dropout 0 --no-shuffle --num-samples 0"
    records = {}
    for name, extra in (("single", []), ("packed", ["--packing"])):
        output = train([*flags.split(), "--preset", "demo", *TEMPLATE_FLAGS, *extra], out=tmp_path / name, world_size=2)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records[name] = [record for record in map(json.loads, lines) if record["kind"] in ("step", "eval")]
        if extra:
            assert "packed into rows of at most 32 tokens" in output
            assert "one example a row:" in output
    for single, packed in zip(records["single"], records["packed"], strict=True):
        for key in ("kind", "step", "samples", "tokens"):
            assert packed[key] == single[key]
        assert packed["loss"] == pytest.approx(single["loss"], abs=TOLERANCE)
        if single["kind"] == "step":
            assert packed["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-4)


def test_packing_blocks_is_refused_before_a_step(tiny_model, data_files, tmp_path):
    flags = f"--mode full --model {tiny_model} --data {data_files[0]} --objective blocks --block-size 16 --packing"
    output = train(
        [*flags.split(), "--preset", "demo", *TEMPLATE_FLAGS, "--wandb", "disabled"], out=tmp_path / "run", check=False
    )
    assert "error: --packing: blocks are full already; expected --objective completion, or chat" in output
