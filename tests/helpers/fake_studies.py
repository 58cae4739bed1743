"""Studies for the tests of the report: runs of both modes and several seeds with losses of single records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from helpers.fake_runs import make_metadata, make_reference_like_metadata, make_run_folder, write_eval_records
from trainer.report.comparable import group_by_seed
from trainer.report.judge import Margin
from trainer.report.run_data import RunData, read_folder
from trainer.report.sentence import Verdict, build_verdict

TARGETS = np.random.default_rng(1).integers(5, 60, 120)
GPU = {"resolved__device": "cuda", "hardware__gpu": "H100", "hardware__gpus": 1}
MakeRun = Callable[..., RunData]


def run_maker(folder: Path) -> MakeRun:
    """A function that makes runs in `folder`, one after the other: `make_run(mode, losses, ...)`."""
    names: Iterator[str] = map(str, range(100))

    def make_run(
        mode: str = "full",
        losses: Sequence[float] = (4.0, 2.0),
        *,
        like_card: bool = False,
        record_losses: Mapping[int, Sequence[float]] | None = None,
        record_options: Mapping[str, Any] | None = None,
        how: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> RunData:
        """A run with these validation losses at epoch 0, 1, ...; `record_losses` of each record by step."""
        content = (make_reference_like_metadata if like_card else make_metadata)(mode, **overrides)
        content["resolved"]["total_steps"] = content["resolved"]["steps_per_epoch"] * (len(losses) - 1)
        run_folder = make_run_folder(
            folder / next(names),
            metadata=content,
            losses={float(i): loss for i, loss in enumerate(losses)},
            every=500,
            epochs=len(losses) - 1,
            **(how or {}),
        )
        if record_losses is not None:
            write_eval_records(run_folder, record_losses, targets=TARGETS.tolist(), **(record_options or {}))
        return read_folder(run_folder)

    return make_run


def judge_runs(*runs: RunData, with_card: bool = False, margin: Margin | None = None) -> Verdict:
    """The verdict on these runs."""
    return build_verdict(group_by_seed(runs), with_card, margin or Margin())


def make_study(
    make_run: MakeRun,
    *,
    num_seeds: int,
    excess: float,
    unit_sd: float = 0.05,
    seed_sd: float = 0.002,
    record_options: Mapping[str, Any] | None = None,
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
            options = {"record_losses": {0: base, 30: losses}, "record_options": record_options}
            runs.append(make_run(mode, [4.0, mean_loss], seed=seed, **options))
    return runs
