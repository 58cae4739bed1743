"""The benchmark's measurements, on the tiny shape, in one process for each way."""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from ranks import on_ranks


def bench() -> ModuleType:
    path = Path(__file__).parent.parent / "launch" / "bench_memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure(way: str, folder: str) -> int:
    module = bench()
    options: argparse.Namespace = module.parser().parse_args(["--steps", "8"])
    (Path(folder) / "scratch").mkdir(parents=True)
    found = module.measure(module.WAYS[way], options, Path(folder) / "scratch")
    (Path(folder) / "found.json").write_text(json.dumps(found))
    return 0


def test_a_way_is_measured_whole_and_told_in_a_row(tmp_path):
    found: dict[str, dict[str, Any]] = {}
    for way in ("full", "nf4 + lora"):
        log = tmp_path / "log"
        assert on_ranks(1, measure, way, str(tmp_path / way), log=log) == 0, log.read_text()[-3000:]
        found[way] = json.loads((tmp_path / way / "found.json").read_text())
    full, packed = found["full"], found["nf4 + lora"]
    width, words = 64, 512
    assert full["trainable"] == (words + 128) * width + 2 * (12 * width**2 + 13 * width) + 2 * width
    assert packed["trainable"] == 2 * 8 * (4 + 2 + 5 + 5) * width
    for one in found.values():
        assert 8 * one["trainable"] <= one["optimizer_bytes"] <= 8 * one["trainable"] + 1000
        assert one["checkpoint_bytes"] > 12 * one["trainable"]
        assert one["loss"] < one["before"]
        assert one["tokens_per_second"] > 0
    row = bench().told(full)
    assert row[0] == f"{full['trainable']:,}"
    assert len(row) == len(bench().COLUMNS)
