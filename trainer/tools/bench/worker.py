"""One rank of one measurement: `python -m trainer.tools.bench.worker JOB`, which writes its result.

The programs share model, token ids, batch, precision, optimizer numbers and clip, so what differs is the program.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from trainer.config import cli
from trainer.config.choices import DEMO_MODEL
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset, TokenDataset
from trainer.model import cpu_attention, lora, loss
from trainer.model.build import load_config
from trainer.model.flops import count_step_flops
from trainer.tools.bench.steps import BenchmarkConfig, describe_hardware
from trainer.tools.trial_engine import join_job, start_trial, write_answer
from trainer.tracking.records import StepRecord
from trainer.training.loop import train
from trainer.training.provenance import package_versions
from trainer.training.schedule import TrainState

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTH_SPREAD = 0.6  # of the logarithm of a ragged row's length, about that of E2E and ACLED records
MEAN_LENGTH_SHARE = 0.3  # of ragged rows, of the longest


def main(job_file: str) -> None:
    """Do the job and answer with the times of its program, in seconds, and what else it used, in bytes."""
    with join_job(job_file) as (job, dist_context):
        config, device = BenchmarkConfig(**job["config"]), dist_context.device
        settings = cli.parse_args(_to_argv(config)).settings
        data = _make_data(config, load_config(settings.model).get_text_config().vocab_size)
        times: list[float] = []  # at the end of each step; the device is idle at the end of a window

        def after_step() -> None:
            num_timed_steps = len(times) + 1 - config.warmup_steps
            if device.type == "cuda" and num_timed_steps >= 0 and num_timed_steps % config.steps_per_window == 0:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

        ran_by = ""
        if config.program == "ours":
            if config.without == "chunked-loss":  # what no flag turns off
                loss.find_output_head = lambda causal: None
            elif config.without == "cpu-attention":
                cpu_attention.install = lambda module, causal: None
            plan, engine = start_trial(settings, data, dist_context)
            nothing_saved: Any = SimpleNamespace(save=lambda *_: None)
            state = TrainState(eval_pending=False)  # nothing is evaluated before the first step
            for record in train(engine, data, plan.schedule, state, nothing_saved, lambda: False):
                if isinstance(record, StepRecord):
                    after_step()
            ran_by = "; ".join([engine.plan.path, *(change["reason"] for change in engine.plan_changes)])
        else:  # the model as transformers and peft make it
            torch.manual_seed(settings.train.seed)
            model_config = load_config(settings.model)
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32, trust_remote_code=False)
            if settings.mode == "lora":
                model = lora.add_adapters(model, settings.lora, lora.resolve_target_modules(model, settings.lora))
            run_peer = _run_plain if config.program == "plain" else _run_hf_trainer
            run_peer(config, settings, data, model, after_step)
        window_ends = times[config.warmup_steps - 1 :: config.steps_per_window]
        free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
        lengths = data.train.lengths()
        write_answer(
            job,
            dist_context,
            {
                "ran_by": ran_by,
                "windows": (np.diff(window_ends) / config.steps_per_window).tolist(),
                "device_memory": total - free,
                "hardware": describe_hardware(device),
                "threads": dist_context.num_threads,
                "versions": package_versions(),
                "tokens": config.global_batch * float(lengths.mean()),
                "flops": count_step_flops(settings, lengths=lengths, global_batch=config.global_batch),
                "ceiling_flops": _measure_ceiling(config, device),
            },
        )


def _to_argv(config: BenchmarkConfig) -> list[str]:
    flags = f"--mode {config.mode} --preset card --model {config.model} --block-size {config.block_size}"
    flags += f" --global-batch {config.global_batch} --eval-batch {config.global_batch} --max-steps {config.num_steps}"
    flags += f" --precision {config.precision} --eval-every never --save-every never"
    flags += f" --execution {'eager' if config.without == 'graphs' else config.execution}"
    is_only_shape = config.model == "gpt2" or not list(Path(config.model).glob("*.safetensors"))
    flags += " --init random" if is_only_shape and config.model != DEMO_MODEL else ""
    flags += f" --dropout {config.dropout}" if config.dropout is not None else ""
    flags += f" --ds-config {config.ds_config}" if config.ds_config else ""
    flags += " --objective completion" if config.is_ragged else ""
    flags += " --packing" if config.is_ragged and config.without != "packing" else ""
    return flags.split()


def _make_data(config: BenchmarkConfig, vocab_size: int) -> PreparedDataset:
    """Random token ids, so that nothing has to be fetched; ragged rows have lognormal lengths."""
    rng = np.random.default_rng(0)
    num_rows = config.num_steps * config.global_batch
    lengths = np.full(num_rows, config.block_size)
    if config.is_ragged:
        mean = np.log(MEAN_LENGTH_SHARE * config.block_size) - LENGTH_SPREAD**2 / 2
        lengths = np.clip(rng.lognormal(mean, LENGTH_SPREAD, num_rows), 4, config.block_size).astype(np.int64)
    rows = [rng.integers(0, vocab_size, length) for length in lengths]
    return wrap_rows(rows, rows[: config.global_batch], vocab_size=vocab_size, is_ragged=config.is_ragged)


def wrap_rows(
    train: Sequence[NDArray[np.int64]], val: Sequence[NDArray[np.int64]], *, vocab_size: int, is_ragged: bool = False
) -> PreparedDataset:
    """Rows of token ids as a run takes them; all tokens of a row but the first count in the loss."""
    train_rows, val_rows = (
        TokenDataset(
            ids=np.concatenate(rows).astype(np.uint32),
            offsets=np.cumsum([0, *map(len, rows)]),
            first_target=np.ones(len(rows), dtype=np.int32),
        )
        for rows in (train, val)
    )
    objective = "completion" if is_ragged else "blocks"
    metadata: dict[str, Any] = {"vocabulary": vocab_size, "objective": objective, "fingerprint": "made"}
    metadata |= {"notices": [], "train": {}, "val": {}}
    return PreparedDataset(train=train_rows, val=val_rows, metadata=metadata, val_texts=(), pad_id=0, folder=Path())


def _run_plain(
    config: BenchmarkConfig, settings: Settings, data: PreparedDataset, model: Any, after_step: Callable[[], None]
) -> None:
    """What one writes by hand: the model's own loss on full logits, clip_grad_norm_, torch's fused AdamW."""
    device = torch.device(config.device)
    module = model.to(device).train()
    params = [p for p in module.parameters() if p.requires_grad]
    adamw = {"lr": settings.train.lr, "eps": settings.train.epsilon, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(params, **adamw, fused=True)
    for step in range(config.num_steps):
        rows = range(step * config.global_batch, (step + 1) * config.global_batch)
        ids = torch.from_numpy(np.stack([data.train.row(i) for i in rows])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            batch_loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(params, settings.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def _run_hf_trainer(
    config: BenchmarkConfig, settings: Settings, data: PreparedDataset, model: Any, after_step: Callable[[], None]
) -> None:
    """`transformers.Trainer` with its defaults and the same numbers."""

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    with tempfile.TemporaryDirectory() as scratch:
        training_args = TrainingArguments(
            output_dir=scratch,
            max_steps=config.num_steps,
            per_device_train_batch_size=config.global_batch,
            learning_rate=settings.train.lr,
            lr_scheduler_type="linear",
            max_grad_norm=settings.train.max_grad_norm,
            weight_decay=0.0,
            bf16=config.precision == "bf16",
            use_cpu=config.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in map(data.train.row, range(len(data.train)))]
        Trainer(model=model, args=training_args, callbacks=[AfterStep()], train_dataset=rows).train()


def _measure_ceiling(config: BenchmarkConfig, device: torch.device) -> float:
    """FLOP/s of one large matrix product in the program's precision: what arithmetic can reach here."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=DTYPES[config.precision], device=device) for _ in range(2))
    times = []
    for _ in range(12):
        start_time = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start_time)
    return 2 * size**3 / statistics.median(times[2:])


if __name__ == "__main__":
    main(sys.argv[1])
