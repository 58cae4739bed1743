"""`launch/bench.py packing`: records as they come, of like length together, and packed: padding and speed."""

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from trainer.config import cli
from trainer.data.dataset import PreparedDataset
from trainer.data.sampler import padding_share
from trainer.data.token_dataset import TokenDataset
from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed
from trainer.model.build import load_config
from trainer.tools.bench.made_data import wrap_rows
from trainer.tools.bench.shapes import save_shape
from trainer.tools.bench.tables import table_lines
from trainer.tools.trial_engine import start_trial, take_steps
from trainer.training.provenance import device_name

VARIANTS = {"as they come": "--no-shuffle", "like lengths together": "", "packed": "--packing"}
HEADINGS = ("rows", "padding", "tokens/s", "over the first (least to most)")
LENGTH_SPREAD = 0.6  # of the logarithm of a record's length, about that of E2E and ACLED records
WARMUP_STEPS = 2
Rounds = Sequence[Mapping[str, tuple[float, float]]]  # {variant: (padding, tokens per second without it)}


def measure_packing(args: argparse.Namespace) -> int:
    """Train a few steps of each variant, in alternation; prints the table."""
    dist_context = init_distributed()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            rounds = [
                {name: _measure(flags, args, dist_context, Path(scratch)) for name, flags in VARIANTS.items()}
                for _ in range(args.rounds)
            ]
        print("\n".join(table_lines(HEADINGS, _format_rows(rounds))))
        print(
            f"\n{args.shape}, records of {args.mean_length} tokens on average, rows of at most {args.block_size}, "
            f"{args.batch} records a step, full, fp32, {args.rounds} rounds, on {device_name(dist_context)} "
            f"({dist_context.num_threads} threads)"
        )
        return 0
    finally:
        destroy_process_group()


def _format_rows(rounds: Rounds) -> Iterator[list[str]]:
    """The speed beside the first variant's is the median of the rounds' ratios."""
    first = next(iter(VARIANTS))
    for name in VARIANTS:
        speeds = [results[name][1] for results in rounds]
        ratios = [results[name][1] / results[first][1] for results in rounds]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        yield [name, f"{rounds[0][name][0]:.1%}", f"{statistics.median(speeds):,.0f}", ratio]


def _measure(flags: str, args: argparse.Namespace, dist_context: DistContext, scratch: Path) -> tuple[float, float]:
    """(share of padding, median of the steps' tokens per second) of one variant."""
    argv = f"--mode full --preset demo --init random --objective completion --dropout 0 --precision fp32 {flags}"
    argv += f" --block-size {args.block_size} --global-batch {args.batch} --max-steps {args.steps + WARMUP_STEPS}"
    argv += f" --eval-every never --save-every never --model {save_shape(scratch, args.shape)}"
    settings = cli.parse_args([*argv.split(), "--output-dir", str(scratch / "run")]).settings
    data = _make_records(args, load_config(settings.model).vocab_size)
    plan, engine = start_trial(settings, data, dist_context)
    speeds = [record.tokens_per_second for record in take_steps(plan, engine, data)][WARMUP_STEPS:]
    padding = padding_share(plan.schedule.batches(data.train, dist_context.rank), len(speeds))
    return padding, statistics.median(speeds)


def _make_records(args: argparse.Namespace, vocab_size: int) -> PreparedDataset:
    """Random records whose lengths are lognormal, a quarter of each its prompt."""
    rng = np.random.default_rng(0)

    def make_split(number: int) -> TokenDataset:
        mean = np.log(args.mean_length) - LENGTH_SPREAD**2 / 2
        lengths = np.clip(rng.lognormal(mean, LENGTH_SPREAD, number), 4, args.block_size).astype(np.int64)
        return TokenDataset(
            ids=rng.integers(0, vocab_size, int(lengths.sum()), dtype=np.uint32),
            offsets=np.concatenate(([0], lengths.cumsum())),
            first_target=(lengths // 4 + 1).astype(np.int32),
        )

    train_rows, val_rows = make_split(args.batch * 64), make_split(4)  # a window of rows that are sorted by length
    return wrap_rows(train_rows, val_rows, vocab_size=vocab_size, objective="completion")
