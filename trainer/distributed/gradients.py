"""The gradients of one rank's weights, brought together over the ranks: bucket by bucket while the backward runs.

Several ranks hold them in one flat buffer for each group of the optimizer, in DeepSpeed's layout: a gradient is copied
there as soon as it is made. Buckets are reduced in one fixed order, from the last weights to the first, so the sums do
not depend on which gradient came first. Without an overlap, or after a recorded step, the whole buffer goes at once.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from trainer.model import torch_internals
from trainer.model.loss import uses_gpu_form

# What a message should have at least, so that its latency is nothing beside it: NCCL as in torch's
# DistributedDataParallel; over gloo's networks (0.1 to 10 Gbit/s, 0.1 to 0.5 ms) one MiB takes 1 to 80 ms.
MIN_BUCKET_BYTES = {"nccl": 25 * 2**20, "gloo": 2**20}
NORM_CHUNK = 2**14  # elements whose squares are summed in float32: relative error below 1e-6


@dataclass(frozen=True)
class Bucket:
    """Whole weights that lie side by side in a group's flat buffer, by their place there."""

    group: int
    start: int
    end: int
    params: tuple[nn.Parameter, ...]


class LocalGradients:
    """Of a single rank: nothing is sent, and nothing copied but under a ZeRO stage, which wants them flat."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], flat_sizes: Sequence[int], *, is_sharded: bool):
        """`groups`: the weights of each group of the optimizer; `flat_sizes`: elements of each with DeepSpeed's
        padding."""
        self.groups, self.flat_sizes, self.is_sharded = groups, flat_sizes, is_sharded

    def reduce(self) -> list[Tensor]:
        """Each weight's gradient; `is_sharded`: each group's as one tensor, and the weights' own are let go."""
        results: list[Tensor] = []
        for group, flat_size in zip(self.groups, self.flat_sizes, strict=True):
            # One that is not in this forward has none; the other stages take it for zero, too.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            for parameter, grad in zip(group, grads, strict=True):
                parameter.grad = None if self.is_sharded else grad
            padding = flat_size - sum(grad.numel() for grad in grads)
            flat_parts = [*grads, grads[0].new_zeros(padding)] if padding else grads
            results += [_flatten_dense_tensors(flat_parts)] if self.is_sharded else grads
        return results


class GradientBuckets:
    """Of one of several ranks."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], flat_sizes: Sequence[int], *, is_sharded: bool):
        """As `LocalGradients`, the groups' weights in the order of the model; `is_sharded`: each rank wants the sum of
        its own equal part of each group only."""
        self.is_sharded = is_sharded
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._sends_directly = is_sharded and dist.get_backend() == "gloo"
        self.flats = [group[0].new_zeros(size) for group, size in zip(groups, flat_sizes, strict=True)]
        #: for each weight the part of the flat buffer that is its gradient
        self.views: dict[nn.Parameter, Tensor] = {}
        for group, flat in zip(groups, self.flats, strict=True):
            params = list(group)
            self.views.update(zip(params, _unflatten_dense_tensors(flat, [p.data for p in params]), strict=True))
        self.buckets = make_buckets(groups, MIN_BUCKET_BYTES[dist.get_backend()])
        self._bucket_of = {p: index for index, bucket in enumerate(self.buckets) for p in bucket.params}
        self._is_overlapping = False
        self._num_missing: list[int] = []
        self._num_launched = 0
        self._work: list[Any] = []
        self._received: list[Tensor] = []
        for parameter in self.views:
            parameter.register_post_accumulate_grad_hook(self._take)

    def overlap(self) -> None:
        """From here to `reduce` there is one backward, the step's last: send what it has made while it goes on."""
        self._is_overlapping = True
        self._num_missing = [len(bucket.params) for bucket in self.buckets]
        self._num_launched = 0
        if self._sends_directly:
            self._post_receives()

    def reduce(self) -> list[Tensor]:
        """Summed over the ranks: each weight's gradient, or of each group this rank's part. All ranks must call."""
        for parameter, view in self.views.items():
            if parameter.grad is None:  # not in this forward; the other ranks may have one
                view.zero_()
            elif parameter.grad is not view:
                view.copy_(parameter.grad)
            parameter.grad = view
        parts = self._finish_overlapped() if self._is_overlapping else self._reduce_whole()
        if not self.is_sharded:
            return list(self.views.values())
        for parameter in self.views:
            parameter.grad = None
        return parts

    def discard(self) -> None:
        """Wait for what a refused step has sent: the next one needs the buffers. All ranks must call."""
        if self._is_overlapping:
            self._finish_overlapped()

    def _take(self, parameter: nn.Parameter) -> None:
        """After each backward: the gradient moves to its place; buckets that are whole are sent, in their order."""
        view = self.views[parameter]
        if parameter.grad is not view:
            view.copy_(parameter.grad)
            parameter.grad = view
        if self._is_overlapping:
            self._num_missing[self._bucket_of[parameter]] -= 1
            while self._num_launched < len(self.buckets) and not self._num_missing[self._num_launched]:
                self._launch_next()

    def _reduce_whole(self) -> list[Tensor]:
        if self.is_sharded:
            return [reduce_scatter(flat) for flat in self.flats]
        for flat in self.flats:
            dist.all_reduce(flat)
        return []

    def _launch_next(self) -> None:
        bucket = self.buckets[self._num_launched]
        flat = self.flats[bucket.group]
        if not self.is_sharded:
            self._work.append(dist.all_reduce(flat[bucket.start : bucket.end], async_op=True))
        for owner, start, end in self._parts_by_owner(bucket):
            part = flat[start:end]
            if not self._sends_directly:
                self._work.append(dist.reduce(part, dst=owner, async_op=True))
            elif owner != self.rank:
                self._work.append(dist.isend(part, dst=owner, tag=self._num_launched))
        self._num_launched += 1

    def _parts_by_owner(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """(rank, start, end) of the parts of a bucket, where the group is divided over the ranks."""
        if not self.is_sharded:
            return []
        shard_size = len(self.flats[bucket.group]) // self.world_size
        owners = range(bucket.start // shard_size, (bucket.end - 1) // shard_size + 1)
        return [
            (owner, max(bucket.start, owner * shard_size), min(bucket.end, (owner + 1) * shard_size))
            for owner in owners
        ]

    def _post_receives(self) -> None:
        """Every other rank's parts of this rank's share: posted before they are sent, whenever that is."""
        self._received = [torch.zeros_like(flat).view(self.world_size, -1) for flat in self.flats]
        for tag, bucket in enumerate(self.buckets):
            offset = self.rank * self._received[bucket.group].shape[1]
            for owner, start, end in self._parts_by_owner(bucket):
                for source in range(self.world_size):
                    if owner == self.rank and source != self.rank:
                        part = self._received[bucket.group][source, start - offset : end - offset]
                        self._work.append(dist.irecv(part, src=source, tag=tag))

    def _finish_overlapped(self) -> list[Tensor]:
        while self._num_launched < len(self.buckets):
            self._launch_next()
        for work in self._work:
            work.wait()
        self._work, self._is_overlapping = [], False
        if not self.is_sharded:
            return []
        own_parts = [flat.view(self.world_size, -1)[self.rank] for flat in self.flats]
        if self._sends_directly:
            for received, own_part in zip(self._received, own_parts, strict=True):
                received[self.rank] = own_part
            own_parts, self._received = [received.sum(0) for received in self._received], []
        return own_parts


def make_buckets(groups: Sequence[Sequence[nn.Parameter]], min_bytes: int) -> list[Bucket]:
    """Buckets of at least `min_bytes` (but the last of a group), in the order in which a backward completes them."""
    buckets = []
    for group_index, group in enumerate(groups):
        group_size = end = start = sum(parameter.numel() for parameter in group)
        params: list[nn.Parameter] = []
        for parameter in reversed(group):
            start -= parameter.numel()
            params.append(parameter)
            if (end - start) * parameter.element_size() >= min_bytes or start == 0:
                depth = start / group_size  # LoRA+ has two groups, which go side by side through the model
                buckets.append((depth, Bucket(group_index, start, end, tuple(params))))
                end, params = start, []
    return [bucket for _, bucket in sorted(buckets, key=lambda pair: -pair[0])]


def reduce_scatter(flat: Tensor) -> Tensor:
    """This rank's share of a flat tensor's sum over the ranks.

    gloo's own reduce_scatter sends as much as an all_reduce: twice what is needed. Here every rank sends each other
    its share alone, and sums in the order of ranks.
    """
    world_size = dist.get_world_size()
    if flat.device.type == "cpu":
        received = torch.empty_like(flat).view(world_size, -1)
        _exchange(flat.view(world_size, -1), received)
        return received.sum(0)
    shard = flat.new_empty(flat.numel() // world_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch is renaming the function
        dist.reduce_scatter_tensor(shard, flat)
    return shard


def all_gather(flat: Tensor, shard: Tensor) -> None:
    """Fill `flat` with every rank's `shard`, all of one size, which may be this rank's part of it."""
    if flat.device.type == "cpu":
        _exchange([shard] * dist.get_world_size(), flat.view(dist.get_world_size(), -1))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_into_tensor(flat, shard)


def _exchange(outgoing: Sequence[Tensor] | Tensor, received: Tensor) -> None:
    """`outgoing[r]` goes to rank r as its `received[this rank]`, over gloo.

    gloo's all_to_all and all_gather let a link's two directions wait for one another: 3.15 and 2.43 s for 3.8 MB each
    way at 20 Mbit/s, where these messages take 1.75 (tests/distributed/test_shaped_links.py, medians of five).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    others = [(rank + distance) % world_size for distance in range(1, world_size)]
    work = [dist.irecv(received[other], src=other) for other in others]
    work += [dist.isend(outgoing[other], dst=other) for other in others]
    received[rank].copy_(outgoing[rank])
    for message in work:
        assert message is not None  # this rank is in the group
        message.wait()


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Of all together, 0-dimensional float32.

    torch sums the squares of a tensor in float32, on a processor one after the other: of GPT-2's embedding (39 million)
    the norm came out 0.27 % low. A GPU's kernel goes by chunks by itself.
    """
    if uses_gpu_form(grads[0].device):
        return torch.linalg.vector_norm(torch.stack(torch_internals.foreach_norm(grads)))
    large = [grad.flatten() for grad in grads if grad.numel() > NORM_CHUNK]
    pieces = [grad for grad in grads if grad.numel() <= NORM_CHUNK]
    pieces += [tail for flat in large if len(tail := flat[len(flat) // NORM_CHUNK * NORM_CHUNK :])]
    norms = [torch.stack(torch_internals.foreach_norm(pieces))] if pieces else []
    norms += [
        torch.linalg.vector_norm(flat[: len(flat) // NORM_CHUNK * NORM_CHUNK].view(-1, NORM_CHUNK), dim=1)
        for flat in large
    ]
    return torch.linalg.vector_norm(torch.cat(norms))
