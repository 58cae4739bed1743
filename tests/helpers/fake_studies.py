"""Runs of both modes over seeds whose excess is known, and their verdict."""

from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.report.comparable import group_by_seed
from trainer.report.judge import DEFAULT_MARGIN, Margin
from trainer.report.run_data import RunData
from trainer.report.sentence import Verdict, build_verdict

TARGETS = np.random.default_rng(1).integers(5, 60, 120)
MakeRun = Callable[..., RunData]


def make_study(
    make_run: MakeRun,
    *,
    num_seeds: int,
    excess: float,
    unit_sd: float = 0.05,
    seed_sd: float = 0.002,
    **record_options: Any,
) -> list[RunData]:
    """Full and LoRA of each seed, LoRA `excess` nats per token worse; full gains 2 nats over the base."""
    rng = np.random.default_rng(3)
    base = 4.0 + 0.3 * rng.standard_normal(len(TARGETS))
    unit = unit_sd * rng.standard_normal(len(TARGETS))
    runs = []
    for seed in range(num_seeds):
        full = base - 2.0 + 0.1 * rng.standard_normal(len(TARGETS))
        lora = full + excess + seed_sd * rng.standard_normal() + unit + 0.02 * rng.standard_normal(len(TARGETS))
        for mode, losses in (("full", full), ("lora", lora)):
            mean_loss = float(np.average(losses, weights=TARGETS))
            records = {
                "record_losses": {0: base, 30: losses},
                "record_options": {"targets": TARGETS.tolist()} | record_options,
            }
            runs.append(make_run(mode, [4.0, mean_loss], seed=seed, **records))
    return runs


def judge_runs(*runs: RunData, margin: Margin = DEFAULT_MARGIN) -> Verdict:
    return build_verdict(group_by_seed(runs), margin)
