"""Which link is the slowest, and what a step sends over it, from times that are made up."""

from itertools import combinations
from typing import Any

import pytest
from helpers.engines import context_of_hosts

from trainer.distributed import network_check
from trainer.distributed.memory_estimate import ParamCounts
from trainer.distributed.network_check import LinkSpeed, describe_link, measure_pairs, measure_ring, pair_rounds
from trainer.distributed.process_group import DistContext

LORA = ParamCounts(frozen=1_915_360, trainable=102_400)


def make_context(hosts: tuple[str, ...], seconds: tuple[float, ...] = ()) -> DistContext:
    return context_of_hosts(*hosts, gather=lambda _: [(each, 0.001) for each in seconds])


def record_messages(monkeypatch, seconds: float = 0.001) -> list[tuple[int, int | None]]:
    """(bytes, to which rank) of every exchange, each taking so long here."""
    messages: list[tuple[int, int | None]] = []

    def exchange(_: DistContext, num_bytes: int, target: int | None, source: int | None) -> float:
        messages.append((num_bytes, target))
        return seconds

    monkeypatch.setattr(network_check, "_exchange_seconds", exchange)
    return messages


@pytest.mark.parametrize(
    ("hosts", "seconds", "link", "link_seconds"),
    [
        (("a", "b", "c"), (0.01, 0.05, 0.05), ("b", "c"), 0.05),  # both ends of a slow link see it
        (("a", "b", "c"), (0.05, 0.01, 0.05), ("c", "a"), 0.05),
        (("a", "a", "b"), (0.09, 0.09, 0.02), ("a", "b"), 0.02),  # between ranks of one host there is no link
    ],
)
def test_the_slowest_link_is_found_by_both_of_its_ends(hosts, seconds, link, link_seconds, monkeypatch):
    messages = record_messages(monkeypatch)
    speed = measure_ring(make_context(hosts, seconds))
    assert speed is not None
    assert (speed.source, speed.target) == link
    assert messages[-1] == (network_check.MESSAGE_BYTES[-1], 1)
    assert speed.bandwidth == messages[-1][0] / link_seconds


def test_a_slow_network_is_not_asked_for_more_and_one_host_not_at_all(monkeypatch):
    messages = record_messages(monkeypatch)
    measure_ring(make_context(("a", "b"), (0.2, 0.2)))
    assert messages[-1][0] == network_check.MESSAGE_BYTES[0]
    assert measure_ring(make_context(("a", "a"))) is None


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_every_pair_meets_once_and_no_rank_has_two_at_a_time(size):
    rounds = pair_rounds(size)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(size), 2))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == size - 1 + size % 2


def test_a_slow_pair_does_not_cut_the_measuring_of_another_short(monkeypatch):
    messages = record_messages(monkeypatch)
    speeds = measure_pairs(make_context(("a", "b", "c", "d"), (0.2, 0.01, 0.2, 0.01)))
    by_link = {(speed.source, speed.target): speed.bandwidth for speed in speeds}
    assert by_link["a", "c"] == network_check.MESSAGE_BYTES[0] / 0.2
    assert by_link["b", "d"] == network_check.MESSAGE_BYTES[-1] / 0.01
    assert [target for num_bytes, target in messages if num_bytes == 2**23] == [3, None, 1], "of rank 0"


@pytest.mark.parametrize(
    ("counts", "stage", "message"),
    [
        # 4 bytes x 2 (n-1)/n of what is trained; stage 3: of 3 trained + 2 frozen, half of that
        (LORA, 1, "a step sends 0.41 MB, 4 ms; one of --mode full 7.66 MB, 77 ms"),
        (LORA, 3, "a step sends 4.24 MB, 42 ms; one of --mode full 7.66 MB, 77 ms"),
        (ParamCounts(frozen=0, trainable=1_915_360), 0, "the slowest link: a step sends 7.66 MB, 77 ms"),
    ],
)
def test_the_line_says_what_a_step_waits(counts: Any, stage: int, message: str):
    speed = LinkSpeed(source="a", target="b", bandwidth=1e8, latency_seconds=3e-4)
    line = describe_link(speed, counts, stage=stage, world_size=2)
    assert line.startswith("0.1 GB/s and 0.3 ms from a to b, the slowest link: ")
    assert line.endswith(message)
    line = describe_link(speed, counts, stage=stage, world_size=2, step_seconds=0.51)
    assert " ms beside the 510 ms that a step takes here" in line
