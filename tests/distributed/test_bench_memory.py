"""The benchmark's measurements of one way, on the tiny shape."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

from helpers.launch_ranks import run_on_ranks

from trainer.config import cli


def load_bench_script() -> ModuleType:
    path = Path(__file__).parents[2] / "launch" / "bench_memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_method(method: str, folder: str) -> int:
    module = load_bench_script()
    options: argparse.Namespace = module.build_parser().parse_args(["--steps", "8"])
    (Path(folder) / "scratch").mkdir(parents=True)
    result = module.measure(module.METHODS[method], options, Path(folder) / "scratch")
    (Path(folder) / "found.json").write_text(json.dumps(result))
    return 0


def test_every_method_of_bench_memory_is_accepted_by_train():
    for way in load_bench_script().METHODS.values():
        assert cli.parse_args(way.split()).settings.mode == way.split()[1]


def test_an_unknown_method_of_bench_memory_is_refused_before_any_is_measured(capsys):
    assert load_bench_script().main(["--ways", "full;lara"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: --ways lara: expected some of full; full, adamw8bit")
    assert (said.err.count("\n"), said.out) == (1, "")


def test_bench_memory_measures_a_method_and_prints_a_row(tmp_path):
    log = tmp_path / "log"
    assert run_on_ranks(1, measure_method, "nf4 + lora", str(tmp_path), log=log) == 0, log.read_text()[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    width = 64
    assert found["trainable"] == 2 * 8 * (4 + 2 + 5 + 5) * width
    assert 8 * found["trainable"] <= found["optimizer_bytes"] <= 8 * found["trainable"] + 1000
    assert found["checkpoint_bytes"] > 12 * found["trainable"]
    assert found["loss"] < found["before"]
    assert found["tokens_per_second"] > 0
    assert "thread" in found["device"], "a table names its hardware"
    row = load_bench_script().format_cells(found)
    assert row[0] == f"{found['trainable']:,}"
    assert len(row) == len(load_bench_script().COLUMNS)
