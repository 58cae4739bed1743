"""What each way to train costs: `python launch/bench_memory.py --shape gpt2 --steps 5` prints a table in Markdown.

Each way runs in a process of its own, through the program's own engine and loop, on one device: the GPU where there is
one, else the processor. Weights are random (`--model FOLDER` takes real ones) and the rows count upwards with some
noise, so a loss says whether a way learns, not how good it is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trainer.distributed.deepspeed_config import build_deepspeed_config, read_deepspeed_file
from trainer.distributed.process_group import peak_memory_bytes, supports_bf16

SHAPES = {  # width, layers, heads, vocabulary, longest row
    "tiny": (64, 2, 2, 512, 128),
    "gpt2": (768, 12, 12, 50_257, 1024),
    "gpt2-xl": (1600, 48, 25, 50_257, 1024),
}
METHODS = {
    "full": "--mode full",
    "full, adamw8bit": "--mode full --optim adamw8bit",
    "full, activations again": "--mode full --activation-checkpointing",
    "lora": "--mode lora",
    "lora, activations again": "--mode lora --activation-checkpointing",
    "dora": "--mode lora --adapter dora",
    "nf4 + lora": "--mode lora --quant nf4 --quant-double",
    "int8 + lora": "--mode lora --quant int8",
    "lora, adamw8bit": "--mode lora --optim adamw8bit",
}
FULL_LR = 3e-4  # of full training; adapters learn at ten times that, as the program has it
COLUMNS = ("trainable", "optimizer MiB", "peak MiB", "checkpoint MiB", "tokens/s", "validation loss")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="size of the random GPT-2 (default: tiny)")
    parser.add_argument("--model", help="folder of a causal LM with its weights, in place of --shape")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (default: 5)")
    parser.add_argument("--micro-batch", type=int, default=2, help="rows a step (default: 2)")
    parser.add_argument("--block-size", type=int, default=64, help="tokens a row (default: 64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="left out: bf16 on a GPU that has it, else fp32")
    parser.add_argument(
        "--ways", default=";".join(METHODS), help=f"of these, joined by `;` (default: all): {list(METHODS)}"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the way that this very process is to measure
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure every way and print the table."""
    worker_argv = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(worker_argv)
    if options.one:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(METHODS[options.one], options, Path(scratch))), flush=True)
        return 0
    methods = options.ways.split(";")
    for method in methods:
        if method not in METHODS:
            print(f"error: --ways {method}: expected some of {'; '.join(METHODS)}", file=sys.stderr)
            return 2
    rows: list[list[str]] = []
    last_result: dict[str, Any] = {}
    for method in methods:
        process = subprocess.run(
            [sys.executable, __file__, *worker_argv, "--one", method], capture_output=True, text=True
        )
        if process.returncode:
            rows.append([method, *["-"] * (len(COLUMNS) - 1), (process.stderr.strip().splitlines() or ["?"])[-1]])
            continue
        last_result = result = json.loads(process.stdout.strip().splitlines()[-1])
        rows.append([method, *format_cells(result)])
        print(f"{method}: {result}", file=sys.stderr, flush=True)
    print("| way | " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * len(COLUMNS))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    if last_result:
        model_text = options.model or f"{options.shape}'s shape with random weights"
        workload_text = f"{options.steps} steps of {options.micro_batch} rows of {options.block_size} tokens"
        print(
            f"\n{model_text}, {workload_text}, {last_result['precision']}, on {last_result['device']} with torch "
            f"{last_result['torch']}"
        )
    return 0


def format_cells(result: dict[str, Any]) -> list[str]:
    """The cells of a row after its name."""
    sizes = [f"{result[name] / 2**20:,.1f}" for name in ("optimizer_bytes", "peak_bytes", "checkpoint_bytes")]
    return [f"{result['trainable']:,}", *sizes, f"{result['tokens_per_second']:,.0f}", f"{result['loss']:.4f}"]


def measure(method_flags: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One way, whole: what it trains, holds, writes and reaches. Bytes; the peak on a processor is above the start."""
    import bitsandbytes  # noqa: F401  # with peft: every way imports the same, and the peak counts none of it
    import peft  # noqa: F401
    import torch

    from trainer.config import cli
    from trainer.config.choices import LORA_LR_FACTOR
    from trainer.distributed.engine import Engine
    from trainer.distributed.execution import make_execution_plan
    from trainer.distributed.process_group import destroy_process_group, init_distributed
    from trainer.model import optimizer
    from trainer.model.build import build_model, get_dropout_probabilities, load_config
    from trainer.tracking.records import EvalRecord, StepRecord
    from trainer.training.checkpoint import CheckpointManager
    from trainer.training.loop import train
    from trainer.training.run_plan import cpu_name
    from trainer.training.schedule import TrainSchedule
    from trainer.training.train_state import TrainState

    world = init_distributed()
    try:
        lr = FULL_LR * (LORA_LR_FACTOR if "--mode lora" in method_flags else 1)
        settings = cli.parse_args([*method_flags.split(), *base_flags(options, scratch), "--lr", str(lr)]).settings
        optimizer.check_8bit_supported(settings.train, zero_stage=0, on_cpu=world.device.type == "cpu")
        precision = options.precision or ("bf16" if supports_bf16(world.device) else "fp32")
        baseline_bytes = 0 if world.device.type == "cuda" else peak_memory_bytes(world.device)
        data = rows_to_learn(options, read_vocab_size(options))
        model = build_model(settings, with_fingerprint=False, device=world.device)
        batch = settings.train.batch(1)
        deepspeed_file = read_deepspeed_file("zero0")
        deepspeed_config = build_deepspeed_config(
            deepspeed_file, batch=batch, max_grad_norm=settings.train.max_grad_norm, precision=precision
        )
        execution = make_execution_plan(
            settings, world, deepspeed_config, precision=precision,
            model_dropout=max(get_dropout_probabilities(load_config(settings.model)).values(), default=0.0),
            micro_batch_size=batch.micro_batch_size,
        )  # fmt: skip
        engine = Engine(world, model, deepspeed_config, settings.train, execution)
        schedule = TrainSchedule(
            settings=settings,
            batch=batch,
            num_examples=len(data.train),
            total_steps=options.steps,
            steps_per_epoch=options.steps,
        )
        checkpoint_manager = CheckpointManager(scratch / "checkpoints", world, save_total_limit=1, identity={})
        records = list(train(engine, data, schedule, TrainState(), checkpoint_manager, lambda: False))
        threads = f"{world.num_threads} thread{'s' if world.num_threads > 1 else ''}"
        speeds = [r.tokens_per_second for r in records if isinstance(r, StepRecord)]
        return {
            "trainable": model.metadata["trainable"],
            "optimizer_bytes": engine.state.optimizer_bytes(),
            "peak_bytes": peak_memory_bytes(world.device) - baseline_bytes,
            "checkpoint_bytes": sum(path.stat().st_size for path in (scratch / "checkpoints").rglob("*.*")),
            "tokens_per_second": statistics.median(speeds[1:] or speeds),
            "loss": [r.loss for r in records if isinstance(r, EvalRecord)][-1],
            "before": next(r.loss for r in records if isinstance(r, EvalRecord)),
            "precision": precision,
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else f"{cpu_name()} ({threads})",
            "torch": torch.__version__,
        }
    finally:
        destroy_process_group()


def base_flags(options: argparse.Namespace, scratch: Path) -> list[str]:
    """The flags that all ways share; a shape becomes a folder with nothing but its configuration."""
    flags = f"--ds-config zero0 --max-steps {options.steps} --eval-every never --save-every never --preset card"
    flags += (
        f" --global-batch {options.micro_batch} --eval-batch {options.micro_batch} --block-size {options.block_size}"
    )
    if options.model:
        return [*flags.split(), "--model", options.model]
    from transformers import GPT2Config

    width, layers, heads, vocab_size, max_length = SHAPES[options.shape]
    config = GPT2Config(vocab_size=vocab_size, n_positions=max_length, n_embd=width, n_layer=layers, n_head=heads)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(scratch / "shape")
    return [*flags.split(), "--model", str(scratch / "shape"), "--init", "random"]


def read_vocab_size(options: argparse.Namespace) -> int:
    """Number of token ids that the model knows."""
    if not options.model:
        return SHAPES[options.shape][3]
    return int(json.loads((Path(options.model) / "config.json").read_text())["vocab_size"])


def rows_to_learn(options: argparse.Namespace, vocab_size: int) -> Any:
    """Training and validation rows whose ids count upwards from a random start, two steps at a time now and then."""
    import numpy as np

    from trainer.data.dataset import PreparedDataset
    from trainer.data.token_dataset import TokenDataset

    rng = np.random.default_rng(0)

    def make_split(num_rows: int) -> TokenDataset:
        steps = 1 + (rng.random((num_rows, options.block_size)) < 0.2)
        ids = (rng.integers(vocab_size, size=(num_rows, 1)) + steps.cumsum(1)) % min(vocab_size, 256)
        offsets = np.arange(num_rows + 1) * options.block_size
        return TokenDataset(
            ids=ids.reshape(-1).astype(np.uint32), offsets=offsets, first_target=np.ones(num_rows, dtype=np.int32)
        )

    train, val = make_split(options.micro_batch * options.steps), make_split(4)
    return PreparedDataset(folder=Path(), metadata={}, train=train, val=val, val_texts=(), pad_id=0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
