"""Which micro-batches to try, in which order, and which one to take. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EQUAL = 0.03  # of the speed; within it two sizes are as fast, and the smaller one needs less memory


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One micro-batch as it ran: a whole step of the global batch, or why there is none."""

    micro: int
    accumulation: int
    fits: bool
    why: str = ""  #: why it does not fit
    seconds: float = 0.0  #: of one step
    tokens_per_second: float = 0.0
    peak: int = 0  #: bytes on the rank that needs most


def candidates(global_batch: int, ranks: int) -> list[int]:
    """Every micro-batch that leaves the global batch as it is: the divisors of a rank's share, ascending."""
    share = global_batch // ranks
    return [micro for micro in range(1, share + 1) if share % micro == 0]


def ladder(sizes: Sequence[int]) -> list[int]:
    """The sizes to climb: each at least twice the one before, and the largest."""
    steps: list[int] = []
    for micro in sizes:
        if not steps or micro >= 2 * steps[-1] or micro == sizes[-1]:
            steps.append(micro)
    return steps


def next_sizes(sizes: Sequence[int], fits: Mapping[int, bool]) -> list[int]:
    """What to try after what is known: up the ladder until one does not fit, then halving the gap; [] at the end."""
    good = max((micro for micro, fitted in fits.items() if fitted), default=0)
    bad = min((micro for micro, fitted in fits.items() if not fitted), default=None)
    if bad is None:
        return ladder([micro for micro in sizes if micro > good])
    between = [micro for micro in sizes if good < micro < bad]
    return [between[len(between) // 2]] if between else []


def fastest(tried: Sequence[Tried]) -> Tried | None:
    """The one with the most tokens per second; of those within EQUAL of it the smallest."""
    fitting = [one for one in tried if one.fits]
    if not fitting:
        return None
    most = max(one.tokens_per_second for one in fitting)
    return min((one for one in fitting if one.tokens_per_second >= (1 - EQUAL) * most), key=lambda one: one.micro)
