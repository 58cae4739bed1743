"""The programs that are measured: each is a generator that yields after every optimizer step.

They share model, token ids, batch, precision, optimizer numbers and clip, so what differs is the program. The clock
and the device's queue are the caller's business.
"""

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trainer.config import cli
from trainer.config.choices import DEMO_MODEL
from trainer.config.settings import Settings
from trainer.data.dataset import PreparedDataset
from trainer.distributed.deepspeed_config import read_deepspeed_file
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import DistContext
from trainer.model import lora
from trainer.model.build import TrainableModel, build_model, load_config
from trainer.tools.bench.configs import BenchmarkConfig
from trainer.tools.bench.made_data import make_blocks, wrap_rows
from trainer.tools.trial_engine import start_trial, take_steps

NUM_EVAL_BATCHES = 4  # that the validation set is long


@dataclass(frozen=True, kw_only=True)
class BenchmarkSetup:
    """What every program gets: the settings, token ids from a seed, the ranks, and the model once it is built."""

    config: BenchmarkConfig
    settings: Settings
    dist_context: DistContext
    data: PreparedDataset
    model: TrainableModel


def build_setup(config: BenchmarkConfig, dist_context: DistContext) -> BenchmarkSetup:
    """Build model and data of a variant: random token ids, so that nothing has to be fetched."""
    settings = cli.parse_args(_to_argv(config)).settings
    model = build_model(settings, with_fingerprint=False) if config.program == "ours" else _build_plain_model(settings)
    vocab_size = model.causal.config.vocab_size
    train, val = (
        make_blocks(np.random.default_rng(n).integers(0, vocab_size, (n, config.block_size), dtype=np.uint32))
        for n in (config.steps * config.global_batch, NUM_EVAL_BATCHES * config.global_batch)
    )
    data = wrap_rows(train, val, vocab_size=vocab_size)
    return BenchmarkSetup(config=config, settings=settings, dist_context=dist_context, data=data, model=model)


def _build_plain_model(settings: Settings) -> TrainableModel:
    """The model as transformers and peft make it, for the other programs."""
    torch.manual_seed(settings.train.seed)
    causal = AutoModelForCausalLM.from_config(load_config(settings.model), dtype=torch.float32, trust_remote_code=False)
    module = causal
    if settings.mode == "lora":
        module = lora.add_adapters(causal, settings.lora, lora.resolve_target_modules(causal, settings.lora))
    return TrainableModel(module=module, causal=causal, metadata={})


def _to_argv(config: BenchmarkConfig) -> list[str]:
    flags = f"--mode {config.mode} --preset card --model {config.model} --block-size {config.block_size}"
    flags += f" --global-batch {config.global_batch} --eval-batch {config.global_batch} --max-steps {config.steps}"
    flags += f" --precision {config.precision} --eval-every never --save-every never --execution {config.execution}"
    is_only_shape = config.model == "gpt2" or not list(Path(config.model).glob("*.safetensors"))
    flags += " --init random" if is_only_shape and config.model != DEMO_MODEL else ""
    flags += f" --dropout {config.dropout}" if config.dropout is not None else ""
    flags += f" --ds-config {config.ds_config}" if config.ds_config else ""
    return flags.split()


def run_ours(setup: BenchmarkSetup) -> tuple[Iterator[object], Engine]:
    """Our own loop and engine, without loggers and checkpoints; also the engine, for evaluation."""
    plan, engine = start_trial(setup.settings, setup.data, setup.dist_context, setup.model)
    return take_steps(plan, engine, setup.data), engine


def run_plain(setup: BenchmarkSetup) -> Iterator[None]:
    """What one writes by hand: the model's own loss on full logits, clip_grad_norm_, torch's fused AdamW."""
    config, device, train_settings = setup.config, setup.dist_context.device, setup.settings.train
    module = setup.model.module.to(device).train()
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, lr=train_settings.lr, eps=train_settings.epsilon, weight_decay=0.0, fused=True
    )
    for step in range(config.steps):
        rows = range(step * config.global_batch, (step + 1) * config.global_batch)
        ids = torch.from_numpy(np.stack([setup.data.train.row(i) for i in rows])).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, train_settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield


def run_hf_trainer(setup: BenchmarkSetup) -> Iterator[None]:
    """`transformers.Trainer` with its defaults and the same numbers; compiled or through DeepSpeed where asked.

    The Trainer calls us, we are called for the next step: it runs in a thread of its own, one step at a time.
    """
    go_queue: queue.Queue[None] = queue.Queue()
    done_queue: queue.Queue[BaseException | None] = queue.Queue()

    def pause() -> None:
        done_queue.put(None)
        go_queue.get()

    def run_trainer() -> None:
        try:
            go_queue.get()
            with tempfile.TemporaryDirectory() as scratch:
                _build_trainer(setup, scratch, pause).train()
            done_queue.put(EOFError("the Trainer took all its steps"))
        except BaseException as error:
            done_queue.put(error)

    threading.Thread(target=run_trainer, daemon=True).start()
    while True:
        go_queue.put(None)
        if (error := done_queue.get()) is not None:
            raise error
        yield


def _build_trainer(setup: BenchmarkSetup, scratch: str, after_step: Callable[[], None]) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, train_settings = setup.config, setup.settings.train
    rows = map(setup.data.train.row, range(len(setup.data.train)))

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    deepspeed_config = None
    if config.program == "hf-deepspeed":
        deepspeed_config = {
            **read_deepspeed_file(str(config.ds_config)).content,
            "train_micro_batch_size_per_gpu": config.global_batch,
            "gradient_clipping": train_settings.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": config.precision == "bf16"},
        }
    training_args = TrainingArguments(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=config.global_batch,
        learning_rate=train_settings.lr,
        lr_scheduler_type="linear",
        max_grad_norm=train_settings.max_grad_norm,
        weight_decay=0.0,
        bf16=config.precision == "bf16",
        use_cpu=config.device == "cpu",
        torch_compile=config.program == "hf-compile",
        deepspeed=deepspeed_config,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    return Trainer(
        model=setup.model.module,
        args=training_args,
        callbacks=[AfterStep()],
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows],
    )
