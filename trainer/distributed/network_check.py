"""How fast the ranks talk to one another, on several hosts only.

A run measures the neighbours on the ring of a reduction, all at once, within a second before its first step; the
doctor measures every pair.
"""

import time
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
    """The slowest link between neighbours on two hosts; None where there is one host. All ranks must call.

    A slow link is seen by both of its ends, so the faster of the two says how slow it is.
    """
    if context.num_nodes == 1:
        return None
    size = context.world_size
    right, left = (context.rank + 1) % size, (context.rank - 1) % size
    latency_seconds = min(_exchange_seconds(context, 8, right, left) for _ in range(LATENCY_ROUNDS))
    for num_bytes in MESSAGE_BYTES:
        seconds = _exchange_seconds(context, num_bytes, right, left)
        rows = context.all_gather_object((seconds, latency_seconds))
        if max(row[0] for row in rows) > MAX_MESSAGE_SECONDS:
            break
    hosts = context.placement.hosts
    links = [(rank - 1, rank) for rank in range(size) if hosts[rank - 1] != hosts[rank]]
    link_seconds, source, target = max((min(rows[a][0], rows[b][0]), a, b) for a, b in links)
    return LinkSpeed(
        source=hosts[source], target=hosts[target], bandwidth=num_bytes / link_seconds,
        latency_seconds=min(rows[source][1], rows[target][1]),
    )  # fmt: skip


def measure_pairs(context: DistContext) -> list[LinkSpeed]:
    """The link of every two ranks, in as many rounds as a rank has others: each meets one at a time. All must call."""
    speeds = []
    for pairs in pair_rounds(context.world_size):
        peers = {a: b for a, b in pairs} | {b: a for a, b in pairs}
        peer = peers.get(context.rank)
        latency_seconds = min(_exchange_seconds(context, 8, peer, peer) for _ in range(LATENCY_ROUNDS))
        measured: dict[tuple[int, int], tuple[float, float]] = {}
        for num_bytes in MESSAGE_BYTES:
            seconds = _exchange_seconds(context, num_bytes, peer, peer)
            rows = context.all_gather_object((seconds, latency_seconds))
            for a, b in pairs:
                if measured.get((a, b), (0.0,))[0] <= MAX_MESSAGE_SECONDS:  # a pair that is slow sends no more
                    pair_seconds = min(rows[a][0], rows[b][0])
                    measured[a, b] = (pair_seconds, num_bytes / pair_seconds)
            if peer is not None and measured[min(context.rank, peer), max(context.rank, peer)][0] > MAX_MESSAGE_SECONDS:
                peer = None
        hosts = context.placement.hosts
        speeds += [
            LinkSpeed(
                source=hosts[a], target=hosts[b], bandwidth=measured[a, b][1],
                latency_seconds=min(rows[a][1], rows[b][1]),
            )
            for a, b in pairs
        ]  # fmt: skip
    return speeds


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
    text = (
        f"{speed.bandwidth / 1e9:.3g} GB/s and {speed.latency_seconds * 1e3:.2g} ms from {speed.source} to "
        f"{speed.target}, the slowest link"
    )
    num_bytes = bytes_sent(stage=stage, num_trainable=counts.trainable, num_frozen=counts.frozen, world_size=world_size)
    text += f": a step sends {num_bytes / 1e6:.3g} MB, {num_bytes / speed.bandwidth * 1e3:,.0f} ms"
    if step_seconds is not None:
        text += f" beside the {step_seconds * 1e3:,.0f} ms that a step takes here"
    if counts.frozen:
        full_bytes = bytes_sent(stage=stage, num_trainable=counts.frozen, num_frozen=0, world_size=world_size)
        text += f"; one of --mode full {full_bytes / 1e6:.3g} MB, {full_bytes / speed.bandwidth * 1e3:,.0f} ms"
    return text
