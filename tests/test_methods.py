"""Every adapter on every base with every optimizer: it learns, resumes bitwise, and its export is what was trained.

The default run takes each adapter, each packing and each optimizer once; all their combinations are in the sweep.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
from cells import on_cells
from conftest import TEMPLATES, make_tiny
from methods import STOP, prove, read_proof

from trainer import flags
from trainer.data import prepare
from trainer.export.check import LOGITS_BOUND

STEPS = 5
ADAPTERS = ("lora", "dora", "rslora", "pissa")
QUANTS = (None, "nf4", "fp4", "int8")
OPTIMS = ("adamw_fused", "adamw", "adamw8bit", "paged_adamw8bit")
RANK = 16  # with layers of 64 and 256: A and B of c_fc and c_proj have 4,096 elements, which 8-bit optimizers pack
LATIN = [("lora", None, "adamw8bit"), ("dora", "nf4", "adamw"), ("rslora", "int8", "adamw_fused"),
         ("pissa", None, "paged_adamw8bit"), ("lora", "fp4", "adamw_fused"), ("dora", None, "adamw_fused")]  # fmt: skip


@pytest.fixture(scope="module")
def wide(tiny: str, shelf: Path) -> str:
    """The tiny model four times as wide."""
    return make_tiny(shelf / "wide", dropout=0.0, width=64)


@pytest.fixture(scope="module")
def words(wide: str, records: tuple[str, str]) -> list[str]:
    text = f"--mode lora --model {wide} --data {records[0]} --val-data {records[1]} --block-size 16"
    text += f" --lr 0.003 --lora-rank {RANK}"
    text += f" --global-batch 6 --eval-batch 4 --max-steps {STEPS} --eval-every 2 --save-every 1 --keep 99"
    return [*text.split(), *TEMPLATES]


@pytest.fixture(scope="module")
def prepared(words: list[str], wide: str) -> str:
    return str(prepare(flags.read(words).settings.data, model=wide, global_batch=6).folder)


def job(out: Path, prepared: str, words: list[str], name: str, *more: str) -> dict[str, Any]:
    return {"name": name, "flags": [*words, *more], "data": prepared, "out": str(out)}


def method(adapter: str, quant: str | None, optim: str) -> list[str]:
    return ["--adapter", adapter, "--optim", optim, *(["--quant", quant] if quant else [])]


def holds(out: Path, name: str) -> dict[str, Any]:
    """Assert the three promises of one run; returns its facts."""
    rows, again, same, facts = read_proof(out, name)
    evals = [row["loss"] for row in rows if row["kind"] == "eval"]
    assert evals[-1] < evals[0], (name, evals)
    clock = ("time", "tokens_per_second")
    lasting = [{k: v for k, v in row.items() if k not in clock} for row in rows if row["step"] > STOP]
    assert [{k: v for k, v in row.items() if k not in clock} for row in again if row["step"] > STOP] == lasting, name
    assert same, f"{name}: weights differ after a resume"
    assert facts["trained_loss"] == facts["recorded"], name
    assert facts["logits_difference"] <= LOGITS_BOUND * max(1.0, facts["largest"]), (name, facts["logits_difference"])
    assert facts["loss"] == pytest.approx(facts["recorded"], rel=1e-6), name
    assert facts["tied"] == facts["tied_here"]
    assert facts["tied"]
    assert facts["stored_dtypes"] == ["F32"]
    print(f"{name}: {evals[0]:.4f} -> {evals[-1]:.4f}, logits differ by {facts['logits_difference']:.1e}, "
          f"{facts['optimizer_bytes']} bytes of state")  # fmt: skip
    return facts


def all_hold(out: Path, prepared: str, words: list[str], methods: list[tuple[str, str | None, str]]) -> None:
    jobs = [job(out, prepared, words, "-".join(map(str, m)), *method(*m)) for m in methods]
    on_cells(1, jobs, out / "log", prove)
    for one in jobs:
        holds(out, one["name"])


def test_each_method_learns_resumes_bitwise_and_exports_what_was_trained(words, prepared, tmp_path):
    all_hold(tmp_path, prepared, words, LATIN)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optim", OPTIMS)
def test_every_combination(optim, words, prepared, tmp_path):
    methods = [
        (a, q, optim)
        for a, q in itertools.product(ADAPTERS, QUANTS)
        if not ((a == "pissa" and q) or (a == "dora" and q == "int8"))
    ]
    all_hold(tmp_path, prepared, words, methods)
