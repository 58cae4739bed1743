"""The benchmark measures what it says: its table, and a tiny call of both measurements."""

import re
import runpy
from pathlib import Path

import pytest
from helpers.launch_ranks import make_process

from trainer.config import cli
from trainer.tools import bench

LAUNCH = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "bench.py"))
main = LAUNCH["main"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--against nanogpt", "--against nanogpt: expected some of plain, hf"),
        ("--without packing --against hf", "--without packing: compares rows of many lengths"),
        ("memory --methods full,lara", "--methods full,lara: expected some of full, full-adamw8bit"),
        ("--model missing", "--model missing: no such folder"),
        ("memory --model missing", "--model missing: no such folder"),
        ("--model demo-base --block-size 5000", "--block-size 5000: demo-base takes at most"),
    ],
)
def test_a_wrong_bench_argument_is_one_line(argv, message, capsys):
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def read_table(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith(("| full", "| lora"))]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_rounds_are_compared_one_by_one_and_what_failed_says_so_and_is_not_tried_again(monkeypatch, capsys):
    """A machine that slows down for a round slows both; each mode has a baseline of its own."""
    facts = {"ran_by": "eager", "hardware": "h", "threads": 1, "tokens": 4.0, "peak_memory_bytes": 1, "versions": {}}
    seconds = {("ours", "full"): [1.0, 3.0], ("hf", "full"): [2.0, 12.0], ("ours", "lora"): [7.0, 9.0]}

    def run_job(_, job, *__, **___):
        times = seconds.get((job["program"], job["mode"]))
        return ([{**facts, "step_seconds": times.pop(0)}], [0], "") if times else ([], [1], "no hf for lora")

    monkeypatch.setattr(bench, "run_job", run_job)
    assert main(["--against", "hf", "--rounds", "2"]) == 1
    output = capsys.readouterr().out
    assert len([line for line in output.splitlines() if line.endswith("lora hf: failed: no hf for lora")]) == 1
    ours, hf, lora, failed = read_table(output)
    assert (hf[:3], hf[4]) == (["full", "hf (eager)", "7000.0"], "0.38 (0.25-0.50)")
    assert ours[4] == lora[4] == "1.00 (1.00-1.00)"
    assert failed[:3] == ["lora", "hf", "failed: no hf for lora"]


@pytest.fixture(autouse=True, scope="module")
def server() -> None:
    """The server from which this process forks all others, with what tests need."""
    make_process(target=print, args=())


def test_a_tiny_bench_call_measures_this_trainer_a_plain_loop_and_hugging_face(capsys):
    flags = "--model demo-base --block-size 16 --modes lora --against plain,hf --without chunked-loss"
    assert main(f"{flags} --steps 2 --rounds 1".split()) == 0
    output = capsys.readouterr().out
    rows = read_table(output)
    names = ["ours (eager)", "ours without chunked-loss (eager; ", "plain", "hf"]
    assert [row[1][: len(name)] for row, name in zip(rows, names, strict=True)] == names
    assert "logits" in rows[1][1], "the path was really off"
    for row in rows:
        assert float(row[3].replace(",", "")) == pytest.approx(32 / float(row[2]) * 1000, rel=0.1)
        assert float(row[5]) > 0.06
    assert "demo-base, 2 rows of 16 tokens, fp32, " in output


def test_bench_memory_measures_a_method_and_prints_a_row(capsys, monkeypatch):
    for flags in LAUNCH["METHODS"].values():
        assert cli.parse_args(flags.split()).settings.mode == flags.split()[1]
    results, run_job = [], bench.run_job
    monkeypatch.setattr(bench, "run_job", lambda *job: results.append(run_job(*job)) or results[-1])
    flags = "memory --model demo-base --block-size 16 --steps 2 --methods lora-nf4"
    assert main(flags.split()) == 0
    result = results[0][0][0]
    assert result["trainable"] == 102_400
    assert 8 * result["trainable"] <= result["optimizer_bytes"] <= 8 * result["trainable"] + 1000
    assert result["checkpoint_bytes"] > 12 * result["trainable"]
    output = capsys.readouterr().out
    assert re.search(r"\| lora-nf4 +\| +102,400 \| +0.8 \|", output)
    assert "demo-base, 2 rows of 16 tokens, fp32, " in output, "a table names its workload and hardware"
