"""Which micro-batches to try, in which order, and which one to take. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EQUAL_SPEED_SHARE = 0.03  # of the speed; within it two sizes are as fast, and the smaller one needs less memory


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One micro-batch as it ran: a whole step of the global batch, or why there is none."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    fits: bool
    failure_reason: str = ""  #: why it does not fit
    step_seconds: float = 0.0  #: of one step
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0  #: bytes on the rank that needs most


def candidate_sizes(global_batch: int, world_size: int) -> list[int]:
    """Every micro-batch that leaves the global batch as it is: the divisors of a rank's share, ascending."""
    examples_per_rank = global_batch // world_size
    return [size for size in range(1, examples_per_rank + 1) if examples_per_rank % size == 0]


def ladder(sizes: Sequence[int]) -> list[int]:
    """The sizes to climb: each at least twice the one before, and the largest."""
    ladder_sizes: list[int] = []
    for size in sizes:
        if not ladder_sizes or size >= 2 * ladder_sizes[-1] or size == sizes[-1]:
            ladder_sizes.append(size)
    return ladder_sizes


def next_sizes(sizes: Sequence[int], fits_by_size: Mapping[int, bool]) -> list[int]:
    """What to try after what is known: up the ladder until one does not fit, then halving the gap; [] at the end."""
    largest_fitting = max((size for size, fits in fits_by_size.items() if fits), default=0)
    smallest_failing = min((size for size, fits in fits_by_size.items() if not fits), default=None)
    if smallest_failing is None:
        return ladder([size for size in sizes if size > largest_fitting])
    sizes_between = [size for size in sizes if largest_fitting < size < smallest_failing]
    return [sizes_between[len(sizes_between) // 2]] if sizes_between else []


def fastest(trials: Sequence[TrialResult]) -> TrialResult | None:
    """The one with the most tokens per second; of those within EQUAL_SPEED_SHARE of it the smallest."""
    fitting = [trial for trial in trials if trial.fits]
    min_speed = (1 - EQUAL_SPEED_SHARE) * max((trial.tokens_per_second for trial in fitting), default=0.0)
    fast = [trial for trial in fitting if trial.tokens_per_second >= min_speed]
    return min(fast, key=lambda trial: trial.micro_batch_size, default=None)
