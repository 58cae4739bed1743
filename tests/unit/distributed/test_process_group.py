"""The ranks of a run: their hosts, the GPU of each, what must be the same on all, and the stacks of a run that hung."""

import contextlib
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engines import context_of_hosts

from trainer.config.errors import UserError
from trainer.distributed import machine, process_group
from trainer.distributed.joining import name_hosts, refuse_unequal_hosts
from trainer.distributed.machine import assign_devices
from trainer.distributed.process_group import simulated_context
from trainer.training import run_folder


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ("a/1/10.0.0.1 b/2/10.0.0.2 b/2/10.0.0.2", ("a", "b", "b")),
        ("n/1/10.0.0.1 n/2/10.0.0.2 n/1/10.0.0.9", ("n (10.0.0.1)", "n (10.0.0.2)", "n (10.0.0.1)")),
    ],
)
def test_two_hosts_of_one_name_are_two_hosts(places, expected):
    rows = [place.split("/") for place in places.split()]
    assert name_hosts([{"host": h, "identity": f"{h}/{boot}", "address": a} for h, boot, a in rows]) == expected


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([("x", "y"), ("x", "y"), ("x",)], [0, 1, 0]),  # CUDA_VISIBLE_DEVICES of the whole host, as torchrun leaves it
        ([("x",), ("y",), ("z",)], [0, 0, 0]),  # srun --gpus-per-task: each sees its own as its first
        ([("x",), ("x",), ("z",)], "2 ranks on a with 1 GPUs: start at most one rank a GPU"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(gpus, expected):
    with pytest.raises(UserError, match=expected) if isinstance(expected, str) else contextlib.nullcontext():
        assert assign_devices(("a", "a", "b"), [[{"id": gpu} for gpu in row] for row in gpus]) == expected


KERNELS = ["sm_75", "sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("environ", "available", "files", "capability", "expected"),
    [
        ({}, False, ["nvidiactl"], None, "cannot use the GPU of this host"),
        ({}, False, ["dxg", "libcuda.so.1"], None, "cannot use the GPU of this host"),  # WSL2
        ({"CUDA_VISIBLE_DEVICES": "7"}, False, ["nvidiactl"], None, r"this host \(CUDA_VISIBLE_DEVICES=7\)"),
        ({"CUDA_VISIBLE_DEVICES": ""}, False, ["nvidiactl"], None, ""),
        ({}, True, ["nvidiactl"], (8, 6), ""),  # runs what was compiled for 8.0
        ({}, True, ["nvidiactl"], (12, 0), ""),  # translates compute_90
        ({}, True, ["nvidiactl"], (7, 0), r"no kernels for GPU 0, V100 \(sm_70\), only sm_75 "),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_said_with_the_remedy(
    environ, available, files, capability, expected, tmp_path, monkeypatch
):
    for name in files:
        (tmp_path / name).touch()
    sets = tuple(tuple(str(tmp_path / Path(name).name) for name in names) for names in machine.GPU_FILES)
    monkeypatch.setattr(machine, "GPU_FILES", sets)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: KERNELS)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "V100")
    problem = machine.find_gpu_problem(environ)
    assert bool(problem) == bool(expected)
    assert re.search(expected, problem)
    assert not problem or problem.endswith("CUDA_VISIBLE_DEVICES= to train on the CPU")


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([{"problem": ""}, {"problem": "no disk"}], r"on b \(rank 1\): no disk"),
        ([{"kind": "cuda"}, {}], r"there is a GPU on a \(rank 0\) and none on b \(rank 1\): all ranks must have one"),
        (
            [{"kind": "cuda", "shm_mib": 64.0}] * 3,
            r"on b \(rank 1\): /dev/shm has 64 MiB free, and NCCL takes 80; .*shm-size",
        ),
        ([{"kind": "cuda"}] * 3, None),  # NCCL_SHM_DISABLE=1
    ],
)
def test_a_host_that_cannot_take_part_is_refused_alike_on_every_rank(ranks, expected):
    """Of three ranks one is alone on its host, which talks over the network only."""
    said = [{"problem": "", "kind": "cpu", "shm_mib": math.inf, **rank} for rank in ranks]
    with pytest.raises(UserError, match=expected) if expected else contextlib.nullcontext():
        refuse_unequal_hosts(("a", "b", "b")[: len(ranks)], said)


def test_the_limit_on_open_files_is_raised_to_what_the_ranks_need(monkeypatch):
    limits = [(1024, 524288)]
    monkeypatch.setattr(machine.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(machine.resource, "setrlimit", lambda _, pair: limits.append(pair))
    assert machine.find_host_problem({}, on_gpu=False, world_size=512) == ""
    assert limits[-1] == (3072, 524288)
    limits[:] = [(1024, 2048)]
    assert machine.find_host_problem({}, on_gpu=False, world_size=512).startswith("at most 2048 files may be open here")


def test_an_unknown_interface_is_named_with_those_there_are():
    message = r"GLOO_SOCKET_IFNAME=ib7: no such network interface; expected one of .*\blo\b"
    assert re.match(message, machine.find_host_problem({"GLOO_SOCKET_IFNAME": "lo,ib7"}, on_gpu=False, world_size=2))


def test_many_ranks_and_hosts_fit_a_line():
    hosts = [f"node{number:02d}" for number in range(64) for _ in range(8)]
    text = replace(simulated_context(512), hosts=tuple(hosts)).describe_hosts()
    assert text.startswith("node00: ranks 0, 1, 2, 3, 4, 5, 6, 7; node01: ranks 8, 9, ")
    assert text.endswith("; 60 more hosts; gloo")


MANY = {f"fact {number}": number for number in range(9)}


@pytest.mark.parametrize(
    ("hosts", "facts_of_ranks", "expected"),
    [
        (("h1", "h2", "h2"), ({"torch": "2", "base": "a"}, {"torch": "2", "base": "a"}, {"torch": "2"}), ""),
        (
            ("h1", "h2", "h2"),
            ({"torch": "2", "data": "x"}, {"torch": "1", "data": "x"}, {"torch": "2", "data": "y"}),
            r"torch is 2 on h1 \(rank 0\) and 1 on h2 \(rank 1\); data is x on h1 \(rank 0\) and y on h2 \(rank 2\): "
            "all ranks must have the same",
        ),
        (
            ("h1", "h1"),
            (MANY, dict.fromkeys(MANY, 99)),
            "fact 0 is 0 on rank 0 and 99 on rank 1; .*; and 4 more: all ranks must have the same",
        ),
    ],
)
def test_a_difference_is_named_with_both_values_and_where_they_are(hosts, facts_of_ranks, expected):
    context = context_of_hosts(*hosts, gather=lambda _: list(facts_of_ranks))
    with pytest.raises(UserError, match=f"^{expected}$") if expected else contextlib.nullcontext():
        process_group.refuse_differences(context, facts_of_ranks[0])


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path):
    machine.refuse_full_disk(tmp_path / "runs" / "new", 1000)
    with pytest.raises(UserError, match=r"[\d,]+ MiB are free and a checkpoint takes 1,000,000,000; .*--output-dir"):
        machine.refuse_full_disk(tmp_path / "runs" / "new", 1e9 * 2**20)


@pytest.mark.parametrize(("failing", "message"), [({2}, "on h2 (rank 2): no such file"), ({0, 2}, "no such file")])
def test_what_one_host_alone_cannot_do_is_said_with_its_name(failing, message):
    """Ranks 0 and 1 are on h1, 2 on h2."""
    results: list[Any] = [(None, UserError("no such file") if rank in failing else None) for rank in range(3)]
    context = context_of_hosts("h1", "h1", "h2", gather=lambda _: results)
    with pytest.raises(UserError) as refusal:
        context.on_rank_zero(lambda: None, per_node=True)
    assert str(refusal.value) == message


def test_clocks_that_differ_are_a_note(monkeypatch):
    context = context_of_hosts("h1", "h2", gather=lambda value: [value, value and value + 90.4])
    assert run_folder.describe_clocks(context) == "the clock of h2 is 90 s ahead of that of h1"
    monkeypatch.setattr(run_folder, "MAX_CLOCK_SECONDS", 91)
    assert run_folder.describe_clocks(context) is None
