"""The ranks of a run: who shares a host, which GPU each takes, and what must be the same on all of them."""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import context_of_hosts

from trainer.config.errors import UserError
from trainer.distributed import preflight
from trainer.distributed.process_group import assign_gpus, name_hosts
from trainer.training import provenance


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


def compare(*facts_of_ranks: dict[str, Any], hosts: tuple[str, ...] = ("h1", "h2", "h2")) -> None:
    """What rank 0 is told where the ranks have these facts."""
    context = context_of_hosts(*hosts[: len(facts_of_ranks)], gather=lambda _: list(facts_of_ranks))
    preflight.refuse_differences(context, facts_of_ranks[0])


def test_equal_facts_pass_and_a_rank_may_not_know_one():
    compare({"torch": "2.13", "the base model": "abc"}, {"torch": "2.13", "the base model": "abc"}, {"torch": "2.13"})
    compare({"the base model": None}, {"the base model": "abc"})


def test_a_difference_is_named_with_both_values_and_hosts():
    with pytest.raises(UserError) as refusal:
        compare({"torch": "2.13", "data": "x"}, {"torch": "2.12", "data": "x"}, {"torch": "2.13", "data": "y"})
    assert str(refusal.value) == (
        "torch is 2.13 on h1 (rank 0) and 2.12 on h2 (rank 1); data is x on h1 (rank 0) and y on h2 (rank 2): "
        "all ranks must have the same"
    )


def test_on_one_host_ranks_are_named_and_many_differences_are_cut():
    facts = {f"fact {number}": number for number in range(9)}
    with pytest.raises(UserError) as refusal:
        compare(facts, dict.fromkeys(facts, 99), hosts=("h1", "h1"))
    assert str(refusal.value).startswith("fact 0 is 0 on rank 0 and 99 on rank 1; ")
    assert str(refusal.value).endswith("; and 4 more: all ranks must have the same")


def test_versions_the_programs_files_and_every_setting_are_facts():
    facts = preflight.program_facts({"mode": "full", "train": {"lr": 1e-3}, "overridden": ["--lr"]})
    assert {"torch", "deepspeed", "this program", "Python"} <= set(facts)
    assert facts["the setting train.lr"] == "0.001"
    assert facts["the setting mode"] == "full"
    assert facts["this program"] == preflight.program_facts({})["this program"]


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path):
    preflight.refuse_full_disk(tmp_path / "runs" / "new", 1000)
    with pytest.raises(UserError, match=r"[\d,]+ MiB are free and a checkpoint takes 1,000,000,000; .*--output-dir"):
        preflight.refuse_full_disk(tmp_path / "runs" / "new", 1e9 * 2**20)


@pytest.mark.parametrize(("failing", "message"), [({2}, "on h2 (rank 2): no such file"), ({0, 2}, "no such file")])
def test_what_one_host_alone_cannot_do_is_said_with_its_name(failing, message):
    """Ranks 0 and 1 are on h1, 2 on h2."""
    results = [(None, UserError("no such file") if rank in failing else None) for rank in range(3)]
    context = context_of_hosts("h1", "h1", "h2", gather=lambda _: results)
    with pytest.raises(UserError) as refusal:
        context.on_rank_zero(lambda: None, per_node=True)
    assert str(refusal.value) == message


def test_clocks_that_differ_are_a_note(monkeypatch):
    context = context_of_hosts("h1", "h2", gather=lambda value: [value, value and value + 90.4])
    assert provenance.describe_clocks(context) == "the clock of h2 is 90 s ahead of that of h1"
    monkeypatch.setattr(provenance, "MAX_CLOCK_SECONDS", 91)
    assert provenance.describe_clocks(context) is None
