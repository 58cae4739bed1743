"""How the ranks find one another: who is on which host, over which network interface they talk, which GPU each takes.

All of it is told through the store at which the ranks meet, before the first collective. Which ranks share a host is
found by the host's identity, not computed from variables that a launcher may not set.
"""

import contextlib
import functools
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from trainer.config.errors import TrainingError, UserError, report_error
from trainer.distributed.launch_environment import LaunchEnvironment
from trainer.distributed.watchdog import call_with_timeout

ANSWER_SECONDS = 15.0  # within which rank 0's store, once it listens, answers


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    host: str  #: the host's name
    identity: str  #: the same for the ranks of one host only: its name and the identity of its boot
    address: str  #: of the interface over which it reaches rank 0
    interface: str  #: that interface's name; empty where it is not known
    gpus: tuple[str, ...] = ()  #: identities of the GPUs that it sees, in its own order


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where all ranks run; the same on every rank."""

    places: tuple[Place, ...]

    @cached_property
    def hosts(self) -> tuple[str, ...]:
        """The name of each rank's host, with its address where two hosts have one name."""
        names = {place.identity: place.host for place in self.places}
        are_unique = len(set(names.values())) == len(names)
        return tuple(place.host if are_unique else f"{place.host} ({place.address})" for place in self.places)

    def ranks_beside(self, rank: int) -> list[int]:
        """The ranks on the host of `rank`, itself among them."""
        return [other for other, place in enumerate(self.places) if place.identity == self.places[rank].identity]

    def gpu_index(self, rank: int) -> int:
        """The GPU of a rank, in its own numbering: each takes the first that no lower rank of its host has.

        UserError where there is none left, on every rank alike. It holds where all see the same GPUs as where a
        scheduler shows each rank its own.
        """
        for leader in range(len(self.places)):
            taken_gpus: set[str] = set()
            for other in self.ranks_beside(leader):
                gpus = self.places[other].gpus
                index = next((n for n, gpu in enumerate(gpus) if gpu not in taken_gpus), None)
                if index is None:
                    ranks = f"{len(self.ranks_beside(leader))} ranks on {self.hosts[leader]}"
                    raise UserError(f"{ranks} with {len(taken_gpus)} GPUs: start at most one rank a GPU")
                taken_gpus.add(gpus[index])
                if other == rank:
                    rank_index = index
        return rank_index


def meet(launch: LaunchEnvironment, *, gpus: Sequence[str], timeout_seconds: float) -> tuple[Any, Placement]:
    """(the store at which all ranks have met, where they run).

    One line, as UserError on rank 0 where its port is taken, as TrainingError where a rank has not come within the
    time; it names who is missing.
    """
    here = Place(host=socket.gethostname(), identity=_host_identity(), address="", interface="", gpus=tuple(gpus))
    if launch.world_size == 1:
        return dist.HashStore(), Placement(places=(here,))
    store = _open_store(launch, timeout_seconds)
    address = _address_towards(launch.master_addr)
    places = _exchange(store, launch, "meet", {**asdict(here), "address": address}, timeout_seconds)
    address = _routable_address(address, here.identity, places)
    endpoint = {"address": address, "interface": _interface_of(address)}
    endpoints = _exchange(store, launch, "endpoint", endpoint, timeout_seconds)
    for place, endpoint in zip(places, endpoints, strict=True):
        place.update(endpoint, gpus=tuple(place["gpus"]))
    return store, Placement(places=tuple(Place(**place) for place in places))


def _open_store(launch: LaunchEnvironment, timeout_seconds: float) -> Any:
    """The store on rank 0, or torchrun's own where it keeps one, as torch's `env://` does it."""
    is_server = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_server and not _wait_for_port(launch.master_addr, launch.master_port, timeout_seconds):
        _give_up(
            f"rank {launch.rank} on {socket.gethostname()} cannot reach rank 0 at "
            f"{launch.master_addr}:{launch.master_port} within {timeout_seconds:g} s (--hang-timeout): "
            "is it started, is that its address, is the port open?"
        )

    make_store = functools.partial(
        dist.TCPStore,
        launch.master_addr,
        launch.master_port,
        launch.world_size,
        is_server,
        timedelta(seconds=timeout_seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    try:
        # In a thread: torch waits for ever for the answer of whoever else listens there.
        store = make_store() if is_server else call_with_timeout(ANSWER_SECONDS, make_store)
        if store is None:
            _other_run(launch, "what listens there does not answer")
    except dist.DistError as error:
        raise UserError(
            f"rank 0 cannot listen at port {launch.master_port} of {socket.gethostname()} "
            f"({str(error).splitlines()[0][:200]}); pass a free one, as --master_port of the launcher or in MASTER_PORT"
        ) from None
    store = dist.PrefixStore(f"trainer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    if store.add(f"came/{launch.rank}", 1) > 1:
        _other_run(launch, f"somebody else is rank {launch.rank} there")
    return store


def _other_run(launch: LaunchEnvironment, reason: str) -> NoReturn:
    _give_up(
        f"rank {launch.rank} on {socket.gethostname()}: at {launch.master_addr}:{launch.master_port} is not this run's "
        f"rank 0 ({reason}); pass a free port, as --master_port of the launcher or in MASTER_PORT"
    )


def _wait_for_port(host: str, port: int | None, timeout_seconds: float) -> bool:
    """Whether somebody listens there within the time. torch's own store says so with a traceback of C++."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((host, port or 0), timeout=2.0):
            return True
        time.sleep(0.2)
    return False


def _exchange(
    store: Any, launch: LaunchEnvironment, topic: str, value: dict[str, Any], timeout_seconds: float
) -> list[dict[str, Any]]:
    """What each rank says under a topic, in the order of ranks."""
    keys = [f"{topic}/{rank}" for rank in range(launch.world_size)]
    store.set(keys[launch.rank], json.dumps(value))
    try:
        store.wait(keys, timedelta(seconds=timeout_seconds))
        return [json.loads(store.get(key)) for key in keys]
    except dist.DistError:
        try:
            present = [rank for rank, key in enumerate(keys) if store.check([key])]
        except dist.DistError:  # rank 0 has left, with its own line
            present = [0]
        missing = ", ".join(str(rank) for rank in range(launch.world_size) if rank not in present)
        _give_up(
            f"of {launch.world_size} ranks these have not come to {launch.master_addr}:{launch.master_port} within "
            f"{timeout_seconds:g} s (--hang-timeout): {missing}",
            is_reporting_rank=launch.rank == min(present),
        )


def _give_up(message: str, *, is_reporting_rank: bool = True) -> NoReturn:
    """End here: the ranks that have not met cannot agree on who says why."""
    error = TrainingError(message)
    raise SystemExit(report_error(error) if is_reporting_rank else error.exit_code) from None


def _host_identity() -> str:
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:  # not Linux
        boot_id = f"{uuid.getnode():x}"
    return f"{socket.gethostname()}/{boot_id}"


def _address_towards(host: str) -> str:
    """The address of this host from which a packet to `host` would leave; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _routable_address(address: str, identity: str, places: Sequence[dict[str, Any]]) -> str:
    """`address`, unless that is a loopback while other hosts take part: then the one from which these are reached.

    Rank 0 gets a loopback where its own name leads to one (`127.0.1.1 name` in /etc/hosts, as Debian writes it).
    """
    others = [place["address"] for place in places if place["identity"] != identity]
    reachable = [other for other in others if not _is_loopback(other)]
    return _address_towards(reachable[0]) if _is_loopback(address) and reachable else address


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _interface_of(address: str) -> str:
    import psutil

    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(entry.address == address for entry in entries)), "")
