"""Which link is the slowest, and what a step sends over it, from times that are made up."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.distributed import network_check
from trainer.distributed.memory_estimate import ParamCounts
from trainer.distributed.network_check import RingSpeed, describe_ring, measure_ring
from trainer.distributed.process_group import DistContext, simulated_context
from trainer.distributed.rendezvous import Place, Placement

LORA = ParamCounts(frozen=1_915_360, trainable=102_400)


def make_context(hosts: tuple[str, ...], seconds: tuple[float, ...] = ()) -> DistContext:
    places = tuple(Place(host=host, identity=host, address="", interface="") for host in hosts)
    context = replace(simulated_context(len(hosts), "cpu"), placement=Placement(places=places))
    object.__setattr__(context, "all_gather_object", lambda _: [(each, 0.001) for each in seconds])
    return context


@pytest.mark.parametrize(
    ("hosts", "seconds", "link"),
    [
        (("a", "b", "c"), (0.01, 0.05, 0.05), (1, 2)),  # both ends of a slow link see it
        (("a", "b", "c"), (0.05, 0.01, 0.05), (2, 0)),
        (("a", "a", "b"), (0.09, 0.09, 0.02), (1, 2)),  # between ranks of one host there is no link
    ],
)
def test_the_slowest_link_is_found_by_both_of_its_ends(hosts, seconds, link, monkeypatch):
    sizes = []
    monkeypatch.setattr(network_check, "_exchange_seconds", lambda _, num_bytes: sizes.append(num_bytes) or 0.001)
    speed = measure_ring(make_context(hosts, seconds))
    assert speed is not None
    assert (speed.source, speed.target) == link
    assert sizes[-1] == network_check.MESSAGE_BYTES[-1]
    assert speed.bandwidth == sizes[-1] / min(seconds[link[0]], seconds[link[1]])


def test_a_slow_network_is_not_asked_for_more_and_one_host_not_at_all(monkeypatch):
    sizes = []
    monkeypatch.setattr(network_check, "_exchange_seconds", lambda _, num_bytes: sizes.append(num_bytes) or 0.001)
    measure_ring(make_context(("a", "b"), (0.2, 0.2)))
    assert sizes[-1] == network_check.MESSAGE_BYTES[0]
    assert measure_ring(make_context(("a", "a"))) is None


@pytest.mark.parametrize(
    ("counts", "stage", "message"),
    [
        # 4 bytes x 2 (n-1)/n of what is trained; stage 3: of 3 trained + 2 frozen, half of that
        (LORA, 1, "a step sends 0.41 MB, 4 ms; one of --mode full 7.66 MB, 77 ms"),
        (LORA, 3, "a step sends 8.28 MB, 83 ms; one of --mode full 11.5 MB, 115 ms"),
        (ParamCounts(frozen=0, trainable=1_915_360), 0, "the slowest link: a step sends 7.66 MB, 77 ms"),
    ],
)
def test_the_line_says_what_a_step_waits(counts: Any, stage: int, message: str):
    speed = RingSpeed(source=0, target=1, bandwidth=1e8, latency_seconds=3e-4)
    line = describe_ring(speed, make_context(("a", "b")), counts, stage=stage)
    assert line.startswith("0.1 GB/s and 0.3 ms from a to b, the slowest link: ")
    assert line.endswith(message)
