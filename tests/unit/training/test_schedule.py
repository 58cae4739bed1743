"""The learning rate, number by number that of Hugging Face's schedulers, and when an evaluation is due."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from trainer.config.batch_config import BatchConfig
from trainer.config.cli import parse_args
from trainer.config.settings import resolve
from trainer.training.schedule import TrainSchedule

ONE = BatchConfig(micro_batch_size=1, gradient_accumulation_steps=1, world_size=1)


@pytest.mark.parametrize("min_lr", [0.0, 0.06])
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 11), (5, 5), (0, 1), (2, 40)])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_schedule_is_transformers_formula_step_by_step(schedule: Any, warmup: int, total: int, min_lr: float):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = {
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, total, min_lr=min_lr
        ),
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]()
    if schedule in ("linear", "constant"):
        min_lr = 0.0
    train = SimpleNamespace(lr=0.3, min_lr=min_lr, schedule=schedule, num_warmup_steps=lambda total: warmup)
    sizes = {"batch": ONE, "num_examples": 4, "total_steps": total, "steps_per_epoch": 4}
    ours = TrainSchedule(settings=SimpleNamespace(train=train), **sizes)  # type: ignore[arg-type]
    for step in range(total):
        assert ours.lr(step) == scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()


def test_the_warm_up_share_is_rounded_up_as_transformers_does(tmp_path: Any) -> None:
    train = resolve("full", "demo", {"train": {"warmup_ratio": 0.03}}).train
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), warmup_steps=0.03, use_cpu=True, report_to=[])
    for total in (1, 10, 33, 34, 100, 19_863):
        assert train.num_warmup_steps(total) == arguments.get_warmup_steps(total)


@pytest.mark.parametrize(("every", "steps"), [("epoch", [4, 8, 10]), ("3", [3, 6, 9, 10]), ("never", [10])])
def test_evaluations_are_due_every_n_steps_every_epoch_or_never_but_always_at_the_end(every: str, steps: list[int]):
    schedule = TrainSchedule(
        settings=parse_args(["--mode", "full", "--eval-every", every]).settings,
        batch=ONE,
        num_examples=4,
        total_steps=10,
        steps_per_epoch=4,
    )
    assert [step for step in range(1, 11) if schedule.is_eval_due(step)] == steps
