"""How the ranks of a run find one another: the store, what each says of itself, and connections between their hosts.

torch's own `env://` waits for late ranks without naming them, and for ever where something else listens at the port.
"""

import ipaddress
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from trainer.config.errors import TrainingError, UserError, first_line, report_error
from trainer.config.text import list_some
from trainer.distributed import machine
from trainer.distributed.launch_environment import LaunchEnvironment, hosts_of_ranks
from trainer.distributed.watch import call_with_timeout

ANSWER_SECONDS = 15.0  # within which a store that listens answers
MAX_HOSTS_SHOWN, MAX_RANKS_SHOWN = 4, 8
PORT_HINT = "pass a free one, as --master_port of the launcher or in MASTER_PORT"


def meet(
    launch: LaunchEnvironment, here: dict[str, Any], timeout_seconds: float
) -> tuple[Any, Any, list[dict[str, Any]], str]:
    """(the store in which all ranks have met, one of their own for the watchdog, what each rank says of itself, the
    network interface of this one), by at most four calls of the store. Ranks that do not meet end here, with one line.
    """
    host = socket.gethostname()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    here = {**here, "host": host, "identity": f"{host}/{boot_id}", "board": 0}
    if launch.world_size == 1:
        return dist.HashStore(), None, [{**here, "address": "127.0.0.1"}], ""
    rank, store = launch.rank, _open_store(launch, timeout_seconds)
    # Of the interface that the user chose for gloo, which need not be that towards rank 0.
    entries = psutil.net_if_addrs().get(os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0], [])
    chosen = {entry.family: entry.address for entry in reversed(entries)}
    own_address = chosen.get(socket.AF_INET) or chosen.get(socket.AF_INET6) or _local_address(launch.master_addr)
    board = None
    if rank == 0:  # torchrun's store may go before the ranks do
        board = dist.TCPStore(own_address, 0, is_master=True, wait_for_workers=False)
        here["board"] = board.port
    has_both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if has_both else socket.AF_INET
    # With a place for each rank in its queue, as nobody accepts.
    listener = socket.create_server(("", 0), family=family, backlog=launch.world_size, dualstack_ipv6=has_both)
    here |= {"address": own_address, "port": listener.getsockname()[1]}
    keys = [f"rank/{other}" for other in range(launch.world_size)]
    own_value = json.dumps(here)
    if store.compare_set(keys[rank], "", own_value) != own_value.encode():
        _refuse_other_run(launch, f"it already has a rank {rank}")
    try:
        ranks = [json.loads(value) for value in store.multi_get(keys)]
    except dist.DistError:  # after the time: all end, and the first names the missing
        try:
            present = [other for other, key in enumerate(keys) if store.check([key])]
        except dist.DistError:  # rank 0 has left, with its own line
            present = [0]
        missing = [other for other in range(launch.world_size) if other not in present]
        hosts = hosts_of_ranks(os.environ, launch.world_size)
        host_names = list_some(dict.fromkeys(hosts[other] for other in missing if hosts), MAX_HOSTS_SHOWN)
        message = (
            f"of {launch.world_size} ranks these did not join {launch.master_addr}:{launch.master_port} within "
            f"{timeout_seconds:g} s (--hang-timeout): {list_some(map(str, missing), MAX_RANKS_SHOWN)}"
        ) + f" (on {host_names})" * bool(host_names)
        give_up(TrainingError(message), is_reporting_rank=rank == min(present))

    addresses = [launch.master_addr if _is_loopback(other["address"]) else other["address"] for other in ranks]
    if has_several_hosts := len({other["identity"] for other in ranks}) > 1:
        _try_connections(store, rank, ranks, addresses, timeout_seconds)
    listener.close()

    # This rank's own name may lead to a loopback (127.0.1.1 in /etc/hosts, as Debian writes it).
    reachable = [other["address"] for other in ranks if not _is_loopback(other["address"])]
    if _is_loopback(own_address) and has_several_hosts and reachable:
        own_address = _local_address(reachable[0])
    if board is None:
        board = dist.TCPStore(addresses[0], ranks[0]["board"], is_master=False, wait_for_workers=False)
    names = (name for name, entries in psutil.net_if_addrs().items() if own_address in [e.address for e in entries])
    interface = next(names, "")
    if interface:  # gloo would look its own name up instead, and NCCL take the first by name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if has_several_hosts:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    return store, board, ranks, f"{interface} ({own_address})" if interface else ""


def _try_connections(
    store: Any, rank: int, ranks: Sequence[Mapping[str, Any]], addresses: Sequence[str], timeout_seconds: float
) -> None:
    """Connect the first ranks of all hosts with one another, over ports that the system chose, and with rank 0's second
    store: gloo and NCCL do so without a limit of time. Where that fails all ranks end, and one says between whom."""
    leaders = list({other["identity"]: number for number, other in reversed(list(enumerate(ranks)))}.values())
    targets = [(other, ranks[other]["port"]) for other in leaders if other != rank] if rank in leaders else []
    targets += [(0, ranks[0]["board"])] if rank in leaders and rank > 0 else []
    deadline = time.monotonic() + timeout_seconds
    for other, port in targets:
        if _connection_problem((addresses[other], port), deadline - time.monotonic()):
            first = call_with_timeout(ANSWER_SECONDS, lambda: store.compare_set("unreachable", "", str(rank)))
            message = (
                f"rank {rank} on {ranks[rank]['host']} cannot connect to rank {other} on {ranks[other]['host']} at "
                f"{addresses[other]}:{port} within {timeout_seconds:g} s (--hang-timeout): open all TCP ports between "
                "the hosts (NCCL and gloo take any), or choose another network with GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME"
            )
            give_up(TrainingError(message), is_reporting_rank=first == str(rank).encode())
    try:
        store.set(f"connected/{rank}", "")
        all_keys = [f"connected/{other}" for other in range(len(ranks))]
        store.wait(all_keys, timedelta(seconds=timeout_seconds + ANSWER_SECONDS))
    except dist.DistError:  # another rank says why
        raise SystemExit(TrainingError.exit_code) from None


def _open_store(launch: LaunchEnvironment, timeout_seconds: float) -> Any:
    host, address = socket.gethostname(), (launch.master_addr, launch.master_port or 0)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds), "wait_for_workers": False}
    if launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:  # it listens everywhere; to itself it talks over the loopback, whatever MASTER_ADDR says here
            store: Any = dist.TCPStore("127.0.0.1", address[1], is_master=True, **options)
        except dist.DistError as error:
            message = f"rank 0 on {host} cannot listen at port {address[1]} ({first_line(error)}); {PORT_HINT}"
            raise UserError(message) from None
    else:
        # Ranks that have not met cannot agree on one that speaks: the last is on another host than rank 0, if any is.
        is_speaker = launch.rank == launch.world_size - 1
        problem = _connection_problem(address, timeout_seconds)
        if problem:  # torch's own store says so with a traceback of C++
            message = (
                f"rank {launch.rank} on {host} cannot reach rank 0 at {address[0]}:{address[1]} within "
                f"{timeout_seconds:g} s (--hang-timeout): {problem}; has it started? Check MASTER_ADDR and the port"
            )
            give_up(TrainingError(message), is_reporting_rank=is_speaker)
        # In a thread: torch waits for ever for the answer of another program that listens there.
        store = call_with_timeout(ANSWER_SECONDS, lambda: dist.TCPStore(*address, is_master=False, **options))
        if store is None:
            _refuse_other_run(launch, "what listens there does not answer", is_reporting_rank=is_speaker)
    return dist.PrefixStore(f"trainer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def refuse_unequal_hosts(hosts: Sequence[str], ranks: Sequence[Mapping[str, Any]]) -> None:
    """UserError, the same on every rank, where a host cannot take part or has no GPU beside those that have."""
    where = [f"{host} (rank {rank})" if len(set(hosts)) > 1 else f"rank {rank}" for rank, host in enumerate(hosts)]
    for place, host, said in zip(where, hosts, ranks, strict=True):
        problem, needed_mib = said["problem"], machine.SHM_MIB_PER_RANK * hosts.count(host)
        if said["kind"] == "cuda" and hosts.count(host) > 1 and said["shm_mib"] < needed_mib:
            problem = f"{machine.SHARED_MEMORY} has {said['shm_mib']:.0f} MiB free, and NCCL takes {needed_mib}; start "
            problem += "the container with --shm-size=2g or --ipc=host, or set NCCL_SHM_DISABLE=1"
        if problem:
            raise UserError(f"on {place}: {problem}" if len(ranks) > 1 else problem)
    kinds = [said["kind"] for said in ranks]
    if len(set(kinds)) > 1:
        with_gpu, without = where[kinds.index("cuda")], where[kinds.index("cpu")]
        raise UserError(f"there is a GPU on {with_gpu} and none on {without}: all ranks must have one, or none")


def _connection_problem(address: tuple[str, int], timeout_seconds: float) -> str:
    """Why nobody can be reached there, asked at least once and until so many seconds are over; else empty."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection(address, timeout=2.0).close()
            return ""
        except OSError as error:
            if time.monotonic() >= deadline:
                return first_line(error)
            time.sleep(0.2)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _local_address(host: str) -> str:
    """The address of this host from which a packet to `host` would leave; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _refuse_other_run(launch: LaunchEnvironment, reason: str, *, is_reporting_rank: bool = True) -> NoReturn:
    place = f"rank {launch.rank} on {socket.gethostname()}: {launch.master_addr}:{launch.master_port}"
    error = TrainingError(f"{place} is not this run's rank 0 ({reason}); {PORT_HINT}")
    give_up(error, is_reporting_rank=is_reporting_rank)


def give_up(error: UserError | TrainingError, *, is_reporting_rank: bool = True) -> NoReturn:
    """End this process: ranks that have not met cannot agree on who reports the error."""
    raise SystemExit(report_error(error) if is_reporting_rank else error.exit_code) from None


def name_hosts(ranks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The name of each rank's host, with its address where two hosts have one name."""
    first_ranks = {rank["identity"]: rank for rank in reversed(ranks)}
    names = {identity: rank["host"] for identity, rank in first_ranks.items()}
    if len(set(names.values())) < len(names):
        names = {identity: f"{rank['host']} ({rank['address']})" for identity, rank in first_ranks.items()}
    return tuple(names[rank["identity"]] for rank in ranks)
