"""Which ranks share a host and which GPU each takes, from what the ranks say of themselves."""

from typing import Any

import pytest

from trainer.config.errors import UserError
from trainer.distributed.process_group import assign_gpus, name_hosts


def describe(host: str, boot: str, address: str) -> dict[str, Any]:
    return {"host": host, "identity": f"{host}/{boot}", "address": address}


def test_two_hosts_of_one_name_are_two_hosts():
    different = [describe("a", "1", "10.0.0.1"), describe("b", "2", "10.0.0.2"), describe("b", "2", "10.0.0.2")]
    assert name_hosts(different) == ("a", "b", "b")
    cloned = [describe("node", "1", "10.0.0.1"), describe("node", "2", "10.0.0.2"), describe("node", "1", "10.0.0.9")]
    assert name_hosts(cloned) == ("node (10.0.0.1)", "node (10.0.0.2)", "node (10.0.0.1)")


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([("x", "y"), ("x", "y"), ("x",)], [0, 1, 0]),  # CUDA_VISIBLE_DEVICES of the whole host, as torchrun leaves it
        ([("x",), ("y",), ("z",)], [0, 0, 0]),  # srun --gpus-per-task: each sees its own as its first
        ([("y", "x"), ("x", "y"), ("z",)], [0, 0, 0]),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(gpus, expected):
    assert assign_gpus(("a", "a", "b"), gpus) == expected


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(UserError, match="2 ranks on b with 1 GPUs: start at most one rank a GPU"):
        assign_gpus(("a", "b", "b"), [("x",), ("y",), ("y",)])
