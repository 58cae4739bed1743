"""Step -> learning rate, pure."""


def learning_rate(step: int, *, peak_lr: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of the update number `step` (counted from 0): linear from 0 over `warmup_steps`, then linear to 0 at
    `total_steps`.

    The formula of Hugging Face's `get_linear_schedule_with_warmup`: the first update without warm-up has the
    full rate, the last one has peak / (total - warmup).
    """
    if step < warmup_steps:
        return peak_lr * (step / max(1, warmup_steps))
    return peak_lr * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
