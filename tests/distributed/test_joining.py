"""Ranks that do not find one another, or were not given the same, say so in one line and end."""

import contextlib
import re
import socket
import sys
from collections.abc import Iterator

import pytest
from helpers.process_groups import RankProcesses

FLAGS = ["--mode", "full", "--hang-timeout", "5"]
HOST = re.escape(socket.gethostname())


def answer_soon(rank: int) -> None:
    from trainer.distributed import process_group

    process_group.ANSWER_SECONDS = 0.5


def type_other_rate(rank: int) -> None:
    """A fault: what the user typed on the second host."""
    if rank == 1:
        from trainer.config import cli

        parse_args = cli.parse_args
        cli.parse_args = lambda: parse_args([*sys.argv[1:], "--lr", "0.05"])


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


#: What the ranks find of one another, the exit codes, and the one line; PORT is what the context manager listens at.
REFUSALS = {
    "a rank that does not come": (
        ({"WORLD_SIZE": "3"}, None, None),
        [1, 1],
        r"of 3 ranks these did not join 127\.0\.0\.1:\d+ within 5 s \(--hang-timeout\): 2$",
    ),
    "a rank that cannot reach rank 0": (
        ({"WORLD_SIZE": "2", "RANK": "1"}, None, None),
        [1],
        f"rank 1 on {HOST} cannot reach rank 0 at 127.0.0.1:",
    ),
    "a port that is taken": (
        ({"WORLD_SIZE": "2"}, lambda: listening(""), None),
        [2],
        f"rank 0 cannot listen at port PORT of {HOST} ",
    ),
    "a port at which another run has met": (
        ({"WORLD_SIZE": "2", "RANK": "1"}, another_run, None),
        [1],
        r"rank 1 on .*: 127.0.0.1:PORT is not this run's rank 0 \(it already has a rank 1\)",
    ),
    "a port where somebody listens and says nothing": (
        ({"WORLD_SIZE": "2", "RANK": "1"}, lambda: listening("127.0.0.1"), answer_soon),
        [1],
        r":PORT is not this run's rank 0 \(what listens there does not answer\); pass a free",
    ),
    "other flags on one rank": (
        ({}, None, type_other_rate),
        [2, 2],
        r"the setting train\.lr is 0\.0005 on rank 0 and 0\.05 on rank 1: all ranks must have the same$",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_ranks_that_do_not_meet_or_differ_say_so_in_one_line(name, session_dir, tmp_path):
    (env, listen, fault), codes, message = REFUSALS[name]
    with listen() if listen is not None else contextlib.nullcontext() as port:
        variables = {**env, "MASTER_PORT": str(port)} if port else env
        group = RankProcesses(FLAGS, out=tmp_path / "run", world_size=len(codes), env=variables, fault=fault)
        assert group.wait() == codes, group.output
    assert re.search(f"^error: .*{message.replace('PORT', str(port))}", group.error_line), group.error_line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_dry_run_joins_nobody(rank, session_dir, tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": rank}
    group = RankProcesses([*FLAGS, "--dry-run"], out=tmp_path / "run", world_size=1, env=env)
    assert group.wait() == [0], group.output
    assert ("1 accumulation x 2 ranks" in group.output) == (rank == "0")
    assert not (tmp_path / "run").exists()
