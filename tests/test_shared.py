"""Sums through shared memory on real ranks: what a sum over all of them is, in one order, with nothing left behind."""

import os
from pathlib import Path

import pytest
import torch
from ranks import on_ranks

from trainer.engine import leave_world, planned_world, start_world
from trainer.engine.shared import Shared
from trainer.engine.world import World

SHAPES = [(3, 5), (1,), (7, 2, 2), (1001,)]


def given(rank: int, turn: int) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(100 * turn + rank)
    return [torch.randn(shape, generator=dice) for shape in SHAPES]


def total(size: int, turn: int) -> list[torch.Tensor]:
    """Added in the order of ranks, to the last bit."""
    sums = given(0, turn)
    for rank in range(1, size):
        sums = [a + b for a, b in zip(sums, given(rank, turn), strict=True)]
    return sums


def table(world: World, elements: int) -> Shared:
    made = Shared.of(world, elements)
    assert made is not None
    return made


def sums() -> int:
    world = start_world()
    elements = sum(tensor.numel() for tensor in given(0, 0))
    shared = table(world, elements + 100)  # as with several groups, the widest of which counts
    for turn in range(20):  # a rank that is early must not write over what another still reads
        mine = given(world.rank, turn)
        shared.all_reduce(mine)
        assert all(map(torch.equal, mine, total(world.size, turn)))
        padding = torch.zeros(-elements % world.size)
        part = shared.reduce_scatter([*given(world.rank, turn), padding])
        flat = torch.cat([*(tensor.flatten() for tensor in total(world.size, turn)), padding])
        assert torch.equal(part, flat.view(world.size, -1)[world.rank])
        whole = torch.empty_like(flat)
        shared.all_gather(whole, part)
        assert torch.equal(whole, flat)
    assert not list(Path("/dev/shm").glob("*gradients*"))
    leave_world()
    return 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_shares_and_wholes(ranks, tmp_path):
    log = tmp_path / "log"
    assert on_ranks(ranks, sums, log=log) == 0, log.read_text()


def nothing_in_common() -> int:
    """Rank 1 may not open what rank 0 made: both go without."""
    world = start_world()
    if world.rank == 1:
        os.open = lambda *_: (_ for _ in ()).throw(PermissionError())  # type: ignore[assignment]
    assert Shared.of(world, 10) is None
    leave_world()
    return 0


def test_where_one_rank_cannot_see_the_memory_all_go_without(tmp_path):
    log = tmp_path / "log"
    assert on_ranks(2, nothing_in_common, log=log) == 0, log.read_text()


def test_one_rank_needs_none():
    assert Shared.of(planned_world(1, "cpu"), 10) is None
