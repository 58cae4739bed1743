"""A base whose file is in bfloat16 stays there until ZeRO 3 divides it, or it is packed: the same numbers, with a
fraction of the memory."""

import ctypes
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engines import joined_ranks, start_engine
from helpers.launch_ranks import run_on_ranks
from helpers.matrix import RunDifference, launch_jobs, make_argv, make_job, read_job_result
from helpers.process_groups import reproducible_records
from helpers.tiny_inputs import make_tiny_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.distributed import engine

MODES = {
    "full": "--mode full",
    "lora": "--mode lora",
    "pissa": "--mode lora --adapter pissa",
    "nf4": "--mode lora --quant nf4",
}


def store(model: str, folder: Path, dtype: str) -> str:
    """The model with its tokenizer, its weights rounded to bfloat16 and stored in a type."""
    causal = AutoModelForCausalLM.from_pretrained(model).bfloat16()
    getattr(causal, dtype)().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def results(tiny_model, data_files, strict_zero_files, tmp_path_factory) -> Path:
    """Runs of each method on both files of the same weights, under ZeRO 0 and 3, on two ranks."""
    out = tmp_path_factory.mktemp("stored")
    jobs = []
    for dtype in ("bfloat16", "float"):
        model = store(tiny_model, out / f"model-{dtype}", dtype)
        for (name, flags), zero in ((mode, zero) for mode in MODES.items() for zero in ("zero0", "zero3")):
            file = "zero0" if zero == "zero0" else strict_zero_files["zero3"]
            argv = [*make_argv(model, data_files, "full", "completion"), *flags.split(), "--ds-config", file]
            jobs.append(make_job(out, f"{name}-{zero}-{dtype}", argv))
    launch_jobs(2, jobs)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_a_base_in_bfloat16_trains_as_the_same_weights_in_float32_and_alike_under_zero_0_and_3(mode, results):
    runs = {}
    for zero in ("zero0", "zero3"):
        (rows, weights), (others, other_weights) = (
            read_job_result(results, f"{mode}-{zero}-{dtype}") for dtype in ("bfloat16", "float")
        )
        assert reproducible_records(rows) == reproducible_records(others), zero
        assert all(np.array_equal(weights[name], other_weights[name]) for name in weights), zero
        runs[zero] = rows, weights
        facts = [
            json.loads((results / f"{mode}-{zero}-{dtype}" / "run.json").read_text())["model"]
            for dtype in ("bfloat16", "float")
        ]
        assert facts[0]["fingerprint"] == facts[1]["fingerprint"]
    difference = RunDifference.between(runs["zero0"], runs["zero3"])
    assert difference.is_rounding(lr_ratio=4), difference


def measure_growth(warm_up: dict[str, Any], job: dict[str, Any]) -> int:
    """On a rank: out/growth-RANK: by how many bytes the memory that is this process's alone grew while its engine
    was made."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    with joined_ranks() as context:
        engine.tune_malloc = lambda: None  # what tensors need, not what the C library keeps of it:
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
        start_engine(warm_up, context)  # what libraries take once
        before, peak, is_done = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not is_done.wait(0.001):
                peak = max(peak, resident())

        thread = threading.Thread(target=watch)
        thread.start()
        start_engine(job, context)
        is_done.set()
        thread.join()
        (Path(job["out"]) / f"growth-{context.rank}").write_text(str(peak - before))
    return 0


def test_two_ranks_under_zero_3_need_the_memory_of_their_shares_and_not_of_two_models(tiny_model, data_files, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = make_tiny_gpt2(tmp_path / "model", dropout=0.0)
    config = GPT2Config(vocab_size=2048, n_positions=64, n_embd=512, n_layer=16, n_head=4)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    model_bytes = 4 * GPT2LMHeadModel(config).num_parameters()
    argv = [*make_argv(folder, data_files, "lora", "completion"), "--ds-config", "zero3"]
    job, warm_up = make_job(tmp_path, "job", argv), make_job(tmp_path, "warm-up", [*argv, "--model", tiny_model])
    assert run_on_ranks(2, measure_growth, warm_up, job, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    growth = [int((tmp_path / f"growth-{rank}").read_text()) for rank in range(2)]
    print(model_bytes / 2**20, [bytes_ / 2**20 for bytes_ in growth])
    assert max(growth) < 0.75 * model_bytes, "half of the weights, and one of them whole"
