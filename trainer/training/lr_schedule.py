"""Step -> learning rate, pure."""


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """The rate of the update number `step` (counted from 0): linear from 0 over `warmup`, then linear to 0 at `total`.

    The formula of Hugging Face's `get_linear_schedule_with_warmup`: the first update without warm-up has the
    full rate, the last one has peak / (total - warmup).
    """
    if step < warmup:
        return peak * (step / max(1, warmup))
    return peak * max(0.0, (total - step) / max(1, total - warmup))
