"""Every adapter on every base with every optimizer: it learns, resumes bitwise, and its export is what was trained.

The default run takes each adapter, each packing and each optimizer once; all their combinations are in the sweep.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import on_cells, read_cell, run_cells
from conftest import TEMPLATES, make_tiny
from methods import STOP, prove, read_proof
from ranks import on_ranks
from test_export import STRICT
from test_invariance import LOSS

from trainer.config import cli
from trainer.config.schema import DS_NAMES
from trainer.data.dataset import prepare
from trainer.export.verify import LOGITS_BOUND

STEPS = 5
AT_ONCE = 4  # jobs of one group of ranks: each runs, resumes and is exported
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
    return str(prepare(cli.read(words).settings.data, model=wide, global_batch=6).folder)


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
    for start in range(0, len(jobs), AT_ONCE):
        on_cells(1, jobs[start : start + AT_ONCE], out / "log", prove)
    for one in jobs:
        holds(out, one["name"])


def test_each_method_learns_resumes_bitwise_and_exports_what_was_trained(words, prepared, tmp_path):
    all_hold(tmp_path, prepared, words, LATIN)
    other = job(tmp_path, prepared, words, "other", "--optim", "adamw") | {"resume": ["lora-None-adamw8bit", STOP]}
    assert on_ranks(1, run_cells, [other], log=tmp_path / "other.log") == 1
    assert "the checkpoint holds the moments of another kind of --optim" in (tmp_path / "other.log").read_text()


# --- on several ranks, under every ZeRO stage ---

WAYS = {
    "plus": "--lora-plus-ratio 8 --train-also wte,layernorm,bias",
    "packed": "--quant nf4 --quant-double --adapter rslora --checkpoint-activations --train-also wte,layernorm",
    "dora": "--adapter dora --lora-dropout 0.1",
    "int8": "--quant int8 --adapter rslora --checkpoint-activations --train-also lm_head",
    "again": "--checkpoint-activations --adapter pissa --train-also lm_head --lora-dropout 0.1",
    "codes": "--optim adamw8bit --lora-plus-ratio 8 --train-also wte",
}
CODES = 1e-4
FIRST = [("plus", "zero2"), ("plus", "strict"), ("packed", "strict"), ("codes", "zero0")]


def ways_hold(out: Path, prepared: str, words: list[str], strict: str, chosen: list[tuple[str, str]]) -> None:
    """Every promise of `holds`, and the same losses under each ZeRO file within the bounds of test_invariance.py.

    Layers in int8 round what goes into them to 8 bits too: there a last bit can turn into another code.
    """
    more = {z: ["--micro-batch", "1", "--ds-config", strict if z == "strict" else z] for _, z in chosen}
    jobs = [job(out, prepared, words, f"{way}-{zero}", *WAYS[way].split(), *more[zero]) for way, zero in chosen]
    for start in range(0, len(jobs), AT_ONCE):
        on_cells(2, jobs[start : start + AT_ONCE], out / "log", prove)
    for way, zero in chosen:
        holds(out, f"{way}-{zero}")
        losses, first = (
            [row["loss"] for row in read_proof(out, name)[0] if "loss" in row]
            for name in (f"{way}-{zero}", next(f"{w}-{z}" for w, z in chosen if w == way))
        )
        assert losses == pytest.approx(first, rel=CODES if way == "int8" else LOSS), (way, zero)


@pytest.fixture(scope="module")
def strict(shelf: Path) -> str:
    """ZeRO 3 with every weight divided, also right after a step: nothing is right because it is still whole."""
    path = shelf / "strict-methods.json"
    path.write_text(json.dumps({"zero_optimization": STRICT}))
    return str(path)


def test_two_ranks_and_every_stage_hold_the_same_promises(words, prepared, strict, tmp_path):
    ways_hold(tmp_path, prepared, words, strict, FIRST)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", sorted(WAYS))
def test_every_way_under_every_stage(way, words, prepared, strict, tmp_path):
    refused = {"int8": ("zero3", "zero3_offload", "strict"), "codes": (*DS_NAMES[1:], "strict")}.get(way, ())
    ways_hold(tmp_path, prepared, words, strict, [(way, z) for z in (*DS_NAMES, "strict") if z not in refused])


def test_lora_plus_moves_only_the_b_matrices_faster(words, prepared, tmp_path):
    """The first update of AdamW is lr * sign(gradient), and B begins at zero: the ratio is read off the weights."""
    jobs = [
        job(tmp_path, prepared, words, name, "--max-steps", "1", "--clip", "0", "--lora-plus-ratio", ratio, *zero)
        for name, ratio, zero in (("one", "1", ()), ("eight", "8", ()), ("eight-zero2", "8", ("--ds-config", "zero2")))
    ]
    on_cells(1, jobs, tmp_path / "log")
    (_, one), (_, eight), (_, divided) = (read_cell(tmp_path, each["name"]) for each in jobs)
    for name, weight in one.items():
        assert np.allclose(eight[name], weight * 8 if ".lora_B." in name else weight, rtol=1e-5), name
        assert np.allclose(divided[name], eight[name], rtol=1e-6), name
    assert any(".lora_B." in name and weight.any() for name, weight in one.items())


# --- all combinations ---


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optim", OPTIMS)
def test_every_combination(optim, words, prepared, tmp_path):
    refused = {("pissa", "nf4"), ("pissa", "fp4"), ("pissa", "int8"), ("dora", "int8")}
    methods = [(a, q, optim) for a, q in itertools.product(ADAPTERS, QUANTS) if (a, q) not in refused]
    all_hold(tmp_path, prepared, words, methods)
