"""What the ranks of one machine's processor have in common: memory for sums over them, and for the state itself.

gloo sends every gradient through the loopback network, where it is copied four times; here each rank writes its own
into a row of a shared table, adds up its share of all rows, in the order of ranks, and reads the others' shares.
"""

import mmap
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.process_group import DistContext

LINE = 16  # elements of a cache line; weights begin with one, as products want them aligned


class Common:
    """Weights and AdamW's moments that the ranks of one processor hold once, each updating those that it owns.

    What ZeRO 0 would do on every rank again is done once, and no weight has to be sent. A weight belongs to one rank
    whole. Nobody may read weights while they are updated: `reduce` and `wait` are where the ranks meet.
    """

    def __init__(
        self, world: DistContext, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter], memory: Tensor
    ):
        """Move weights and moments into `memory`: zeros for each rank's gradients, the three, and counts of steps."""
        lines = _lines(trained)
        *rows, weights, first, second, steps = memory.split([sum(lines)] * (world.world_size + 3) + [len(trained)])
        self.owner = owners(lines, world.world_size)
        self.rank = world.rank
        self.rows = [self._views(row, lines, trained) for row in rows]
        places = zip(*(self._views(part, lines, trained) for part in (weights, first, second)), strict=True)
        for number, (parameter, (weight, exp_avg, exp_avg_sq)) in enumerate(zip(trained, places, strict=True)):
            if world.rank == 0:  # they are alike on all ranks
                weight.copy_(parameter.detach())
            parameter.data = weight
            optimizer.state[parameter] = {"step": steps[number], "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        dist.barrier()

    @classmethod
    def of(
        cls, world: DistContext, optimizer: torch.optim.Optimizer, trained: Sequence[nn.Parameter]
    ) -> "Common | None":
        """None, on all ranks alike, where they have no memory in common."""
        memory = in_common(world, (world.world_size + 3) * sum(_lines(trained)) + len(trained))
        return None if memory is None else cls(world, optimizer, trained, memory)

    @staticmethod
    def _views(part: Tensor, lines: Sequence[int], trained: Sequence[nn.Parameter]) -> list[Tensor]:
        pieces = zip(part.split(list(lines)), trained, strict=True)
        return [piece[: parameter.numel()].view(parameter.shape) for piece, parameter in pieces]

    def owns(self, number: int) -> bool:
        """Whether this rank updates the trained weight of that number."""
        return self.owner[number] == self.rank

    def reduce(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Those of the weights that this rank owns, with all other ranks' added to them in place."""
        others = [number for number in range(len(gradients)) if not self.owns(number)]
        mine = [number for number in range(len(gradients)) if self.owns(number)]
        torch._foreach_copy_([self.rows[self.rank][number] for number in others], [gradients[n] for n in others])
        dist.barrier()
        held = [gradients[number] for number in mine]
        for rank, row in enumerate(self.rows):
            if rank != self.rank and held:
                torch._foreach_add_(held, [row[number] for number in mine])
        return held

    def wait(self) -> None:
        """Until all ranks have updated what they own."""
        dist.barrier()


def _lines(trained: Sequence[nn.Parameter]) -> list[int]:
    """Elements that each takes, to the end of its last cache line."""
    return [-(-parameter.numel() // LINE) * LINE for parameter in trained]


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that owns each of the weights: the largest first, each to the rank that has least so far."""
    loads, owner = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owner[number] = min(range(ranks), key=loads.__getitem__)
        loads[owner[number]] += sizes[number]
    return owner


class Shared:
    """A table of float32 with a row for each rank; every method is a collective."""

    def __init__(self, world: DistContext, table: Tensor):
        self.rank, self.size, self.table = world.rank, world.world_size, table

    @classmethod
    def of(cls, world: DistContext, elements: int) -> "Shared | None":
        """A table that is `elements` wide; None, on all ranks alike, where they have no memory in common."""
        memory = in_common(world, max(1, elements) * world.world_size)
        return None if memory is None else cls(world, memory.view(world.world_size, -1))

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


def in_common(world: DistContext, elements: int) -> Tensor | None:
    """So many float32 zeros that all ranks see; None, on all ranks alike, where there is no such memory.

    It has no name in any file system, so nothing is left of it however the processes end.
    """
    if not world.is_single_node_cpu:
        return None
    length, made = elements * 4, -1
    try:
        if world.rank == 0:
            made = os.memfd_create("gradients")
            os.ftruncate(made, length)
    except OSError:
        made = -1
    process, handle = world.all_gather_object((os.getpid(), made))[0]
    opened, memory = -1, None
    try:
        opened = os.open(f"/proc/{process}/fd/{handle}", os.O_RDWR)
        memory = mmap.mmap(opened, length)
    except OSError:  # rank 0 has none, or the system does not let others see it
        pass
    everybody = all(world.all_gather_object(memory is not None))
    for descriptor in (made, opened):
        if descriptor >= 0:
            os.close(descriptor)
    if memory is None or not everybody:
        return None
    return torch.frombuffer(memory, dtype=torch.float32)


def _like(tensors: Sequence[Tensor], row: Tensor) -> list[Tensor]:
    """Parts of the row, one after the other, in the shapes of the tensors."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = row[: sum(sizes)].split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
