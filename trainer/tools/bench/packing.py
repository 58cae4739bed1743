"""`launch/bench.py packing`: records as they come, of like length together, and packed: padding and speed."""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.config import cli
from trainer.data.dataset import PreparedDataset
from trainer.data.sampler import padding_share
from trainer.data.token_dataset import TokenDataset
from trainer.distributed.engine import Engine
from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed
from trainer.model.build import build_model, load_config
from trainer.tools.bench.shapes import save_shape
from trainer.tracking.records import StepRecord
from trainer.training.checkpoint import CheckpointManager
from trainer.training.loop import train
from trainer.training.provenance import device_name
from trainer.training.run_plan import RunPlan, make_plan
from trainer.training.train_state import TrainState

VARIANTS = {"as they come": "--no-shuffle", "like lengths together": "", "packed": "--packing"}
LENGTH_SPREAD = 0.6  # of the logarithm of a record's length, about that of E2E and ACLED records
WARMUP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class PackingResult:
    """One variant: the share of padding, and tokens per second without padding, a value a round."""

    padding: float
    speeds: tuple[float, ...]


def measure_packing(args: argparse.Namespace) -> int:
    """Train a few steps of each variant, in alternation; prints the table."""
    dist_context = init_distributed()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rounds = [
                {name: _measure(flags, args, dist_context, Path(scratch)) for name, flags in VARIANTS.items()}
                for _ in range(args.rounds)
            ]
        results = {
            name: PackingResult(padding=rounds[0][name][0], speeds=tuple(results[name][1] for results in rounds))
            for name in VARIANTS
        }
        print("\n".join(format_table(results)))
        print(
            f"\n{args.shape}, records of {args.mean_length} tokens on average, rows of at most {args.block_size}, "
            f"{args.batch} records a step, full, fp32, {args.rounds} rounds, on {device_name(dist_context)} "
            f"({dist_context.num_threads} threads)"
        )
        return 0
    finally:
        destroy_process_group()


def format_table(results: dict[str, PackingResult]) -> Sequence[str]:
    """Markdown; the speed beside the first variant's is the median of the rounds' ratios."""
    lines = ["| rows | padding | tokens/s | over the first (least to most) |", "|---|--:|--:|--:|"]
    first = next(iter(results.values()))
    for name, result in results.items():
        ratios = [speed / base for speed, base in zip(result.speeds, first.speeds, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {result.padding:.1%} | {statistics.median(result.speeds):,.0f} | {ratio} |")
    return lines


def _measure(
    flags: str, args: argparse.Namespace, dist_context: DistContext, scratch: Path
) -> tuple[float, float]:  # fmt: skip
    """(share of padding, median of the steps' tokens per second) of one variant."""
    argv = f"--mode full --preset demo --init random --objective completion --dropout 0 --precision fp32 {flags}"
    argv += f" --block-size {args.block_size} --global-batch {args.batch} --max-steps {args.steps + WARMUP_STEPS}"
    argv += f" --eval-every never --save-every never --model {save_shape(scratch, args.shape)}"
    settings = cli.parse_args([*argv.split(), "--output-dir", str(scratch / "run")]).settings
    config = load_config(settings.model)
    data = _records(args, config.vocab_size)
    model = build_model(settings, with_fingerprint=False, device=dist_context.device)
    plan = make_plan(settings, dist_context, data, model.metadata, config)
    engine = Engine(dist_context, model, plan.deepspeed_config, settings.train, plan.execution)
    checkpoints = CheckpointManager(scratch / "checkpoints", dist_context, save_total_limit=1, identity={})
    records = list(train(engine, data, plan.schedule, TrainState(), checkpoints, lambda: False))
    speeds = [record.tokens_per_second for record in records if isinstance(record, StepRecord)][WARMUP_STEPS:]
    return _padding(plan, data, len(speeds)), statistics.median(speeds)


def _padding(plan: RunPlan, data: PreparedDataset, num_steps: int) -> float:
    return padding_share(plan.schedule.batches(data.train, plan.dist_context.rank), num_steps)


def _records(args: argparse.Namespace, vocab_size: int) -> PreparedDataset:
    """Random records whose lengths are lognormal, a quarter of each its prompt."""
    rng = np.random.default_rng(0)

    def make_split(number: int) -> TokenDataset:
        mean = np.log(args.mean_length) - LENGTH_SPREAD**2 / 2
        lengths = np.clip(rng.lognormal(mean, LENGTH_SPREAD, number), 4, args.block_size).astype(np.int64)
        return TokenDataset(
            ids=rng.integers(0, vocab_size, int(lengths.sum()), dtype=np.uint32),
            offsets=np.concatenate(([0], lengths.cumsum())), first_target=(lengths // 4 + 1).astype(np.int32),
        )  # fmt: skip

    train_rows, val_rows = make_split(args.batch * 64), make_split(4)  # a window of rows that are sorted by length
    metadata = {
        "vocabulary": vocab_size, "objective": "completion", "fingerprint": "random", "notices": [], "train": {},
        "val": {},
    }  # fmt: skip
    return PreparedDataset(folder=Path(), metadata=metadata, train=train_rows, val=val_rows, val_texts=(), pad_id=0)
