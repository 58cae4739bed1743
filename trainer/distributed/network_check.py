"""How fast the ranks talk to their neighbours on the ring of a reduction, all at once, before the first step.

On several hosts only, and within a second.
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
class RingSpeed:
    """The slowest link of the ring."""

    source: int  #: the rank that sends over it
    target: int
    bandwidth: float  #: bytes a second, each way of all ranks busy
    latency_seconds: float


def measure_ring(context: DistContext) -> RingSpeed | None:
    """The slowest link between neighbours on two hosts; None where there is one host. All ranks must call.

    A slow link is seen by both of its ends, so the faster of the two says how slow it is.
    """
    if context.num_nodes == 1:
        return None
    latency_seconds = min(_exchange_seconds(context, 8) for _ in range(LATENCY_ROUNDS))
    for num_bytes in MESSAGE_BYTES:
        seconds = _exchange_seconds(context, num_bytes)
        rows = context.all_gather_object((seconds, latency_seconds))
        if max(row[0] for row in rows) > MAX_MESSAGE_SECONDS:
            break
    hosts, size = context.placement.hosts, context.world_size
    links = [(rank - 1, rank) for rank in range(size) if hosts[rank - 1] != hosts[rank]]
    link_seconds, source, target = max((min(rows[a][0], rows[b][0]), a, b) for a, b in links)
    return RingSpeed(
        source=source % size, target=target, bandwidth=num_bytes / link_seconds,
        latency_seconds=min(rows[source][1], rows[target][1]),
    )  # fmt: skip


def _exchange_seconds(context: DistContext, num_bytes: int) -> float:
    """Seconds in which this rank sends so much to its right neighbour and gets as much from its left one."""
    size = context.world_size
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=context.device)
    received = torch.empty_like(message)
    dist.barrier(group=context.cpu_group)
    start_time = time.perf_counter()
    requests = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, message, (context.rank + 1) % size),
            dist.P2POp(dist.irecv, received, (context.rank - 1) % size),
        ]
    )
    for request in requests:
        request.wait()
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)
    return time.perf_counter() - start_time


def describe_ring(speed: RingSpeed, context: DistContext, counts: ParamCounts, *, stage: int) -> str:
    """One line: the slowest link, what a step sends over it, and how long that takes beside a step of full."""
    hosts = context.placement.hosts
    text = (
        f"{speed.bandwidth / 1e9:.3g} GB/s and {speed.latency_seconds * 1e3:.2g} ms from {hosts[speed.source]} to "
        f"{hosts[speed.target]}, the slowest link"
    )
    num_bytes = bytes_sent(
        stage=stage, num_trainable=counts.trainable, num_frozen=counts.frozen, world_size=context.world_size
    )
    text += f": a step sends {num_bytes / 1e6:.3g} MB, {num_bytes / speed.bandwidth * 1e3:,.0f} ms"
    if counts.frozen:
        full_bytes = bytes_sent(stage=stage, num_trainable=counts.frozen, num_frozen=0, world_size=context.world_size)
        text += f"; one of --mode full {full_bytes / 1e6:.3g} MB, {full_bytes / speed.bandwidth * 1e3:,.0f} ms"
    return text
