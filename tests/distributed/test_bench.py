"""The benchmark measures what it says: its programs, its formulas, its tables, and a tiny call of both measurements."""

import json
import re
import sys

import pytest

from trainer.config import cli
from trainer.config.errors import UserError
from trainer.tools.bench import bench_cli, steps
from trainer.tools.bench.memory import HEADINGS, format_cells
from trainer.tools.bench.steps import BenchmarkConfig, build_configs, format_markdown


def list_names(flags: str) -> list[str]:
    configs = build_configs(bench_cli.build_parser("steps").parse_args(flags.split()), "cpu")
    assert len(set(configs)) == len(configs)
    return [config.name for config in configs if config.mode == "full"]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (
            "--ranks 1,2 --ds-config zero0,zero2 --against hf",
            ["zero0 fp32", "zero2 fp32", "zero0 2 ranks fp32", "zero2 2 ranks fp32", "hf fp32"],
        ),
        (
            "--precision fp32,bf16 --execution auto,eager --against plain",
            ["zero0 fp32", "zero0 fp32 eager", "zero0 bf16", "zero0 bf16 eager", "plain fp32"],
        ),
        (
            "--without graphs,chunked-loss",
            ["zero0 fp32", "zero0 fp32 without graphs", "zero0 fp32 without chunked-loss"],
        ),
        ("--without chunked-loss", ["zero0 fp32", "zero0 fp32 without chunked-loss"]),
    ],
)
def test_bench_runs_this_trainer_first_then_without_a_path_then_the_others_on_one_rank(flags, names):
    expected = [name if name.startswith(("hf", "plain")) else f"ours {name}" for name in names]
    assert list_names(flags) == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--against nanogpt", "--against: nanogpt: expected some of plain, hf"),
        ("steps --ds-config zero9", "--ds-config: zero9: expected some of zero0"),
        ("--without speed", "--without: speed: expected some of chunked-loss"),
        ("--without packing --against hf", "--without packing: compares rows of many lengths"),
        ("--modes lara", "--modes: lara: expected some of full, lora"),
        ("--batches 3 --ranks 2", "--batches 3: does not divide over 2 ranks"),
        ("--batches 0", "--batches: 0: expected a whole number from 1"),
        ("speed", "speed: expected steps or memory"),
        ("memory --methods full,lara", "--methods: lara: expected some of full, full-adamw8bit"),
        ("memory --out x", "--out x: unknown flag"),
    ],
)
def test_a_wrong_bench_argument_is_one_line(argv, message):
    with pytest.raises(UserError) as caught:
        bench_cli.run(argv.split())
    assert str(caught.value).startswith(message)


CONFIGS = [BenchmarkConfig(program=program, mode="full", global_batch=2) for program in ("ours", "hf")]


def test_a_bench_of_several_rounds_compares_round_by_round_what_is_there_after_each_program(monkeypatch):
    """A machine that slows down for a round slows both."""
    facts = {"ran_by": "eager", "hardware": "h", "threads": 1, "tokens": 4.0, "flops": 1, "ceiling_flops": 1e9}
    facts |= {"peak_memory_bytes": 1, "device_memory": 0, "versions": {}}
    seconds = iter([1.0, 2.0, 7.0, 3.0, 12.0, 9.0])
    monkeypatch.setattr(steps, "run_job", lambda *_, **__: ([{**facts, "windows": [next(seconds)]}], [0], ""))
    configs, speeds = [*CONFIGS, BenchmarkConfig(program="ours", mode="lora", global_batch=2)], []
    ours, hf, lora = steps.run_rounds(configs, rounds=2, after_each=lambda rows: speeds.append(rows[1].get("speed")))
    assert (ours["rounds"], hf["rounds"]) == ([1.0, 3.0], [2.0, 12.0])
    assert speeds == [None, *[[0.5, 0.5, 0.5]] * 3, *[[0.375, 0.25, 0.5]] * 2]
    assert ours["speed"] == lora["speed"] == [1.0, 1.0, 1.0], "each mode has a baseline of its own"


def test_a_program_that_failed_says_so_in_its_line_and_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(steps, "run_job", lambda _, job, *__, **___: ([], [1], job["config"]["program"]))
    seen: list[list[str]] = []
    rows = steps.run_rounds(CONFIGS, rounds=2, after_each=lambda rows: seen.append([row["problem"] for row in rows]))
    assert seen == [["failed: ours", "not measured"], ["failed: ours", "failed: hf"]]
    cells = [cell.strip() for cell in format_markdown(rows, 2).splitlines()[-1].split("|")]
    assert cells[1:5] == ["full", "2", "hf fp32", "failed: hf"]
    assert len(cells) == 2 + len(steps.HEADINGS)


def test_a_tiny_bench_call_measures_this_trainer_a_plain_loop_and_hugging_face(
    tmp_path, capsys, fast_python, monkeypatch
):
    monkeypatch.setattr(sys, "executable", fast_python)
    flags = "--model demo-base --block-size 16 --modes lora --batches 2 --against plain,hf --without chunked-loss"
    flags += f" --windows 2 --window 2 --warmup 1 --rounds 1 --device cpu --output-dir {tmp_path}"
    assert bench_cli.run(flags.split()) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "ours zero0 fp32",
        "ours zero0 fp32 without chunked-loss",
        "plain fp32",
        "hf fp32",
    ]
    for row in rows:
        assert len(row["results"][0]["windows"]) == 2
        assert row["tokens_per_second"] == pytest.approx(32 / row["step"])
        assert 0 < row["flop_share"] < 2
        assert row["peak_memory"] > 2**26
    assert "whole logits" in rows[1]["ran_by"] or "logits" in rows[1]["ran_by"], "the path was really off"
    assert " ours zero0 fp32 (eager) " in (tmp_path / "bench.md").read_text()
    assert "round 1/1" in capsys.readouterr().out


def test_every_method_of_bench_memory_is_accepted_by_train():
    for flags in bench_cli.METHODS.values():
        assert cli.parse_args(flags.split()).settings.mode == flags.split()[1]


def test_bench_memory_measures_a_method_and_prints_a_row(capsys, fast_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", fast_python)
    assert bench_cli.run(["memory", "--steps", "8", "--methods", "lora-nf4"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.err.splitlines()[-1].removeprefix("lora-nf4: ").replace("'", '"'))
    width = 64
    assert result["trainable"] == 2 * 8 * (4 + 2 + 5 + 5) * width
    assert 8 * result["trainable"] <= result["optimizer_bytes"] <= 8 * result["trainable"] + 1000
    assert result["checkpoint_bytes"] > 12 * result["trainable"]
    assert result["loss"] < result["loss_before"]
    assert result["tokens_per_second"] > 0
    assert "thread" in result["device"], "a table names its hardware"
    cells = format_cells(result)
    assert cells[0] == f"{result['trainable']:,}"
    assert len(cells) == len(HEADINGS) - 1
    assert re.search(r"\| lora-nf4 +\| +" + r" \| +".join(map(re.escape, cells)) + " ", printed.out)
