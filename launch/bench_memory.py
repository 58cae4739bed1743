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

from trainer.distributed.deepspeed_config import deepspeed_dict, read_zero_file
from trainer.distributed.process_group import has_bf16, peak_memory

SHAPES = {  # width, layers, heads, vocabulary, longest row
    "tiny": (64, 2, 2, 512, 128),
    "gpt2": (768, 12, 12, 50_257, 1024),
    "gpt2-xl": (1600, 48, 25, 50_257, 1024),
}
WAYS = {
    "full": "--mode full",
    "full, adamw8bit": "--mode full --optim adamw8bit",
    "full, activations again": "--mode full --checkpoint-activations",
    "lora": "--mode lora",
    "lora, activations again": "--mode lora --checkpoint-activations",
    "dora": "--mode lora --adapter dora",
    "nf4 + lora": "--mode lora --quant nf4 --quant-double",
    "int8 + lora": "--mode lora --quant int8",
    "lora, adamw8bit": "--mode lora --optim adamw8bit",
}
RATE = 3e-4  # of full training; adapters learn at ten times that, as the program has it
COLUMNS = ("trainable", "optimizer MiB", "peak MiB", "checkpoint MiB", "tokens/s", "validation loss")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own.add_argument("--shape", choices=SHAPES, default="tiny", help="size of the random GPT-2 (default: tiny)")
    own.add_argument("--model", help="folder of a causal LM with its weights, in place of --shape")
    own.add_argument("--steps", type=int, default=5, help="optimizer steps (default: 5)")
    own.add_argument("--micro-batch", type=int, default=2, help="rows a step (default: 2)")
    own.add_argument("--block-size", type=int, default=64, help="tokens a row (default: 64)")
    own.add_argument("--precision", choices=("fp32", "bf16"), help="left out: bf16 on a GPU that has it, else fp32")
    own.add_argument("--ways", default=";".join(WAYS), help=f"of these, joined by `;` (default: all): {list(WAYS)}")
    own.add_argument("--one", help=argparse.SUPPRESS)  # the way that this very process is to measure
    return own


def main(arguments: list[str] | None = None) -> int:
    """Measure every way and print the table."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(words)
    if options.one:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(WAYS[options.one], options, Path(scratch))), flush=True)
        return 0
    wanted = options.ways.split(";")
    for way in wanted:
        if way not in WAYS:
            print(f"error: --ways {way}: expected some of {'; '.join(WAYS)}", file=sys.stderr)
            return 2
    rows: list[list[str]] = []
    last: dict[str, Any] = {}
    for way in wanted:
        done = subprocess.run([sys.executable, __file__, *words, "--one", way], capture_output=True, text=True)
        if done.returncode:
            rows.append([way, *["-"] * (len(COLUMNS) - 1), (done.stderr.strip().splitlines() or ["?"])[-1]])
            continue
        last = found = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append([way, *told(found)])
        print(f"{way}: {found}", file=sys.stderr, flush=True)
    print("| way | " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * len(COLUMNS))
    print("\n".join("| " + " | ".join(row) + " |" for row in rows))
    if last:
        what = options.model or f"{options.shape}'s shape with random weights"
        size = f"{options.steps} steps of {options.micro_batch} rows of {options.block_size} tokens"
        print(f"\n{what}, {size}, {last['precision']}, on {last['device']} with torch {last['torch']}")
    return 0


def told(found: dict[str, Any]) -> list[str]:
    """The cells of a row after its name."""
    sizes = [f"{found[name] / 2**20:,.1f}" for name in ("optimizer_bytes", "peak_bytes", "checkpoint_bytes")]
    return [f"{found['trainable']:,}", *sizes, f"{found['tokens_per_second']:,.0f}", f"{found['loss']:.4f}"]


def measure(way: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One way, whole: what it trains, holds, writes and reaches. Bytes; the peak on a processor is above the start."""
    import bitsandbytes  # noqa: F401  # with peft: every way imports the same, and the peak counts none of it
    import peft  # noqa: F401
    import torch

    from trainer.config import cli
    from trainer.config.schema import LORA_RATE_FACTOR
    from trainer.distributed.engine import Engine
    from trainer.distributed.process_group import leave_world, start_world
    from trainer.model import optimizer
    from trainer.model.build import build
    from trainer.tracking.records import EvalRecord, StepRecord
    from trainer.training.checkpoint import Checkpoints, Progress
    from trainer.training.loop import Course, train
    from trainer.training.run_plan import cpu_name

    world = start_world()
    try:
        rate = RATE * (LORA_RATE_FACTOR if "--mode lora" in way else 1)
        settings = cli.read([*way.split(), *base_flags(options, scratch), "--lr", str(rate)]).settings
        optimizer.refuse_early(settings.train, stage=0, on_cpu=world.device.type == "cpu")
        precision = options.precision or ("bf16" if has_bf16(world.device) else "fp32")
        start = 0 if world.device.type == "cuda" else peak_memory(world.device)
        data = rows_to_learn(options, vocabulary(options))
        model = build(settings, hashed=False, device=world.device)
        batch = settings.train.batch(1)
        zero = read_zero_file("zero0")
        config = deepspeed_dict(zero, batch=batch, clip=settings.train.clip, precision=precision)
        running = Engine(world, model, config, settings.train, precision)
        course = Course(settings=settings, batch=batch, total_steps=options.steps, steps_per_epoch=options.steps)
        saver = Checkpoints(scratch / "checkpoints", world, keep=1, identity={})
        records = list(train(running, data, course, Progress(), saver, lambda: False))
        threads = f"{world.threads} thread{'s' if world.threads > 1 else ''}"
        speeds = [r.tokens_per_second for r in records if isinstance(r, StepRecord)]
        return {
            "trainable": model.facts["trainable"],
            "optimizer_bytes": running.state.optimizer_bytes(),
            "peak_bytes": peak_memory(world.device) - start,
            "checkpoint_bytes": sum(path.stat().st_size for path in (scratch / "checkpoints").rglob("*.*")),
            "tokens_per_second": statistics.median(speeds[1:] or speeds),
            "loss": [r.loss for r in records if isinstance(r, EvalRecord)][-1],
            "before": next(r.loss for r in records if isinstance(r, EvalRecord)),
            "precision": precision,
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else f"{cpu_name()} ({threads})",
            "torch": torch.__version__,
        }
    finally:
        leave_world()


def base_flags(options: argparse.Namespace, scratch: Path) -> list[str]:
    """The flags that all ways share; a shape becomes a folder with nothing but its configuration."""
    text = f"--ds-config zero0 --max-steps {options.steps} --eval-every never --save-every never --preset card"
    text += (
        f" --global-batch {options.micro_batch} --eval-batch {options.micro_batch} --block-size {options.block_size}"
    )
    if options.model:
        return [*text.split(), "--model", options.model]
    from transformers import GPT2Config

    width, layers, heads, words, longest = SHAPES[options.shape]
    config = GPT2Config(vocab_size=words, n_positions=longest, n_embd=width, n_layer=layers, n_head=heads)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(scratch / "shape")
    return [*text.split(), "--model", str(scratch / "shape"), "--init", "random"]


def vocabulary(options: argparse.Namespace) -> int:
    """Number of token ids that the model knows."""
    if not options.model:
        return SHAPES[options.shape][3]
    return int(json.loads((Path(options.model) / "config.json").read_text())["vocab_size"])


def rows_to_learn(options: argparse.Namespace, words: int) -> Any:
    """Training and validation rows whose ids count upwards from a random start, two steps at a time now and then."""
    import numpy as np

    from trainer.data.dataset import Prepared
    from trainer.data.token_dataset import Rows

    dice = np.random.default_rng(0)

    def side(count: int) -> Rows:
        steps = 1 + (dice.random((count, options.block_size)) < 0.2)
        ids = (dice.integers(words, size=(count, 1)) + steps.cumsum(1)) % min(words, 256)
        lengths = np.arange(count + 1) * options.block_size
        return Rows(ids=ids.reshape(-1).astype(np.uint32), offsets=lengths, first=np.ones(count, dtype=np.int32))

    train, val = side(options.micro_batch * options.steps), side(4)
    return Prepared(folder=Path(), facts={}, train=train, val=val, val_texts=(), pad_id=0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
