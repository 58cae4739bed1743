"""What ranks of one processor have in common, on real ranks: sums over them, weights and moments held once."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from test_ways import arguments, prepared  # noqa: F401

from trainer.distributed.process_group import World, leave_world, planned_world, start_world
from trainer.distributed.shared import Common, Shared, owners

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


# --- weights and moments that are held once ---


def adam(weights: list[torch.Tensor]) -> torch.optim.AdamW:
    """Two groups of other rates, as LoRA+ has them."""
    groups = [{"params": weights[:2], "lr": 0.1}, {"params": weights[2:], "lr": 0.02}]
    return torch.optim.AdamW(groups, fused=True, weight_decay=0.1)


def weights() -> list[torch.Tensor]:
    return [torch.nn.Parameter(tensor) for tensor in given(7, 99)]


def updates(out: str) -> int:
    """Ten updates in common, and what a process alone makes of the same sums."""
    world = start_world()
    ours, alone = weights(), weights()
    ours_by, alone_by = adam(ours), adam(alone)
    common = Common.of(world, ours_by, ours)
    assert common is not None
    assert all(weight.data_ptr() % 64 == ours[0].data_ptr() % 64 for weight in ours), "aligned"
    for turn in range(10):
        own, sums = given(world.rank, turn), total(world.size, turn)
        held = common.reduce(own)
        assert len(held) == sum(common.owns(number) for number in range(len(ours)))
        for number, weight in enumerate(ours):
            weight.grad = own[number] if common.owns(number) else None
        bad = float(turn == 4)  # left out by all
        for optimizer in (ours_by, alone_by):
            optimizer.found_inf = torch.tensor(bad)
        ours_by.step()
        common.wait()
        for weight, tensor in zip(alone, sums, strict=True):
            weight.grad = tensor
        alone_by.step()
        for weight, other in zip(ours, alone, strict=True):
            torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-6, atol=1e-7)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(ours_by.state[weight][key], alone_by.state[other][key], rtol=1e-5, atol=1e-7)
        common.wait()  # all have compared before the next update
    torch.save([weight.detach().clone() for weight in ours], f"{out}/{world.rank}.pt")
    leave_world()
    return 0


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_weights_and_moments_held_once_are_those_of_a_process_alone_on_every_rank(ranks, tmp_path):
    """Six ranks for four weights: two own none."""
    log = tmp_path / "log"
    assert on_ranks(ranks, updates, str(tmp_path), log=log) == 0, log.read_text()
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_every_weight_has_one_owner_and_ranks_have_like_loads():
    sizes = [38_597_376, *[2_359_296] * 24, *[1_769_472] * 12, *[589_824] * 12, *[768] * 50]
    for ranks in (1, 2, 3):
        owner = owners(sizes, ranks)
        loads = [sum(size for size, of in zip(sizes, owner, strict=True) if of == rank) for rank in range(ranks)]
        assert len(owner) == len(sizes)
        assert max(loads) < 1.05 * sum(sizes) / ranks
    assert owners([], 2) == []


def held_once(arguments: list[str], data: str) -> int:
    """On a rank: a weight that one rank writes is what the other reads; and a loaded state stays in common."""
    from trainer.config import cli
    from trainer.data.dataset import load
    from trainer.distributed.engine import Engine
    from trainer.model.build import build, load_config
    from trainer.training.run_plan import make_plan

    world = start_world()
    for more, expected in (([], True), (["--ds-config", "zero1"], False), (["--optim", "adamw8bit"], False)):
        settings, rows = cli.read([*arguments, *more]).settings, load(Path(data))
        model = build(settings)
        plan = make_plan(settings, world, rows, model.facts, load_config(settings.model))
        engine = Engine(world, model, plan.deepspeed, settings.train, plan.precision)
        assert plan.resolved()["state_in_common"] == expected, more
        assert ("in common" in plan._way()) == expected
        assert (engine.way.common is not None) == expected
        if expected:
            assert plan.zero.name == "zero0"
            sizes = {name: shape for name, _, shape in engine.state.layout()}
            engine.state.load(partial(full, sizes), 7, None)
            first = next(iter(engine.trainable.values()))
            states = (first.data, *(engine.optimizer.state[first][key] for key in ("step", "exp_avg", "exp_avg_sq")))
            assert [float(tensor.flatten()[0]) for tensor in states[1:]] == [7.0, 0.5, 0.5]
            engine.way.common.wait()
            if world.rank == 1:
                for number, tensor in enumerate(states):
                    tensor.fill_(number + 0.25)
            engine.way.common.wait()
            assert [float(tensor.flatten()[-1]) for tensor in states] == [0.25, 1.25, 2.25, 3.25]
    leave_world()
    return 0


def full(sizes: dict[str, tuple[int, ...]], name: str) -> torch.Tensor:
    return torch.full(sizes[name], 0.5)


def test_an_engine_holds_its_state_in_common_where_the_plan_says_so(tiny, records, prepared, tmp_path):  # noqa: F811
    log = tmp_path / "log"
    words = arguments(tiny, records, "full", "completion")
    assert on_ranks(2, held_once, words, str(prepared), log=log) == 0, log.read_text()
