"""Ranks that do not find one another, or were not given the same, say so in one line and end."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.process_groups import RankProcesses

FLAGS = ["--mode", "full", "--hang-timeout", "5"]


def refusal(tmp_path: Path, codes: list[int], fault: Callable[[int], None] | None = None, **env: str) -> str:
    """The one line of ranks that end with these codes; `env`: what is other than where they find one another."""
    group = RankProcesses(FLAGS, out=tmp_path / "run", world_size=len(codes), env=env, fault=fault)
    assert group.wait() == codes, group.output
    (line,) = group.error_lines
    return line


def test_a_rank_that_does_not_come_is_named_once(session_dir, tmp_path):
    line = refusal(tmp_path, [1, 1], WORLD_SIZE="3")
    assert line.startswith("error: of 3 ranks these did not join 127.0.0.1:")
    assert line.endswith("within 5 s (--hang-timeout): 2")


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked(session_dir, tmp_path):
    line = refusal(tmp_path, [1], WORLD_SIZE="2", RANK="1")
    assert line.startswith(f"error: rank 1 on {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:")


def test_a_port_that_is_taken_is_named(session_dir, tmp_path):
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        line = refusal(tmp_path, [2], WORLD_SIZE="2", MASTER_PORT=str(port))
    assert f"cannot listen at port {port} of {socket.gethostname()}" in line


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_dry_run_joins_nobody(rank, session_dir, tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": rank}
    group = RankProcesses([*FLAGS, "--dry-run"], out=tmp_path / "run", world_size=1, env=env)
    assert group.wait() == [0], group.output
    assert ("1 accumulation x 2 ranks" in group.output) == (rank == "0")
    assert not Path(tmp_path / "run").exists()


def test_a_port_at_which_another_run_has_met_is_named(session_dir, tmp_path):
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.PrefixStore("trainer/0", store).set("rank/1", "another")
    line = refusal(tmp_path, [1], WORLD_SIZE="2", RANK="1", MASTER_PORT=str(store.port))
    assert f": 127.0.0.1:{store.port} is not this run's rank 0 (it already has a rank 1)" in line


def answer_soon(rank: int) -> None:
    from trainer.distributed import process_group

    process_group.ANSWER_SECONDS = 0.5


def test_a_port_where_somebody_listens_and_says_nothing_is_named(session_dir, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        line = refusal(tmp_path, [1], answer_soon, WORLD_SIZE="2", RANK="1", MASTER_PORT=str(port))
    assert f":{port} is not this run's rank 0 (what listens there does not answer); pass a free" in line


def type_other_rate(rank: int) -> None:
    """A fault: what the user typed on the second host."""
    if rank == 1:
        from trainer.config import cli

        parse_args = cli.parse_args
        cli.parse_args = lambda: parse_args([*sys.argv[1:], "--lr", "0.05"])


def test_other_flags_on_one_rank_are_refused_once(session_dir, tmp_path):
    group = RankProcesses(["--mode", "full"], out=tmp_path / "run", fault=type_other_rate)
    assert group.wait() == [2, 2], group.output
    (line,) = group.error_lines
    assert line == "error: the setting train.lr is 0.0005 on rank 0 and 0.05 on rank 1: all ranks must have the same"
    assert not (tmp_path / "run").exists()
