"""Which ranks share a host and which GPU each takes, from what the ranks say of themselves."""

import pytest

from trainer.config.errors import UserError
from trainer.distributed.rendezvous import Place, Placement


def make_placement(*places: tuple[str, str, tuple[str, ...]]) -> Placement:
    """Of each rank its host's name, the identity of the host's boot, and its GPUs."""
    return Placement(
        places=tuple(
            Place(host=host, identity=f"{host}/{boot}", address=f"10.0.0.{rank}", interface="eth0", gpus=gpus)
            for rank, (host, boot, gpus) in enumerate(places)
        )
    )


def test_ranks_of_a_host_are_found_by_its_identity():
    mixed = make_placement(("a", "1", ()), ("b", "2", ()), ("b", "2", ()))
    assert mixed.hosts == ("a", "b", "b")
    assert [mixed.ranks_beside(rank) for rank in range(3)] == [[0], [1, 2], [1, 2]]


def test_two_hosts_of_one_name_are_two_hosts():
    cloned = make_placement(("node", "1", ()), ("node", "2", ()))
    assert cloned.hosts == ("node (10.0.0.0)", "node (10.0.0.1)")
    assert cloned.ranks_beside(0) == [0]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([("x", "y"), ("x", "y"), ("z",)], [0, 1, 0]),  # CUDA_VISIBLE_DEVICES of the whole host, as torchrun leaves it
        ([("x",), ("y",), ("z",)], [0, 0, 0]),  # srun --gpus-per-task: each sees its own as its first
        ([("y", "x"), ("x", "y"), ("z",)], [0, 0, 0]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(gpus, expected):
    placement = make_placement(("a", "1", gpus[0]), ("a", "1", gpus[1]), ("b", "2", gpus[2]))
    assert [placement.gpu_index(rank) for rank in range(3)] == expected


def test_more_ranks_than_gpus_are_refused_on_every_rank():
    crowded = make_placement(("a", "1", ("x",)), ("b", "2", ("y",)), ("b", "2", ("y",)))
    for rank in range(3):
        with pytest.raises(UserError, match="2 ranks on b with 1 GPUs: start at most one rank a GPU"):
            crowded.gpu_index(rank)
