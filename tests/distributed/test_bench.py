"""The benchmark measures what it says: its programs, its formulas, its tables, and a tiny call of both measurements."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from trainer.config import cli
from trainer.tools.bench import steps
from trainer.tools.bench.memory import HEADINGS, format_cells

LAUNCH = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "bench.py"))
bench = LAUNCH["main"]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (
            "--ranks 1,2 --ds-config zero0,zero2 --against hf",
            ["ours zero0 fp32", "ours zero2 fp32", "ours zero0 2 ranks fp32", "ours zero2 2 ranks fp32", "hf fp32"],
        ),
        (
            "--precision fp32,bf16 --execution auto,eager --against plain",
            ["ours zero0 fp32", "ours zero0 fp32 eager", "ours zero0 bf16", "ours zero0 bf16 eager", "plain fp32"],
        ),
        (
            "--without graphs,packing",
            ["ours zero0 fp32 packed", "ours zero0 fp32 packed without graphs", "ours zero0 fp32 without packing"],
        ),
    ],
)
def test_bench_runs_this_trainer_first_then_without_a_path_then_the_others_on_one_rank(flags, names):
    rows = steps.build_rows(LAUNCH["build_parser"]("steps").parse_args(flags.split()), "cpu")
    assert [row["name"] for row in rows] == [*names, *names], "of both modes"
    assert [row["mode"] for row in rows] == ["full"] * len(names) + ["lora"] * len(names)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--against nanogpt", "--against: nanogpt: expected some of plain, hf"),
        ("steps --ds-config zero9", "--ds-config: zero9: expected some of zero0"),
        ("--without speed", "--without: speed: expected some of chunked-loss"),
        ("--without packing --against hf", "--without packing: compares rows of many lengths"),
        ("--modes ,", "--modes: ',': expected some of full, lora"),
        ("--batches 3 --ranks 2", "--batches 3: does not divide over 2 ranks"),
        ("--batches 0", "--batches: 0: expected a whole number from 1"),
        ("--dropout nan", "--dropout: nan: expected a number from 0 to 1"),
        ("speed", "speed: expected steps or memory"),
        ("memory --methods full,lara", "--methods: lara: expected some of full, full-adamw8bit"),
        ("memory --out x", "--out x: unknown flag"),
    ],
)
def test_a_wrong_bench_argument_is_one_line(argv, message, capsys):
    assert bench(argv.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_rounds_are_compared_one_by_one_and_what_failed_says_so_and_is_not_tried_again(monkeypatch, tmp_path, capsys):
    """A machine that slows down for a round slows both; each mode has a baseline of its own."""
    facts = {"ran_by": "eager", "hardware": "h", "threads": 1, "tokens": 4.0, "flops": 1, "ceiling_flops": 1e9}
    facts |= {"peak_memory_bytes": 1, "versions": {}}
    seconds = {("ours", "full"): [1.0, 3.0], ("hf", "full"): [2.0, 12.0], ("ours", "lora"): [7.0, 9.0]}
    speeds = []

    def run_job(_, job, *__, **___):
        speeds.append(json.loads((tmp_path / "bench.json").read_text())["rows"][1].get("speed"))
        times = seconds.get((job["program"], job["mode"]))
        return ([{**facts, "windows": [times.pop(0)]}], [0], "") if times else ([], [1], "no hf for lora")

    monkeypatch.setattr(steps, "run_job", run_job)
    assert bench(f"--against hf --rounds 2 --device cpu --output-dir {tmp_path}".split()) == 1
    ours, hf, lora, failed = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert (ours["rounds"], hf["rounds"]) == ([1.0, 3.0], [2.0, 12.0])
    assert speeds == [None, None, *[[0.5, 0.5, 0.5]] * 4, [0.375, 0.25, 0.5]]
    assert ours["speed"] == lora["speed"] == [1.0, 1.0, 1.0]
    assert len([line for line in capsys.readouterr().out.splitlines() if "failed: no hf for lora" in line]) == 2
    line = next(line for line in (tmp_path / "bench.md").read_text().splitlines() if "no hf" in line)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[1:5] == ["lora", "2", "hf fp32", failed["problem"]]
    assert len(cells) == 2 + len(steps.HEADINGS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bench.json", '{"mine": 1}', "bench.json there was not written by this program; name another"),
        ("bench.md", "mine", "bench.md there was not written by this program; name another"),
        ("", "", "is not a folder; name another one"),
    ],
)
def test_bench_replaces_no_file_of_somebody_else(name, content, message, tmp_path, capsys):
    folder = tmp_path if name else tmp_path / "file" / "folder"
    (tmp_path / (name or "file")).write_text(content)
    assert bench(["--device", "cpu", "--output-dir", str(folder)]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(f"error: --output-dir:? {folder}: .*{message}.*\n", line), line
    assert (tmp_path / (name or "file")).read_text() == content


def test_a_tiny_bench_call_measures_this_trainer_a_plain_loop_and_hugging_face(
    tmp_path, capsys, fast_python, monkeypatch
):
    monkeypatch.setattr(sys, "executable", fast_python)
    flags = "--model demo-base --block-size 16 --modes lora --batches 2 --against plain,hf --without chunked-loss"
    flags += f" --windows 2 --window 2 --warmup 1 --rounds 1 --device cpu --output-dir {tmp_path}"
    assert bench(flags.split()) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert len(rows) == 4
    for row in rows:
        assert len(row["results"][0]["windows"]) == 2
        assert row["tokens_per_second"] == pytest.approx(32 / row["step"])
        assert 0 < row["flop_share"] < 2
        assert row["peak_memory"] > 2**26
    assert "logits" in rows[1]["ran_by"], "the path was really off"
    assert " ours zero0 fp32 (eager) " in (tmp_path / "bench.md").read_text()
    assert "round 1/1" in capsys.readouterr().out


def test_bench_memory_measures_a_method_and_prints_a_row(capsys, fast_python, monkeypatch):
    for flags in LAUNCH["METHODS"].values():
        assert cli.parse_args(flags.split()).settings.mode == flags.split()[1]
    monkeypatch.setattr(sys, "executable", fast_python)
    assert bench(["memory", "--steps", "8", "--methods", "lora-nf4"]) == 0
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
    assert len(cells) == len(HEADINGS) - 1
    assert re.search(r"\| lora-nf4 +\| +" + r" \| +".join(map(re.escape, cells)) + " ", printed.out)
