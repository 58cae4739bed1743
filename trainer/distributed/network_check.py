"""How fast the ranks talk to one another, on several hosts only.

A run measures the neighbours on the ring of a reduction, all at once, within a second before its first step; the
doctor measures every pair.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.distributed.bytes_sent import bytes_sent
from trainer.distributed.memory_estimate import ParamCounts
from trainer.distributed.process_group import DistContext

MESSAGE_BYTES = (2**16, 2**20, 2**23)  # each is sent while the one before it took less than MAX_MESSAGE_SECONDS
MAX_MESSAGE_SECONDS = 0.1
LATENCY_ROUNDS = 5  # of 8 bytes; the shortest counts


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """How fast one host sends to another while this one sends too."""

    source: str  #: the host that sends
    target: str
    bandwidth: float  #: bytes a second
    latency_seconds: float


def measure_ring(context: DistContext) -> LinkSpeed | None:
    """The slowest link between neighbours on two hosts; None where there is one host. All ranks must call."""
    if context.num_nodes == 1:
        return None
    size = context.world_size
    right, left = (context.rank + 1) % size, (context.rank - 1) % size
    latency_seconds = min(_exchange_seconds(context, 8, right, left) for _ in range(LATENCY_ROUNDS))
    for num_bytes in MESSAGE_BYTES:
        rows = context.all_gather_object((_exchange_seconds(context, num_bytes, right, left), latency_seconds))
        if max(seconds for seconds, _ in rows) > MAX_MESSAGE_SECONDS:
            break
    links = [_link_speed(context, rows, num_bytes, rank, (rank + 1) % size) for rank in range(size)]
    return min((link for link in links if link.source != link.target), key=lambda link: link.bandwidth)


def measure_pairs(context: DistContext) -> list[LinkSpeed]:
    """The link of every two ranks, in as many rounds as a rank has others: each meets one at a time. All must call."""
    links: dict[tuple[int, int], LinkSpeed] = {}
    for pairs in pair_rounds(context.world_size):
        own_pair = next((pair for pair in pairs if context.rank in pair), None)
        peer = sum(own_pair) - context.rank if own_pair else None
        latency_seconds = min(_exchange_seconds(context, 8, peer, peer) for _ in range(LATENCY_ROUNDS))
        for num_bytes in MESSAGE_BYTES:
            rows = context.all_gather_object((_exchange_seconds(context, num_bytes, peer, peer), latency_seconds))
            links |= {pair: _link_speed(context, rows, num_bytes, *pair) for pair in pairs}
            pairs = [pair for pair in pairs if num_bytes / links[pair].bandwidth <= MAX_MESSAGE_SECONDS]
            if own_pair not in pairs:  # a pair that is slow sends no more
                peer = None
    return list(links.values())


def _link_speed(
    context: DistContext, rows: Sequence[tuple[float, float]], num_bytes: int, source: int, target: int
) -> LinkSpeed:
    """From (seconds of a message, latency) of each rank: both ends see a slow link, so the faster says how slow."""
    seconds, latency_seconds = map(min, rows[source], rows[target])
    hosts = context.placement.hosts
    return LinkSpeed(
        source=hosts[source], target=hosts[target], bandwidth=num_bytes / seconds, latency_seconds=latency_seconds
    )


def pair_rounds(size: int) -> list[list[tuple[int, int]]]:
    """Every two of `size` ranks once, the lower first, in rounds of pairs that share no rank (the circle method)."""
    places = list(range(size + size % 2))
    rounds = []
    for _ in range(len(places) - 1):
        pairs = (sorted((a, b)) for a, b in zip(places, reversed(places), strict=True))
        rounds.append(sorted({(a, b) for a, b in pairs if b < size}))
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _exchange_seconds(context: DistContext, num_bytes: int, target: int | None, source: int | None) -> float:
    """Seconds in which this rank sends so much to one rank and gets as much from another; None: it only waits."""
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=context.device)
    received = torch.empty_like(message)
    dist.barrier(group=context.cpu_group)
    start_time = time.perf_counter()
    if target is not None:
        sending, receiving = dist.P2POp(dist.isend, message, target), dist.P2POp(dist.irecv, received, source)
        for request in dist.batch_isend_irecv([sending, receiving]):
            request.wait()
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    return time.perf_counter() - start_time


def describe_link(
    speed: LinkSpeed, counts: ParamCounts, *, stage: int, world_size: int, step_seconds: float | None = None
) -> str:
    """One line: the slowest link, what a step sends over it, and how long that takes beside a step of full.

    `step_seconds`: of a step without that wait, where it is known.
    """

    def describe_bytes(num_trainable: int, num_frozen: int) -> str:
        num_bytes = bytes_sent(stage=stage, num_trainable=num_trainable, num_frozen=num_frozen, world_size=world_size)
        return f"{num_bytes / 1e6:.3g} MB, {num_bytes / speed.bandwidth * 1e3:,.0f} ms"

    text = (
        f"{speed.bandwidth / 1e9:.3g} GB/s and {speed.latency_seconds * 1e3:.2g} ms from {speed.source} to "
        f"{speed.target}, the slowest link: a step sends {describe_bytes(counts.trainable, counts.frozen)}"
    )
    if step_seconds is not None:
        text += f" beside the {step_seconds * 1e3:,.0f} ms that a step takes here"
    return text + f"; one of --mode full {describe_bytes(counts.frozen, 0)}" * bool(counts.frozen)
