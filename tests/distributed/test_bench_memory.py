"""The benchmark's measurement of one method, on the tiny shape."""

import json
import subprocess
import sys
from pathlib import Path

from trainer.config import cli
from trainer.tools.bench.methods import HEADINGS, METHODS, format_cells

ROOT = Path(__file__).parents[2]


def test_every_method_of_bench_memory_is_accepted_by_train():
    for flags in METHODS.values():
        assert cli.parse_args(flags.split()).settings.mode == flags.split()[1]


def test_bench_memory_measures_a_method_and_prints_a_row():
    command = [sys.executable, "launch/bench.py", "memory", "--steps", "8", "--methods", "lora-nf4"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stderr.splitlines()[-1].removeprefix("lora-nf4: ").replace("'", '"'))
    width = 64
    assert result["trainable"] == 2 * 8 * (4 + 2 + 5 + 5) * width
    assert 8 * result["trainable"] <= result["optimizer_bytes"] <= 8 * result["trainable"] + 1000
    assert result["checkpoint_bytes"] > 12 * result["trainable"]
    assert result["loss"] < result["loss_before"]
    assert result["tokens_per_second"] > 0
    assert "thread" in result["device"], "a table names its hardware"
    cells = format_cells(result)
    assert cells[0] == f"{result['trainable']:,}"
    assert len(cells) == len(HEADINGS)
    assert "| lora-nf4 | " + " | ".join(cells) + " |" in process.stdout


def test_bench_data_prints_a_row_for_each_size():
    command = [sys.executable, "launch/bench.py", "data", "--megabytes", "1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith("| 1 MB | ")
