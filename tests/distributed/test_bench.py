"""The benchmark measures what it says: its variants, its formulas, its table, and one tiny call of the real thing."""

import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import pytest
import torch

from trainer.config import cli
from trainer.config.errors import TrainingError, UserError
from trainer.model.build import build_model
from trainer.tools.bench import bench_cli, steps
from trainer.tools.bench.configs import BenchmarkConfig, build_configs
from trainer.tools.bench.steps import add_relative_speeds, format_markdown
from trainer.tools.bench.worker import WeightProducts, count_layer_shapes


def list_configs(flags: str) -> list[BenchmarkConfig]:
    return build_configs(bench_cli.build_parser("steps").parse_args(flags.split()), "cpu")


def test_bench_runs_this_trainer_first_and_peers_on_one_rank():
    configs = list_configs("--ranks 1,2 --ds-config zero0,zero2 --against hf,hf-deepspeed")
    assert [config.name for config in configs if config.mode == "full"] == [
        "ours zero0 fp32",
        "ours zero2 fp32",
        "ours zero0 2 ranks fp32",
        "ours zero2 2 ranks fp32",
        "hf fp32",
        "hf-deepspeed zero0 fp32",
        "hf-deepspeed zero2 fp32",
    ]
    assert len(set(configs)) == len(configs) == 14


def test_bench_runs_this_trainer_in_every_precision_and_peers_in_the_first():
    configs = list_configs("--precision fp32,bf16 --execution auto,eager --against hf --modes full")
    assert [config.name for config in configs] == [
        "ours zero0 fp32",
        "ours zero0 fp32 eager",
        "ours zero0 bf16",
        "ours zero0 bf16 eager",
        "hf fp32",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--against nanogpt", "--against nanogpt: expected plain, hf"),
        ("steps --ds-config zero9", "--ds-config zero9: expected zero0"),
        ("--modes lara", "--modes lara: expected full, lora"),
        ("--batches 3 --ranks 2", "--batches 3: does not divide over 2 ranks"),
        ("--batches 0", "--batches: 0: expected a whole number from 1"),
        ("scaling --rounds x", "--rounds: x: expected a whole number from 1"),
        ("speed", "speed: expected steps, memory, data, scaling, operations, kernels, packing, card"),
        ("memory --methods full,lara", "--methods lara: expected some of full, full-adamw8bit"),
        ("data --out x", "--out x: unknown flag"),
    ],
)
def test_a_wrong_bench_argument_is_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        bench_cli.run(argv.split())
    assert str(caught.value).startswith(message)


def test_weight_products_are_those_of_every_layer_with_a_gradient_of_the_weight_where_it_trains():
    """One block: c_attn, c_proj, c_fc, c_proj of the MLP, and the output layer."""
    settings = cli.parse_args(["--mode", "lora", "--lora-rank", "4", "--model", "demo-base"]).settings
    model = build_model(settings, on_meta=True)
    layer_shapes = count_layer_shapes(model)
    width, num_layers = model.causal.config.n_embd, model.causal.config.n_layer
    assert layer_shapes[width, 3 * width, False] == num_layers
    assert layer_shapes[width, 4, True] >= 2 * num_layers
    products = WeightProducts(Counter({(8, 16, True): 3, (8, 4, False): 1}), 10, torch.float32, torch.device("cpu"))
    assert [times for _, times in products.products] == [3, 3, 3, 1, 1]
    shapes = [tuple(product().shape) for product, _ in products.products]
    assert shapes == [(10, 16), (10, 8), (8, 16), (10, 4), (10, 8)]
    assert products.seconds() > 0


def test_bench_speedup_is_the_ratio_round_by_round():
    rows: list[dict[str, Any]] = [
        {"mode": "full", "global_batch": 2, "rounds": [1.0, 2.0, 3.0]},
        {"mode": "full", "global_batch": 2, "rounds": [2.0, 2.0, 12.0]},
        {"mode": "lora", "global_batch": 2, "rounds": [5.0]},
        {"mode": "lora", "global_batch": 2, "problem": "failed"},
    ]
    add_relative_speeds(rows)
    assert rows[0]["speed"] == [1.0, 1.0, 1.0]
    assert rows[1]["speed"] == [0.5, 0.25, 1.0], "a machine that slows down for a round slows both"
    assert rows[2]["speed"] == [1.0, 1.0, 1.0]
    assert "speed" not in rows[3]


def test_a_bench_of_several_rounds_compares_what_is_there_after_each_variant(monkeypatch):
    result = {
        "ran_by": "eager",
        "products": [0.5],
        "first_step": 1.0,
        "peak_memory": 1,
        "device_memory": 0,
        "input": 0.0,
        "eval": None,
        "threads": 1,
        "gpu": None,
        "flops_per_token": 1.0,
        "ceiling": 1e9,
    }
    seconds = iter([1.0, 2.0, 3.0, 12.0])
    monkeypatch.setattr(steps, "_run_job", lambda config, turn: {**result, "windows": [next(seconds)]})
    configs = [
        BenchmarkConfig(program=program, mode="full", global_batch=2, ds_config=None) for program in ("ours", "hf")
    ]
    speeds: list[Any] = []
    ours, hf = steps.run_rounds(configs, rounds=2, after_each=lambda rows: speeds.append(rows[1].get("speed")))
    assert (ours["rounds"], hf["rounds"]) == ([1.0, 3.0], [2.0, 12.0])
    assert speeds == [None, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.375, 0.25, 0.5]]


@pytest.mark.parametrize(("device", "at_once"), [("cpu", 1), ("cuda", 2)])
def test_rows_are_handed_over_after_each_variant_and_on_a_gpu_the_next_one_starts_meanwhile(
    device, at_once, monkeypatch
):
    started: list[str] = []
    seen: list[list[str]] = []

    def run_job(config: BenchmarkConfig, turn: str) -> dict[str, Any]:
        started.append(config.program)
        while len(started) < at_once:
            time.sleep(0.01)
        raise TrainingError(f"failed: {config.program}")

    monkeypatch.setattr(steps, "_run_job", run_job)
    configs = [
        BenchmarkConfig(program=program, mode="full", global_batch=2, ds_config=None, device=device)
        for program in ("ours", "hf")
    ]
    steps.run_rounds(configs, rounds=2, after_each=lambda rows: seen.append([row["problem"] for row in rows]))
    assert seen == [["failed: ours", "not measured"], ["failed: ours", "failed: hf"]], (
        "and what failed is not tried again"
    )


def test_a_benchmark_that_failed_says_so_in_its_line():
    facts = {
        "model": "m",
        "block_size": 8,
        "hardware": "h",
        "threads": 1,
        "versions": {"torch": "2"},
        "rounds": 1,
        "steps": "1",
        "ceiling_flops": 1e12,
        "ceiling_precision": "fp32",
    }
    config = BenchmarkConfig(program="hf", mode="full", global_batch=2, ds_config=None)
    row = {**asdict(config), "name": "hf", "problem": "failed: why"}
    line = next(line for line in format_markdown([row], facts).splitlines() if "failed" in line)
    assert line.startswith("| full | 2 | hf | failed: why |")
    assert line.count("|") == 14


def test_a_tiny_bench_call_measures_this_trainer_and_a_plain_loop(tmp_path, capsys, fast_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", fast_python)
    command_line = "--model demo-base --block-size 16 --modes lora --batches 2 --against plain --windows 2 --window 2"
    argv = [*command_line.split(), "--warmup", "1", "--rounds", "1", "--device", "cpu", "--output-dir", str(tmp_path)]
    assert bench_cli.run(argv) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "bench.json").read_text())
    ours, plain = content["rows"]
    assert (ours["name"], plain["name"]) == ("ours zero0 fp32", "plain fp32")
    for row in (ours, plain):
        assert len(row["windows"][0]) == 2
        assert row["tokens_per_second"] == pytest.approx(32 / row["step"])
        assert 0 < row["flop_share"] < 2
        assert 0 < row["product_share"] < 2
        assert row["peak_memory"] > 2**26
    assert ours["eval_over_training"] > 0
    assert content["facts"]["ceiling_flops"] > 1e6
    assert "| lora | 2 | ours zero0 fp32 (eager) |" in (tmp_path / "bench.md").read_text()
    assert "round 1/1" in printed
