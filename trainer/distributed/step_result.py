"""What an update, and a step, did."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What one update did."""

    loss_sum: float  #: summed loss of the global batch, nats
    grad_norm: float  #: of the global gradient before clipping
    is_skipped: bool  #: whether fp16 left the update out
    stop_requested: bool  #: whether any rank wants the run to stop


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """An update, and how the step came to it."""

    update: UpdateResult
    lr: float
    elapsed_seconds: float  #: since it was launched, or since the step before it ended


@dataclass(frozen=True, kw_only=True)
class LaunchedStep:
    """A step whose numbers have not been read."""

    lr: float
    launch_time: float
    wait: Callable[[], UpdateResult]
