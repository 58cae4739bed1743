"""Under ZeRO 3 one rank reads or makes the weights and each keeps its share: the same numbers as under ZeRO 0, whatever
the file's type, with the memory of one model for all ranks of a host."""

import ctypes
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.engines import joined_ranks, prepare_data, start_engine
from helpers.launch_ranks import run_on_ranks
from helpers.matrix import RunDifference, launch_jobs, make_argv, make_job, read_job_result
from helpers.process_groups import reproducible_records
from helpers.tiny_inputs import make_tiny_gpt2
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from trainer.distributed import engine
from trainer.training.checkpoint import resolve_checkpoint

MODES = {  # {name: (flags, (ZeRO stage, type of the file) beside float32 under both)}
    "full": ("--mode full", [("zero3", "bfloat16")]),
    "lora": ("--mode lora", [("zero0", "bfloat16"), ("zero3", "half")]),
    "dora": ("--mode lora --adapter dora", [("zero3", "half")]),
    "pissa": ("--mode lora --adapter pissa", [("zero3", "bfloat16")]),
    "nf4": ("--mode lora --quant nf4", [("zero0", "half"), ("zero3", "half")]),
    "random": ("--mode full --init random", []),
}
IN_FLOAT32 = [("zero0", "float"), ("zero3", "float")]


def store(model: str, folder: Path, dtype: str) -> str:
    """The model with its tokenizer, its weights rounded so that they are the same in each type and stored in one."""
    causal = AutoModelForCausalLM.from_pretrained(model).bfloat16().half()
    with torch.no_grad():
        for weight in causal.parameters():
            weight[weight.abs() < 2**-14] = 0  # float16 has them with fewer digits
    getattr(causal, dtype)().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def results(tiny_model, data_files, strict_zero_files, tmp_path_factory) -> Path:
    """Runs of each method on files of the same weights in several types, under ZeRO 0 and 3, on two ranks."""
    out = tmp_path_factory.mktemp("stored")
    jobs = []
    models = {dtype: store(tiny_model, out / f"model-{dtype}", dtype) for dtype in ("bfloat16", "half", "float")}
    data = prepare_data(make_argv(models["float"], data_files, "full", "completion"))
    for name, (flags, more) in MODES.items():
        for zero, dtype in [*IN_FLOAT32, *more]:
            file = "zero0" if zero == "zero0" else strict_zero_files["zero3"]
            argv = [*make_argv(models[dtype], data_files, "full", "completion"), *flags.split(), "--ds-config", file]
            jobs.append(make_job(out, f"{name}-{zero}-{dtype}", [*argv, "--max-steps", "2"], data=data))
    launch_jobs(2, jobs)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_a_base_in_any_type_trains_as_the_same_weights_in_float32_and_alike_under_zero_0_and_3(mode, results):
    more = MODES[mode][1]
    runs = {(zero, dtype): read_job_result(results, f"{mode}-{zero}-{dtype}") for zero, dtype in [*IN_FLOAT32, *more]}
    for zero, dtype in more:
        (rows, weights), (others, other_weights) = runs[zero, "float"], runs[zero, dtype]
        assert reproducible_records(rows) == reproducible_records(others), (zero, dtype)
        assert all(np.array_equal(weights[name], other_weights[name]) for name in weights), (zero, dtype)
    metadata = [json.loads((results / f"{mode}-{zero}-{dtype}" / "run.json").read_text()) for zero, dtype in runs]
    assert len({facts["model"]["fingerprint"] for facts in metadata}) == 1
    difference = RunDifference.between(*(runs[key] for key in IN_FLOAT32))
    assert difference.is_rounding(), difference


def measure_growth(warm_up: dict[str, Any], job: dict[str, Any]) -> int:
    """On a rank: out/growth-RANK: by how many bytes the memory that is this process's alone grew while its engine
    was made."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    with joined_ranks() as context:
        engine.tune_malloc = lambda: None  # what tensors need, not what the C library keeps of it:
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
        started, checkpoint = start_engine(warm_up, context), None  # what libraries take once
        if job["is_resumed"]:
            started = start_engine(job, context)
            shapes = {name: shape for name, _, shape in started.engine.state.state_dict_layout()}
            started.engine.state.load_state_dict(lambda name: torch.zeros(shapes[name]), 0, None)
            started.checkpoint_manager(folder := Path(job["out"]) / "checkpoints").save(started.engine, started.state)
            checkpoint = resolve_checkpoint(folder, "latest")
        started.engine.release_memory()
        before, peak, is_done = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not is_done.wait(0.001):
                peak = max(peak, resident())

        thread = threading.Thread(target=watch)
        thread.start()
        start_engine(job, context, checkpoint)
        is_done.set()
        thread.join()
        (Path(job["out"]) / f"growth-{context.rank}").write_text(str(peak - before))
    return 0


@pytest.mark.parametrize(
    ("dtype", "flags", "is_whole_on_rank_0"),
    [
        ("bfloat16", "--mode lora", False),
        ("half", "--mode full --resume", False),
        ("float", "--mode lora --adapter pissa", True),
    ],
)
def test_two_ranks_under_zero_3_need_the_memory_of_one_model(
    dtype, flags, is_whole_on_rank_0, tiny_model, data_files, tmp_path
):
    folder = make_tiny_gpt2(tmp_path / "model", dropout=0.0)
    config = GPT2Config(vocab_size=2048, n_positions=64, n_embd=512, n_layer=8, n_head=4)
    causal = GPT2LMHeadModel(config)
    getattr(causal, dtype)().save_pretrained(folder)
    flags, is_resumed = flags.removesuffix(" --resume"), flags.endswith(" --resume")
    argv = [*make_argv(folder, data_files, "lora", "completion"), *flags.split(), "--ds-config", "zero3"]
    job = make_job(tmp_path, "job", argv, is_resumed=is_resumed)
    warm_up = make_job(tmp_path, "warm-up", [*argv, "--model", tiny_model])
    assert run_on_ranks(2, measure_growth, warm_up, job, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    # In full fine-tuning there are gradients and the optimizer's weights of the shares' size; resumed, its moments.
    model_bytes = 4 * causal.num_parameters()
    state = 0.5 * model_bytes * (0 if "lora" in flags else 4 if is_resumed else 2)
    growth = [int((tmp_path / f"growth-{rank}").read_text()) - state for rank in range(2)]
    print(model_bytes / 2**20, [bytes_ / 2**20 for bytes_ in growth])
    assert growth[1] < 0.75 * model_bytes, "half of the weights, and one of them whole"
    assert growth[0] < (1.25 if is_whole_on_rank_0 else 0.75) * model_bytes
