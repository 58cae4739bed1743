"""Ranks that were not given the same are refused before the first step; tests/faults/test_hosts.py has other files."""

import sys
from functools import partial

from helpers.process_groups import RankProcesses


def type_other_flags_on_rank_1(rank: int, flags: list[str]) -> None:
    """A fault: what the user typed on the second host."""
    if rank == 1:
        from trainer.config import cli

        parse_args = cli.parse_args
        cli.parse_args = lambda: parse_args([*sys.argv[1:], *flags])


def test_other_flags_on_one_rank_are_refused_once(session_dir, tmp_path):
    fault = partial(type_other_flags_on_rank_1, flags=["--lr", "0.05"])
    group = RankProcesses(["--mode", "full"], out=tmp_path / "run", fault=fault)
    assert group.wait() == [2, 2], group.output
    (line,) = group.error_lines
    assert line == "error: the setting train.lr is 0.0005 on rank 0 and 0.05 on rank 1: all ranks must have the same"
    assert not (tmp_path / "run").exists()
