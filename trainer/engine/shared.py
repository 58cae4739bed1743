"""Sums over the ranks of one machine's processor, through memory that all of them see.

gloo sends every gradient through the loopback network, where it is copied four times; here each rank writes its own
into a row of a shared table, adds up its share of all rows, in the order of ranks, and reads the others' shares.
"""

import mmap
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.world import World


class Shared:
    """A table of float32 with a row for each rank; every method is a collective."""

    def __init__(self, world: World, table: Tensor):
        self.rank, self.size, self.table = world.rank, world.size, table

    @classmethod
    def of(cls, world: World, elements: int) -> "Shared | None":
        """A table that is `elements` wide; None, on all ranks alike, where they have no memory in common.

        The memory has no name in any file system, so nothing is left of it however the processes end.
        """
        if world.size == 1 or world.device.type != "cpu" or world.local_size != world.size:
            return None
        length, made = max(1, elements) * world.size * 4, -1
        try:
            if world.rank == 0:
                made = os.memfd_create("gradients")
                os.ftruncate(made, length)
        except (OSError, AttributeError):  # not on this system
            made = -1
        process, handle = world.gather((os.getpid(), made))[0]
        opened, memory = -1, None
        try:
            opened = os.open(f"/proc/{process}/fd/{handle}", os.O_RDWR)
            memory = mmap.mmap(opened, length)
        except OSError:  # rank 0 has none, or the system does not let others see it
            pass
        everybody = all(world.gather(memory is not None))
        for descriptor in (made, opened):
            if descriptor >= 0:
                os.close(descriptor)
        if memory is None or not everybody:
            return None
        return cls(world, torch.frombuffer(memory, dtype=torch.float32).view(world.size, -1))

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over the ranks in the place of each of the tensors."""
        width = self._lay_down(tensors)
        whole = self.table[0, :width]
        mine = self._share(whole)
        for row in self.table[1:, :width]:
            mine += self._share(row)
        dist.barrier()
        torch._foreach_copy_(list(tensors), _like(tensors, whole))
        dist.barrier()

    def reduce_scatter(self, tensors: Sequence[Tensor]) -> Tensor:
        """This rank's share of the sum over the ranks, [elements of all tensors / ranks]."""
        width = self._lay_down(tensors)
        mine = self._share(self.table[0, :width]).clone()
        for row in self.table[1:, :width]:
            mine += self._share(row)
        dist.barrier()
        return mine

    def all_gather(self, whole: Tensor, mine: Tensor) -> None:
        """Fill `whole` with every rank's `mine`, in the order of ranks."""
        common = self.table[0, : len(whole)]
        self._share(common).copy_(mine)
        dist.barrier()
        whole.copy_(common)
        dist.barrier()

    def _lay_down(self, tensors: Sequence[Tensor]) -> int:
        """Write them end to end into this rank's row; returns their elements, once all ranks have done so."""
        torch._foreach_copy_(_like(tensors, self.table[self.rank]), list(tensors))
        dist.barrier()
        return sum(tensor.numel() for tensor in tensors)

    def _share(self, row: Tensor) -> Tensor:
        """This rank's part of a row: all alike, the last one shorter where it does not come out even."""
        part = -(-len(row) // self.size)
        return row[self.rank * part : (self.rank + 1) * part]


def _like(tensors: Sequence[Tensor], row: Tensor) -> list[Tensor]:
    """Parts of the row, one after the other, in the shapes of the tensors."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = row[: sum(sizes)].split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
