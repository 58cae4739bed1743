"""What a training process grows by, against the memory estimate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.matrix import make_job
from helpers.tiny_inputs import make_tiny_gpt2, tiny_argv, write_records
from helpers.tolerances import MEMORY_TOLERANCE

ROOT = Path(__file__).parents[2]
MEASURE_MEMORY_CODE = """
import json, sys
import numpy as np, peft, transformers.models.gpt2.modeling_gpt2
from helpers.engines import joined_ranks, start_engine
from trainer.data.sampler import MicroBatch
from trainer.distributed import engine as room

room.tune_malloc = lambda: None  # what tensors need, not what the C library keeps of it
def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

with joined_ranks() as context:
    before, libraries_before = resident("VmRSS"), resident("RssFile")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins again
    run = start_engine(json.loads(sys.argv[1]), context)
    batch, width = run.plan.schedule.batch, run.settings.data.block_size
    for step in range(2):
        ids = np.random.default_rng(step).integers(0, 2048, (batch.micro_batch_size, width))
        micro = MicroBatch(input_ids=ids, labels=ids, tokens=ids.size, index=0)
        sums = [run.engine.forward_backward(micro, step=step, num_target_tokens=ids.size)
                for _ in range(batch.gradient_accumulation_steps)]
        run.engine.launch_update(1e-4, sums)()
    libraries = resident("RssFile") - libraries_before  # read in at the first step: no tensors
    grown = resident("VmHWM") - before - libraries
    estimate = run.plan.estimate_memory(run.plan.deepspeed_file, row_length=width)
    print(json.dumps({"grown": grown, "estimate": estimate.peak}))
"""
#: What is freed goes back at once, else the C library keeps a part of every size that ever was.
MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


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
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY_CODE, json.dumps(make_job(tmp_path, "case", argv))],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **MALLOC_ENV},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["estimate"] == pytest.approx(result["grown"], rel=MEMORY_TOLERANCE)
