"""The benchmark's measurement of one method, on the tiny shape."""

import json
import sys

from trainer.config import cli
from trainer.tools.bench import bench_cli
from trainer.tools.bench.configs import METHODS
from trainer.tools.bench.methods import HEADINGS, format_cells


def test_every_method_of_bench_memory_is_accepted_by_train():
    for flags in METHODS.values():
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
    assert "| lora-nf4 | " + " | ".join(cells) + " |" in printed.out


def test_bench_data_prints_a_row_for_each_size(capsys, fast_python, monkeypatch):
    monkeypatch.setattr(sys, "executable", fast_python)
    assert bench_cli.run(["data", "--megabytes", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 1 MB | ")
