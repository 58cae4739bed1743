"""What a training process grows by, against the memory estimate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tolerances import MEMORY_TOLERANCE

ROOT = Path(__file__).parents[2]


MEASURE_MEMORY_CODE = """
import json, sys
import numpy as np, torch, peft
from transformers import GPT2Config
from trainer.config import cli
from trainer.data.sampler import MicroBatch
from trainer.distributed import engine as room
from trainer.distributed.deepspeed_config import build_deepspeed_config, read_deepspeed_file
from trainer.distributed.engine import Engine
from trainer.distributed.execution import make_execution_plan
from trainer.distributed.process_group import destroy_process_group, init_distributed
from trainer.distributed.memory import ParamCounts, PassSetup, estimate_memory, pass_memory
from trainer.model.build import build_model, load_config

room.tune_malloc = lambda: None  # what tensors need, not what the C library keeps of it
def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

settings = cli.parse_args(sys.argv[1:]).settings
world = init_distributed()
before, libraries_before = resident("VmRSS"), resident("RssFile")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins again
model, config = build_model(settings, with_fingerprint=False), load_config(settings.model)
zero, batch = read_deepspeed_file(settings.engine.ds_config), settings.train.batch(1)
deepspeed_config = build_deepspeed_config(zero, batch=batch, max_grad_norm=1.0, precision="fp32")
execution = make_execution_plan(settings, world, stage=zero.stage, precision="fp32", model_dropout=0.1)
engine = Engine(world, model, deepspeed_config, settings.train, execution)
width = settings.data.block_size
for step in range(2):
    ids = np.random.default_rng(step).integers(0, config.vocab_size, (batch.micro_batch_size, width))
    micro = MicroBatch(input_ids=ids, labels=ids, tokens=ids.size, index=0)
    sums = [engine.forward_backward(micro, step=step, num_target_tokens=ids.size)
            for _ in range(batch.gradient_accumulation_steps)]
    engine.launch_update(1e-4, sums)()
libraries = resident("RssFile") - libraries_before  # read in at the first step: no tensors
grown = resident("VmHWM") - before - libraries
accumulates = batch.gradient_accumulation_steps > 1
setup = PassSetup(
    micro_batch_size=batch.micro_batch_size, sequence_length=width, precision="fp32", is_gpu=False,
    is_zero3=zero.stage == 3, accumulates=accumulates,
)
estimate = estimate_memory(
    ParamCounts.from_model_info(model.metadata), pass_memory(settings, setup),
    zero, 1, precision="fp32", is_gpu=False, accumulates=accumulates,
)
print(json.dumps({"grown": grown, "estimate": estimate.peak}))
world.watchdog.close()
destroy_process_group()
"""
SWEEP_CASES = [
    ("--mode lora --ds-config zero0", 4),
    ("--mode full --ds-config zero2", 4),
    ("--mode full --ds-config zero3", 4),
    ("--mode lora --ds-config zero3", 4),
    ("--mode full --ds-config zero0", 2),
    ("--mode full --ds-config zero1", 8),
    ("--mode full --ds-config zero0 --activation-checkpointing", 16),
    ("--mode lora --ds-config zero0 --activation-checkpointing", 16),
]
#: What is freed goes back at once, else the C library keeps a part of every size that ever was.
MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.fixture(scope="module")
def medium_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers of width 384: 30 MiB of weights, without dropout."""
    from transformers import GPT2Config

    folder = tmp_path_factory.mktemp("model")
    GPT2Config(
        vocab_size=2048,
        n_positions=256,
        n_embd=384,
        n_layer=4,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "micro_batch"),
    [
        ("--mode full --ds-config zero0", 4),
        *(pytest.param(*case, marks=pytest.mark.sweep) for case in SWEEP_CASES),
    ],
)
def test_a_process_grows_by_the_estimated_bytes(medium_model, case, micro_batch):
    flags = f"--preset demo --model {medium_model} --init random --block-size 256 {case}"
    flags += f" --micro-batch {micro_batch} --global-batch {max(4, micro_batch)}"
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY_CODE, *flags.split()],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **MALLOC_ENV},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(process.stdout.splitlines()[-1])
    print(f"{case} micro-batch {micro_batch}: estimate {result['estimate'] / result['grown']:.3f} of the growth")
    assert result["estimate"] == pytest.approx(result["grown"], rel=MEMORY_TOLERANCE)
