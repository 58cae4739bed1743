"""Ranks that do not find one another, or were not given the same, say so in one line and end."""

import contextlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.launch_ranks import run_on_ranks, train
from helpers.process_groups import RankProcesses, read_reproducible_records
from helpers.tiny_inputs import tiny_argv

HOST = re.escape(socket.gethostname())
DEMO_BASE = Path(__file__).parents[2] / "trainer" / "model" / "demo"


# --- faults: what is other on a rank than on the rest ---


def answer_soon(rank: int) -> None:
    from trainer.distributed import joining

    joining.ANSWER_SECONDS = 0.5


def type_on_second_host(rank: int, flags: str) -> None:
    if rank == 1:
        from trainer.config import cli

        parse_args = cli.parse_args
        cli.parse_args = lambda argv, **context: parse_args([*argv, *flags.split()], **context)


def other_flags_and_files(rank: int) -> None:
    type_on_second_host(rank, "--lr 0.05 --resume auto")
    own_folder(rank)


def own_folder(rank: int) -> None:
    """Files of one path have another content on each."""
    os.chdir(tempfile.mkdtemp())
    Path("zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1 + rank}}))
    Path("chat.jinja").write_text("{{ messages[0].content }}" + " " * rank)
    shutil.copytree(DEMO_BASE, "base")
    config = json.loads(Path("base/config.json").read_text())
    Path("base/config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-5 * 10**rank}))


def unusable_gpu(rank: int) -> None:
    """A driver is there, and this torch was built for no GPU."""
    if rank == 1:
        from trainer.distributed import machine

        del os.environ["CUDA_VISIBLE_DEVICES"]
        machine.GPU_FILES = (("/dev/null",),)


def other_devices(rank: int, **facts: Any) -> None:
    if rank == 1:
        from trainer.distributed import machine

        list_devices = machine.list_devices
        machine.list_devices = lambda **options: [{**device, **facts} for device in list_devices(**options)]


def two_hosts(rank: int) -> None:
    socket.gethostname = lambda: f"h{rank}"


def firewall(rank: int) -> None:
    """It lets the master's port through, and nothing else."""
    two_hosts(rank)
    connect = socket.create_connection

    def refuse_others(address: tuple[str, int], *args: Any, **kwargs: Any) -> Any:
        if address[1] != int(os.environ["MASTER_PORT"]):
            raise TimeoutError
        return connect(address, *args, **kwargs)

    socket.create_connection = refuse_others


@contextlib.contextmanager
def listening(address: str) -> Iterator[int]:
    with socket.create_server((address, 0)) as holder:
        yield holder.getsockname()[1]


@contextlib.contextmanager
def another_run() -> Iterator[int]:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.PrefixStore("trainer/0", store).set("rank/1", "another")
    yield store.port


@dataclass(frozen=True)
class Refusal:
    message: str  #: the end of a pattern; PORT is where `listen` does
    codes: tuple[int, ...] = (2, 2)
    fault: Callable[[int], None] | None = None
    flags: str = ""
    env: dict[str, str] = field(default_factory=dict)
    listen: Callable[[], Any] = contextlib.nullcontext


SECOND_OF_TWO = {"WORLD_SIZE": "2", "RANK": "1"}
DIFFER = r": all ranks must have the same$"
REFUSALS = {
    "a rank that does not come": Refusal(
        r"of 3 ranks these did not join 127\.0\.0\.1:\d+ within 5 s \(--hang-timeout\): 2 \(on c\)$",
        (1, 1),
        env={"WORLD_SIZE": "3", "TRAINER_HOSTS": "a:1,b:1,c:1"},
    ),
    "a name that nobody knows": Refusal(
        f"rank 1 on {HOST} cannot reach rank 0 at no.invalid:.* within 5 s .*: .*[Nn]ame.*MASTER_ADDR",
        (1,),
        env={**SECOND_OF_TWO, "MASTER_ADDR": "no.invalid"},
    ),
    "a port that is taken": Refusal(
        f"rank 0 on {HOST} cannot listen at port PORT .* pass a free",
        (2,),
        env={"WORLD_SIZE": "2"},
        listen=partial(listening, ""),
    ),
    "a port at which another run has met": Refusal(
        r"rank 1 on .*: 127.0.0.1:PORT is not this run's rank 0 \(it already has a rank 1\)",
        (1,),
        env=SECOND_OF_TWO,
        listen=another_run,
    ),
    "a port where somebody listens and says nothing": Refusal(
        r":PORT is not this run's rank 0 \(what listens there does not answer\); pass a free",
        (1,),
        answer_soon,
        env=SECOND_OF_TWO,
        listen=partial(listening, "127.0.0.1"),
    ),
    "a firewall between the hosts": Refusal(
        r"rank (0 on h0|1 on h1) cannot connect to rank . on h. at 127\.0\.0\.1:\d+ within 5 s \(--hang-timeout\): "
        "open all TCP ports between the hosts .* GLOO_SOCKET_IFNAME",
        (1, 1),
        firewall,
    ),
    "a GPU that torch cannot use": Refusal(
        r"on rank 1: torch \S+, built without CUDA, cannot use the GPU of this host; update the driver .*, or set "
        "CUDA_VISIBLE_DEVICES= to train on the CPU$",
        fault=unusable_gpu,
    ),
    "other flags, and other files of one name": Refusal(
        r"the setting train\.lr is 0\.0005 on rank 0 and 0\.05 on rank 1; "
        "the flag --resume is None on rank 0 and 'auto' on rank 1; "
        r"the content of --ds-config zero\.json is [0-9a-f]{12} on rank 0 and [0-9a-f]{12} on rank 1; "
        r"the content of --chat-template chat\.jinja is [0-9a-f]{12} on rank 0 and [0-9a-f]{12} on rank 1" + DIFFER,
        fault=other_flags_and_files,
        flags="--ds-config zero.json --chat-template chat.jinja",
    ),
    "the same weights and another configuration": Refusal(
        "the configuration of the base model is [0-9a-f]{12} on rank 0 and [0-9a-f]{12} on rank 1" + DIFFER,
        fault=own_folder,
        flags="--model base",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_ranks_that_do_not_meet_or_differ_say_so_in_one_line(name, session_dir, tmp_path):
    case = REFUSALS[name]
    argv = ["--mode", "full", "--hang-timeout", "5", *case.flags.split()]
    with case.listen() as port:
        env = {**case.env, **({"MASTER_PORT": str(port)} if port else {})}
        group = RankProcesses(argv, out=tmp_path / "run", world_size=len(case.codes), env=env, fault=case.fault)
        assert group.wait() == list(case.codes), group.output
    assert re.search(f"^error: .*{case.message.replace('PORT', str(port))}", group.error_line), group.error_line
    assert "frame #" not in group.output, "torch's stack in C++"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_joins_nobody_and_rank_0_alone_prints_it(session_dir, tmp_path):
    for rank in ("1", "0"):
        env = {"WORLD_SIZE": "2", "RANK": rank}
        group = RankProcesses(["--mode", "full", "--dry-run"], out=tmp_path / "run", world_size=1, env=env)
        assert group.wait() == [0], group.output
        assert ("1 accumulation x 2 ranks" in group.output) == (rank == "0")
    assert not (tmp_path / "run").exists()


def test_precision_and_zero_file_are_those_of_the_least_device(tiny_model, data_files, tmp_path):
    """Rank 1 has a better one, which decides nothing: all numbers are those of two equal ranks."""
    flags = "--mode full --block-size 16 --global-batch 6 --max-steps 3 --export none --num-samples 0"
    argv = tiny_argv(tiny_model, data_files, flags)
    train(argv, out=tmp_path / "equal", world_size=2)
    better = partial(other_devices, bf16=True, memory=2**50)
    group = RankProcesses(argv, out=tmp_path / "better", fault=better)
    assert group.wait() == [0, 0], group.output
    assert read_reproducible_records(tmp_path / "better") == read_reproducible_records(tmp_path / "equal")
    assert json.loads((tmp_path / "better" / "run.json").read_text())["resolved"]["precision"] == "fp32"


class CountingStore:
    def __init__(self, store: Any):
        self.store, self.calls = store, []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.store, name)


def join_four_hosts() -> int:
    """Of 4 ranks on as many hosts. The master's address is of another interface than the user chose for gloo."""
    import psutil

    from trainer.distributed import joining
    from trainer.distributed.launch_environment import read_launch_environment

    def entry(address: str) -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET, address=address)

    two_hosts(int(os.environ["RANK"]))
    psutil.net_if_addrs = lambda: {"lo": [entry("127.0.0.1")], "ib0": [entry("127.0.0.2")]}
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0,lo"
    open_store, stores = joining._open_store, []

    def open_counting(*args: Any) -> Any:
        stores.append(CountingStore(open_store(*args)))
        return stores[0]

    joining._open_store = open_counting
    *kept, network = joining.meet(read_launch_environment(os.environ), {"devices": []}, 60)
    time.sleep(2 * (os.environ["RANK"] == "0"))  # the others join its second store
    del kept
    assert stores[0].calls == ["compare_set", "multi_get", "set", "wait"], stores[0].calls
    assert (network, os.environ["NCCL_SOCKET_IFNAME"]) == ("ib0 (127.0.0.2)", "=ib0")
    return 0


def test_joining_costs_four_calls_of_the_store_and_uses_the_interface_that_gloo_was_given(tmp_path):
    """Whatever the number of ranks; NCCL and the connections that are tried use it, too."""
    assert run_on_ranks(4, join_four_hosts, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
