"""What ranks of one processor have in common, on real ranks: sums over them, weights and moments held once."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.launch_ranks import run_on_ranks
from test_invariance import make_argv

from trainer.distributed.process_group import DistContext, destroy_process_group, init_distributed, simulated_context
from trainer.distributed.shared import Common, Shared, owners

SHAPES = [(3, 5), (1,), (7, 2, 2), (1001,)]


def make_tensors(rank: int, turn: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def expected_sums(size: int, turn: int) -> list[torch.Tensor]:
    """Added in the order of ranks, to the last bit."""
    sums = make_tensors(0, turn)
    for rank in range(1, size):
        sums = [a + b for a, b in zip(sums, make_tensors(rank, turn), strict=True)]
    return sums


def make_shared(dist_context: DistContext, elements: int) -> Shared:
    shared = Shared.of(dist_context, elements)
    assert shared is not None
    return shared


def check_collectives() -> int:
    dist_context = init_distributed()
    elements = sum(tensor.numel() for tensor in make_tensors(0, 0))
    shared = make_shared(dist_context, elements + 100)  # as with several groups, the widest of which counts
    for turn in range(20):  # a rank that is early must not write over what another still reads
        local_tensors = make_tensors(dist_context.rank, turn)
        shared.all_reduce(local_tensors)
        assert all(map(torch.equal, local_tensors, expected_sums(dist_context.world_size, turn)))
        padding = torch.zeros(-elements % dist_context.world_size)
        part = shared.reduce_scatter([*make_tensors(dist_context.rank, turn), padding])
        flat = torch.cat([*(tensor.flatten() for tensor in expected_sums(dist_context.world_size, turn)), padding])
        assert torch.equal(part, flat.view(dist_context.world_size, -1)[dist_context.rank])
        gathered = torch.empty_like(flat)
        shared.all_gather(gathered, part)
        assert torch.equal(gathered, flat)
    assert not list(Path("/dev/shm").glob("*gradients*"))
    destroy_process_group()
    return 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_memory_collectives_equal_sums_in_rank_order(ranks, tmp_path):
    log = tmp_path / "log"
    assert run_on_ranks(ranks, check_collectives, log=log) == 0, log.read_text()


def check_without_shared_memory() -> int:
    """Rank 1 may not open what rank 0 made: both go without."""
    dist_context = init_distributed()
    if dist_context.rank == 1:
        os.open = lambda *_: (_ for _ in ()).throw(PermissionError())  # type: ignore[assignment]
    assert Shared.of(dist_context, 10) is None
    destroy_process_group()
    return 0


def test_all_ranks_go_without_shared_memory_if_one_cannot_open_it(tmp_path):
    log = tmp_path / "log"
    assert run_on_ranks(2, check_without_shared_memory, log=log) == 0, log.read_text()


def test_one_rank_uses_no_shared_memory():
    assert Shared.of(simulated_context(1, "cpu"), 10) is None


# --- weights and moments that are held once ---


def make_adamw(weights: list[torch.Tensor]) -> torch.optim.AdamW:
    """Two groups of other rates, as LoRA+ has them."""
    groups = [{"params": weights[:2], "lr": 0.1}, {"params": weights[2:], "lr": 0.02}]
    return torch.optim.AdamW(groups, fused=True, weight_decay=0.1)


def make_weights() -> list[torch.Tensor]:
    return [torch.nn.Parameter(tensor) for tensor in make_tensors(7, 99)]


def check_updates(out: str) -> int:
    """Ten updates in common, and what a process alone makes of the same sums."""
    dist_context = init_distributed()
    shared_weights, reference_weights = make_weights(), make_weights()
    shared_optimizer, reference_optimizer = make_adamw(shared_weights), make_adamw(reference_weights)
    common = Common.of(dist_context, shared_optimizer, shared_weights)
    assert common is not None
    assert all(weight.data_ptr() % 64 == shared_weights[0].data_ptr() % 64 for weight in shared_weights), "aligned"
    for turn in range(10):
        local_grads, sums = make_tensors(dist_context.rank, turn), expected_sums(dist_context.world_size, turn)
        owned_grads = common.reduce(local_grads)
        assert len(owned_grads) == sum(common.owns(number) for number in range(len(shared_weights)))
        for number, weight in enumerate(shared_weights):
            weight.grad = local_grads[number] if common.owns(number) else None
        found_inf = float(turn == 4)  # left out by all
        for optimizer in (shared_optimizer, reference_optimizer):
            optimizer.found_inf = torch.tensor(found_inf)
        shared_optimizer.step()
        common.wait()
        for weight, tensor in zip(reference_weights, sums, strict=True):
            weight.grad = tensor
        reference_optimizer.step()
        for weight, other in zip(shared_weights, reference_weights, strict=True):
            torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-6, atol=1e-7)
            for key in ("step", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    shared_optimizer.state[weight][key], reference_optimizer.state[other][key], rtol=1e-5, atol=1e-7
                )
        common.wait()  # all have compared before the next update
    torch.save([weight.detach().clone() for weight in shared_weights], f"{out}/{dist_context.rank}.pt")
    destroy_process_group()
    return 0


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_a_shared_optimizer_gives_the_weights_and_moments_of_one_process(ranks, tmp_path):
    """Six ranks for four weights: two own none."""
    log = tmp_path / "log"
    assert run_on_ranks(ranks, check_updates, str(tmp_path), log=log) == 0, log.read_text()
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_every_shared_weight_has_one_owner_and_ranks_have_like_loads():
    sizes = [38_597_376, *[2_359_296] * 24, *[1_769_472] * 12, *[589_824] * 12, *[768] * 50]
    for ranks in (1, 2, 3):
        owner = owners(sizes, ranks)
        loads = [sum(size for size, of in zip(sizes, owner, strict=True) if of == rank) for rank in range(ranks)]
        assert len(owner) == len(sizes)
        assert max(loads) < 1.05 * sum(sizes) / ranks
    assert owners([], 2) == []


def check_shared_state(argv: list[str], data: str) -> int:
    """On a rank: a weight that one rank writes is what the other reads; and a loaded state stays in common."""
    from trainer.config import cli
    from trainer.data.dataset import load
    from trainer.distributed.engine import Engine
    from trainer.model.build import build_model, load_config
    from trainer.training.run_plan import make_plan

    dist_context = init_distributed()
    for flags, expected in (([], True), (["--ds-config", "zero1"], False), (["--optim", "adamw8bit"], False)):
        settings, dataset = cli.parse_args([*argv, *flags]).settings, load(Path(data))
        model = build_model(settings)
        plan = make_plan(settings, dist_context, dataset, model.metadata, load_config(settings.model))
        engine = Engine(dist_context, model, plan.deepspeed_config, settings.train, plan.precision)
        assert plan.resolved()["state_in_common"] == expected, flags
        assert ("in common" in plan._describe_execution()) == expected
        assert (engine.stepper.common is not None) == expected
        if expected:
            assert plan.deepspeed_file.name == "zero0"
            sizes = {name: shape for name, _, shape in engine.state.state_dict_layout()}
            engine.state.load_state_dict(partial(fill_tensor, sizes), 7, None)
            first = next(iter(engine.trainable_params.values()))
            states = (first.data, *(engine.optimizer.state[first][key] for key in ("step", "exp_avg", "exp_avg_sq")))
            assert [float(tensor.flatten()[0]) for tensor in states[1:]] == [7.0, 0.5, 0.5]
            engine.stepper.common.wait()
            if dist_context.rank == 1:
                for number, tensor in enumerate(states):
                    tensor.fill_(number + 0.25)
            engine.stepper.common.wait()
            assert [float(tensor.flatten()[-1]) for tensor in states] == [0.25, 1.25, 2.25, 3.25]
    destroy_process_group()
    return 0


def fill_tensor(sizes: dict[str, tuple[int, ...]], name: str) -> torch.Tensor:
    return torch.full(sizes[name], 0.5)


def test_an_engine_shares_optimizer_state_where_the_plan_says_so(tiny_model, data_files, data_dir, tmp_path):
    log = tmp_path / "log"
    words = make_argv(tiny_model, data_files, "full", "completion")
    assert run_on_ranks(2, check_shared_state, words, str(data_dir), log=log) == 0, log.read_text()
