"""What a training process grows by, against the memory estimate."""

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engines import joined_ranks, start_engine
from helpers.launch_ranks import run_on_ranks
from helpers.matrix import make_job
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records
from helpers.tolerances import MEMORY_TOLERANCE

from trainer.data.sampler import MicroBatch
from trainer.distributed import engine as engine_module


def resident_bytes(key: str) -> int:
    return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) * 1024


def measure_memory(job: dict[str, Any]) -> int:
    """On a rank: two steps; what it grew by and what was estimated go to the job's folder."""
    libc = ctypes.CDLL(None)
    for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: what is freed goes back at once
        libc.mallopt(option, 65536)
    engine_module.tune_malloc = lambda: None  # what tensors need, not what the C library keeps of it
    with joined_ranks() as context:
        before, libraries_before = resident_bytes("VmRSS"), resident_bytes("RssFile")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
        run = start_engine(job, context)
        batch, width = run.plan.schedule.batch, run.settings.data.block_size
        for step in range(2):
            ids = np.random.default_rng(step).integers(0, 2048, (batch.micro_batch_size, width))
            micro = MicroBatch(input_ids=ids, labels=ids, tokens=ids.size, index=0)
            sums = [run.engine.forward_backward(micro, step=step, num_target_tokens=ids.size)]
            run.engine.launch_update(1e-4, sums)()
        libraries = resident_bytes("RssFile") - libraries_before  # read in at the first step: no tensors
        grown = resident_bytes("VmHWM") - before - libraries
        estimate = run.plan.estimate_memory(run.plan.deepspeed_file, row_length=width)
    (Path(job["out"]) / "result").write_text(json.dumps({"grown": grown, "estimate": estimate.peak}))
    return 0


@pytest.fixture(scope="module")
def medium_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tokenizer of the tiny model, and a model of four layers of width 384: 30 MiB of weights, without dropout."""
    from transformers import GPT2Config

    folder = make_tiny_gpt2(tmp_path_factory.mktemp("model"), dropout=0.0)
    size = {"vocab_size": 2048, "n_positions": 256, "n_embd": 384, "n_layer": 4, "n_head": 6}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    GPT2Config(**size, **dropout, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", pytest.param("lora --activation-checkpointing", marks=pytest.mark.sweep)])
def test_a_process_grows_by_the_estimated_bytes(medium_model, case, session_dir, tmp_path):
    data_files = [write_records(tmp_path / f"{n}.jsonl", num_records=400, seed=n) for n in (1, 2)]
    flags = f"--init random --objective blocks --block-size 256 --micro-batch 4 --ds-config zero0 --mode {case}"
    argv = tiny_argv(medium_model, (data_files[0], data_files[1]), f"{flags} --global-batch 4")
    job, log = make_job(tmp_path, "case", argv), tmp_path / "log"
    assert run_on_ranks(1, measure_memory, job, log=log) == 0, log.read_text()
    result = json.loads((tmp_path / "result").read_text())
    assert result["estimate"] == pytest.approx(result["grown"], rel=MEMORY_TOLERANCE)
