"""Step -> learning rate, pure: a run resumed in the middle of any schedule goes on with the rates it would have had."""

import math

from trainer.config.choices import Schedule

WSD_DECAY_SHARE = 0.1  # of the steps after the warm-up; MiniCPM (arXiv 2404.06395) finds a tenth enough


def learning_rate(
    step: int,
    *,
    peak_lr: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule = "linear",
    min_lr: float = 0.0,
) -> float:
    """The rate of the update number `step` (counted from 0): linear from 0 over `warmup_steps`, then by the schedule.

    The formulas of transformers' `get_linear_schedule_with_warmup`, `get_cosine_with_min_lr_schedule_with_warmup`,
    `get_constant_schedule_with_warmup` and `get_wsd_schedule` (linear warm-up, cosine decay): the first update without
    warm-up has the full rate, and the rate after the last one would be `min_lr`.
    """
    min_ratio = min_lr / peak_lr
    if step < warmup_steps:
        factor = step / warmup_steps
        return peak_lr * (_raise_floor(factor, min_ratio) if schedule == "wsd" else factor)
    decay_start = total_steps - num_decay_steps(warmup_steps, total_steps) if schedule == "wsd" else warmup_steps
    if schedule == "constant" or step < decay_start:
        return peak_lr
    if step >= total_steps:
        return min_lr
    if schedule == "linear":
        factor = (total_steps - step) / (total_steps - decay_start)
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * ((step - decay_start) / (total_steps - decay_start))))
    return peak_lr * _raise_floor(factor, min_ratio)


def num_decay_steps(warmup_steps: int, total_steps: int) -> int:
    """Steps at the end over which the schedule `wsd` falls."""
    return math.ceil(WSD_DECAY_SHARE * max(0, total_steps - warmup_steps))


def describe_schedule(schedule: Schedule, *, min_lr: float, warmup_steps: int) -> str:
    """A schedule in words, for the plan and the model card."""
    shape = {
        "linear": "linear to {}",
        "cosine": "half a cosine to {}",
        "constant": "constant",
        "wsd": "constant, in the last tenth a cosine to {}",
    }[schedule].format(f"{min_lr:g}")
    return f"{shape}, {f'{warmup_steps:,} warm-up steps' if warmup_steps else 'no warm-up'}"


def _raise_floor(factor: float, min_ratio: float) -> float:
    return factor * (1.0 - min_ratio) + min_ratio
