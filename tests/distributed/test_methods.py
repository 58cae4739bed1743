"""Every adapter on every base with every optimizer: it learns, resumes bitwise, and its export is what was trained.

The default run takes each adapter, each packing and each optimizer once; all their combinations are in the sweep.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers.launch_ranks import run_on_ranks
from helpers.matrix import launch_jobs, make_job, read_job_result, run_jobs
from helpers.method_matrix import STOP_STEP, assert_promises, launch_whole_and_resumed
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv
from helpers.tolerances import INT8_TOLERANCE, LOSS_TOLERANCE

from trainer.config.choices import DS_CONFIG_NAMES

STEPS = 4
ADAPTERS = ("lora", "dora", "rslora", "pissa")
QUANTS = (None, "nf4", "fp4", "int8")
OPTIMS = ("adamw_fused", "adamw", "adamw8bit", "paged_adamw8bit")
LORA_RANK = 16  # with layers of 64 and 256: A and B of c_fc and c_proj have 4,096 elements, which 8-bit optimizers pack
EACH_ONCE = [
    ("lora", "fp4", "adamw8bit"),
    ("dora", "nf4", "adamw"),
    ("rslora", "int8", "adamw_fused"),
    ("pissa", None, "paged_adamw8bit"),
]


@pytest.fixture(scope="module")
def wide_model(session_dir: Path) -> str:
    """The tiny model four times as wide."""
    return make_tiny_gpt2(session_dir / "wide", dropout=0.0, hidden_size=64)


@pytest.fixture(scope="module")
def argv(wide_model: str, data_files: tuple[str, str]) -> list[str]:
    text = f"--mode lora --block-size 16 --lr 0.003 --lora-rank {LORA_RANK} --global-batch 6 --eval-batch 4"
    text += f" --max-steps {STEPS} --eval-every 2 --save-every 1 --save-total-limit 99"
    return tiny_argv(wide_model, data_files, text)


def method_flags(adapter: str, quant: str | None, optim: str) -> list[str]:
    return ["--adapter", adapter, "--optim", optim, *(["--quant", quant] if quant else [])]


def assert_all_promises(out: Path, argv: list[str], methods: list[tuple[str, str | None, str]]) -> None:
    jobs = [make_job(out, "-".join(map(str, m)), [*argv, *method_flags(*m)]) for m in methods]
    launch_whole_and_resumed(1, jobs)
    for job in jobs:
        assert_promises(job)


def test_each_method_learns_resumes_bitwise_and_exports_what_was_trained(argv, tmp_path):
    assert_all_promises(tmp_path, argv, EACH_ONCE)
    flags, source = [*argv, "--optim", "adamw", "--quant", "fp4"], ["lora-fp4-adamw8bit", STOP_STEP]
    other = make_job(tmp_path, "other", flags, resume=source)
    assert run_on_ranks(1, run_jobs, [other], log=tmp_path / "other.log") == 1
    assert "the checkpoint holds the moments of another kind of --optim" in (tmp_path / "other.log").read_text()


# --- on several ranks, under every ZeRO stage ---

METHOD_FLAGS = {
    "plus": "--lora-plus-ratio 8 --modules-to-save wte,layernorm,bias",
    "packed": "--quant nf4 --quant-double --adapter rslora --activation-checkpointing --modules-to-save wte,layernorm",
    "dora": "--adapter dora --lora-dropout 0.1",
    "int8": "--quant int8 --adapter rslora --activation-checkpointing --modules-to-save lm_head",
    "again": "--activation-checkpointing --adapter pissa --modules-to-save lm_head --lora-dropout 0.1",
    "codes": "--optim adamw8bit --lora-plus-ratio 8 --modules-to-save wte",
}
SAMPLE_METHODS = [("plus", "zero2"), ("plus", "strict"), ("packed", "strict")]


def assert_methods_agree(
    out: Path, argv: list[str], strict_zero_files: dict[str, str], cases: list[tuple[str, str]]
) -> None:
    """Every promise, and the same losses under each ZeRO file within the bounds of test_invariance.py.

    Layers in int8 round what goes into them to 8 bits too: there a last bit can turn into another code.
    """
    jobs = []
    for method, zero in cases:
        zero_flags = ["--micro-batch", "1", "--ds-config", strict_zero_files["zero3"] if zero == "strict" else zero]
        flags = [*argv, *METHOD_FLAGS[method].split(), *zero_flags]
        jobs.append(make_job(out, f"{method}-{zero}", flags))
    launch_whole_and_resumed(2, jobs)
    first_losses: dict[str, list[float]] = {}
    for (method, _), job in zip(cases, jobs, strict=True):
        assert_promises(job)
        losses = [row["loss"] for row in read_job_result(out, job["name"])[0] if "loss" in row]
        tolerance = INT8_TOLERANCE if method == "int8" else LOSS_TOLERANCE
        assert losses == pytest.approx(first_losses.setdefault(method, losses), rel=tolerance), job["name"]


def test_methods_on_two_ranks_learn_resume_and_export_under_zero(argv, strict_zero_files, tmp_path):
    assert_methods_agree(tmp_path, argv, strict_zero_files, SAMPLE_METHODS)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", sorted(METHOD_FLAGS))
def test_every_method_learns_resumes_and_exports_under_every_zero_stage(method, argv, strict_zero_files, tmp_path):
    refused = {"int8": ("zero3", "zero3_offload", "strict"), "codes": (*DS_CONFIG_NAMES[1:], "strict")}.get(method, ())
    cases = [(method, zero) for zero in (*DS_CONFIG_NAMES, "strict") if zero not in refused]
    assert_methods_agree(tmp_path, argv, strict_zero_files, cases)


def test_lora_plus_moves_only_the_b_matrices_faster(argv, tmp_path):
    """The first update of AdamW is lr * sign(gradient), and B begins at zero: the ratio is read off the weights."""
    flags = [*argv, "--max-steps", "1", "--max-grad-norm", "0", "--lora-plus-ratio"]
    jobs = [
        make_job(tmp_path, name, [*flags, *more])
        for name, more in (("one", ["1"]), ("eight", ["8"]), ("divided", ["8", "--ds-config", "zero2"]))
    ]
    launch_jobs(1, jobs)
    ratio_one, eight, divided = (read_job_result(tmp_path, job["name"])[1] for job in jobs)
    for name, weight in ratio_one.items():
        assert np.allclose(eight[name], weight * 8 if ".lora_B." in name else weight, rtol=1e-5), name
        assert np.allclose(divided[name], eight[name], rtol=1e-6), name
    assert any(".lora_B." in name and weight.any() for name, weight in ratio_one.items())


# --- all combinations ---


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optim", OPTIMS)
def test_every_combination_of_adapter_quantization_and_optimizer_keeps_the_promises(optim, argv, tmp_path):
    refused = {("pissa", "nf4"), ("pissa", "fp4"), ("pissa", "int8"), ("dora", "int8")}
    methods = [(a, q, optim) for a, q in itertools.product(ADAPTERS, QUANTS) if (a, q) not in refused]
    assert_all_promises(tmp_path, argv, methods)
