"""The programs that are measured: each is a generator that yields after every optimizer step.

They share model, token ids, batch, precision, optimizer numbers and clip, so what differs is the program. The clock
and the device's queue are the caller's business.
"""

import contextlib
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trainer.config import cli
from trainer.config.schema import DEMO_MODEL, Settings
from trainer.data.dataset import Prepared
from trainer.data.token_dataset import Rows
from trainer.distributed.deepspeed_config import read_zero_file
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import World
from trainer.model import lora
from trainer.model.build import Model, build, load_config
from trainer.tools.bench.configs import Variant
from trainer.tracking.records import StepRecord
from trainer.training.checkpoint import Progress
from trainer.training.loop import train
from trainer.training.run_plan import make_plan

EVAL_BATCHES = 4  # that the validation set is long


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every program gets: the settings, token ids from a seed, the ranks, and the model once it is built."""

    variant: Variant
    settings: Settings
    world: World
    data: Prepared
    model: Model


def make(variant: Variant, world: World) -> Bench:
    """Build model and data of a variant: random token ids, so that nothing has to be fetched."""
    settings = cli.read(_flags(variant)).settings
    model = build(settings, hashed=False) if variant.program == "ours" else _untouched(settings)
    vocabulary = model.causal.config.vocab_size
    sides = [_rows(batches * variant.batch, vocabulary, variant) for batches in (variant.steps, EVAL_BATCHES)]
    facts = {"vocabulary": vocabulary, "fingerprint": "random", "notices": []}
    data = Prepared(
        train=sides[0], val=sides[1], facts=facts, val_texts=(), pad_id=0, folder=Path("none"),
    )  # fmt: skip
    return Bench(variant=variant, settings=settings, world=world, data=data, model=model)


def _untouched(settings: Settings) -> Model:
    """The model as transformers and peft make it, for the other programs."""
    torch.manual_seed(settings.train.seed)
    causal = AutoModelForCausalLM.from_config(load_config(settings.model), dtype=torch.float32)
    parameters = sum(p.numel() for p in causal.parameters())
    has_adapters = settings.mode == "lora"
    module = lora.adapt(causal, settings.lora, lora.targets(causal, settings.lora)) if has_adapters else causal
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Model(module=module, causal=causal, facts={"parameters": parameters, "trainable": trainable})


def _flags(variant: Variant) -> list[str]:
    words = f"--mode {variant.mode} --preset card --model {variant.model} --block-size {variant.block_size}"
    words += f" --global-batch {variant.batch} --eval-batch {variant.batch} --max-steps {variant.steps}"
    words += f" --precision {variant.precision} --eval-every never --save-every never"
    words += f" --compile {variant.compile}"
    bare = variant.model == "gpt2" or not list(Path(variant.model).glob("*.safetensors"))  # a shape without weights
    words += " --init random" if bare and variant.model != DEMO_MODEL else ""
    words += f" --dropout {variant.dropout}" if variant.dropout is not None else ""
    return [*words.split(), *(["--ds-config", variant.zero] if variant.zero else [])]


def _rows(number: int, vocabulary: int, variant: Variant) -> Rows:
    ids = np.random.default_rng(number).integers(0, vocabulary, number * variant.block_size, dtype=np.uint32)
    offsets = np.arange(number + 1, dtype=np.int64) * variant.block_size
    return Rows(ids=ids, offsets=offsets, first=np.ones(number, dtype=np.int32))


def ours(bench: Bench) -> tuple[Iterator[None], Engine]:
    """Our own loop and engine, without sinks and checkpoints; also the engine, for evaluation."""
    plan = make_plan(bench.settings, bench.world, bench.data, bench.model.facts, load_config(bench.settings.model))
    made = Engine(
        bench.world, bench.model, plan.deepspeed, bench.settings.train, plan.precision, compiled=plan.shapes
    )  # fmt: skip
    nowhere: Any = SimpleNamespace(save=lambda *_: None)

    def steps() -> Iterator[None]:
        progress = Progress(pending=False)  # no evaluation before the first step
        for record in train(made, bench.data, plan.course, progress, nowhere, lambda: False):
            if isinstance(record, StepRecord):
                yield

    return steps(), made


def plain(bench: Bench) -> Iterator[None]:
    """What one writes by hand: the model's own loss on full logits, clip_grad_norm_, torch's fused AdamW."""
    variant, device, numbers = bench.variant, bench.world.device, bench.settings.train
    module = bench.model.module.to(device).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=numbers.lr, eps=numbers.epsilon, weight_decay=0.0, fused=True)
    autocast = variant.precision == "bf16"
    for step in range(variant.steps):
        ids = _batch(bench, step).to(device)
        with torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, numbers.clip)
        adam.step()
        adam.zero_grad()
        yield


def _batch(bench: Bench, step: int) -> torch.Tensor:
    rows = range(step * bench.variant.batch, (step + 1) * bench.variant.batch)
    return torch.from_numpy(np.stack([bench.data.train.row(i) for i in rows]))


def hugging_face(bench: Bench) -> Iterator[None]:
    """`transformers.Trainer` with its defaults and the same numbers; compiled or through DeepSpeed where asked.

    The Trainer calls us, we are called for the next step: it runs in a thread of its own, one step at a time.
    """
    go: queue.Queue[bool] = queue.Queue()
    done: queue.Queue[BaseException | None] = queue.Queue()

    def pause() -> None:
        done.put(None)
        go.get()

    def run() -> None:
        try:
            go.get()
            with tempfile.TemporaryDirectory() as scratch:
                _trainer(bench, scratch, pause).train()
            done.put(StopIteration())
        except BaseException as problem:
            done.put(problem)

    threading.Thread(target=run, daemon=True).start()
    while True:
        go.put(True)
        problem = done.get()
        if isinstance(problem, StopIteration):
            return
        if problem is not None:
            raise problem
        yield


def _trainer(bench: Bench, scratch: str, after_step: Callable[[], object]) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    variant, numbers = bench.variant, bench.settings.train
    rows = [{"input_ids": row, "labels": row} for row in map(bench.data.train.row, range(len(bench.data.train)))]

    class AfterStep(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            after_step()

    deepspeed = None
    if variant.program == "hf-deepspeed":
        deepspeed = {
            **read_zero_file(variant.zero or "zero2").content,
            "train_micro_batch_size_per_gpu": variant.batch, "gradient_clipping": numbers.clip,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": variant.precision == "bf16"},
        }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=scratch, max_steps=variant.steps, per_device_train_batch_size=variant.batch,
        learning_rate=numbers.lr, lr_scheduler_type="linear", max_grad_norm=numbers.clip, weight_decay=0.0,
        bf16=variant.precision == "bf16", use_cpu=variant.device == "cpu",
        torch_compile=variant.program == "hf-compile",
        deepspeed=deepspeed, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_num_workers=0,
    )  # fmt: skip
    return Trainer(model=bench.model.module, args=arguments, train_dataset=rows, callbacks=[AfterStep()])
