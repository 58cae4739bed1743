"""How the ranks find one another: the store in which they meet, who is on which host, and which GPU each takes.

torch's own `env://` waits for late ranks without naming them, and for ever where something else listens at the port.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from trainer.config.errors import TrainingError, UserError, report_error
from trainer.distributed.launch_environment import LaunchEnvironment
from trainer.distributed.watch import call_with_timeout

ANSWER_SECONDS = 15.0  # within which a store that listens answers


def meet(launch: LaunchEnvironment, gpus: Sequence[str], timeout_seconds: float) -> tuple[Any, Any, list[Any], str]:
    """(the store in which all ranks have met, one of their own for the watchdog, what each rank says of itself, the
    network interface of this one). UserError where rank 0 cannot listen at its port; otherwise ranks that do not meet
    end here, with one line.
    """
    host, address = socket.gethostname(), _local_address(launch.master_addr)
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:  # not Linux
        boot_id = f"{uuid.getnode():x}"
    here = {"host": host, "identity": f"{host}/{boot_id}", "address": address, "gpus": list(gpus), "board": 0}
    if launch.world_size == 1:
        return dist.HashStore(), None, [here], ""
    store, board = _open_store(launch, timeout_seconds), None
    if launch.rank == 0:  # torchrun's store may go before the ranks do
        board = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        here["board"] = board.port
    ranks = _exchange(store, launch, here, timeout_seconds)
    other_addresses = [rank["address"] for rank in ranks if rank["identity"] != here["identity"]]
    reachable = [other for other in other_addresses if not _is_loopback(other)]
    if _is_loopback(address) and reachable:  # its own name leads to one (127.0.1.1 in /etc/hosts, as Debian writes it)
        address = _local_address(reachable[0])
    if board is None:
        first = ranks[0]["address"]
        board_host = launch.master_addr if _is_loopback(first) else first
        board = dist.TCPStore(board_host, ranks[0]["board"], is_master=False, wait_for_workers=False)
    import psutil

    interfaces = psutil.net_if_addrs().items()
    interface = next((name for name, entries in interfaces if any(entry.address == address for entry in entries)), "")
    if interface:  # gloo would look its own name up instead
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return store, board, ranks, f"{interface} ({address})" if interface else ""


def name_hosts(ranks: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The name of each rank's host, with its address where two hosts have one name."""
    first_ranks = {rank["identity"]: rank for rank in reversed(ranks)}
    names = {identity: rank["host"] for identity, rank in first_ranks.items()}
    if len(set(names.values())) < len(names):
        names = {identity: f"{rank['host']} ({rank['address']})" for identity, rank in first_ranks.items()}
    return tuple(names[rank["identity"]] for rank in ranks)


def assign_gpus(hosts: Sequence[str], gpus: Sequence[Sequence[str]]) -> list[int]:
    """The GPU of each rank, in its own numbering: the first that no lower rank of its host has.

    The same where all ranks see the same GPUs and where a scheduler shows each its own. `gpus`: the identities of those
    that each rank sees. UserError where there are too few.
    """
    taken: set[tuple[str, str]] = set()
    indices = []
    for host, visible in zip(hosts, gpus, strict=True):
        index = next((n for n, gpu in enumerate(visible) if (host, gpu) not in taken), None)
        if index is None:
            num_gpus = sum(other == host for other, _ in taken)
            raise UserError(f"{hosts.count(host)} ranks on {host} with {num_gpus} GPUs: start at most one rank a GPU")
        taken.add((host, visible[index]))
        indices.append(index)
    return indices


def _open_store(launch: LaunchEnvironment, timeout_seconds: float) -> Any:
    """The store of this run: on rank 0, or torchrun's where it keeps one."""
    is_server = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_server and not _wait_for_port(launch, timeout_seconds):
        _give_up(
            f"rank {launch.rank} on {socket.gethostname()} cannot reach rank 0 at "
            f"{launch.master_addr}:{launch.master_port} within {timeout_seconds:g} s (--hang-timeout): has it started? "
            "Check MASTER_ADDR and the port"
        )

    def make_store() -> Any:
        return dist.TCPStore(
            launch.master_addr,
            launch.master_port or 0,
            is_master=is_server,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )

    try:
        # In a thread: torch waits for ever for the answer of another program that listens there.
        store = make_store() if is_server else call_with_timeout(ANSWER_SECONDS, make_store)
    except dist.DistError as error:
        raise UserError(
            f"rank 0 cannot listen at port {launch.master_port} of {socket.gethostname()} "
            f"({str(error).splitlines()[0][:200]}); pass a free one, as --master_port of the launcher or in MASTER_PORT"
        ) from None
    if store is None:
        _refuse_other_run(launch, "what listens there does not answer")
    return dist.PrefixStore(f"trainer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _exchange(store: Any, launch: LaunchEnvironment, value: dict[str, Any], timeout_seconds: float) -> list[Any]:
    """What each rank says of itself, in the order of ranks: two calls of the store for each.

    Where ranks are missing after the time, all that are there end; one of them names the missing.
    """
    keys = [f"rank/{rank}" for rank in range(launch.world_size)]
    own_value = json.dumps({**value, "process": uuid.uuid4().hex})
    if store.compare_set(keys[launch.rank], "", own_value) != own_value.encode():
        _refuse_other_run(launch, f"it already has a rank {launch.rank}")
    try:
        return [json.loads(other) for other in store.multi_get(keys)]
    except dist.DistError:
        try:
            present = [rank for rank, key in enumerate(keys) if store.check([key])]
        except dist.DistError:  # rank 0 has left, with its own line
            present = [0]
        missing = ", ".join(str(rank) for rank in range(launch.world_size) if rank not in present)
        _give_up(
            f"of {launch.world_size} ranks these did not join {launch.master_addr}:{launch.master_port} within "
            f"{timeout_seconds:g} s (--hang-timeout): {missing}",
            is_reporting_rank=launch.rank == min(present),
        )


def _wait_for_port(launch: LaunchEnvironment, timeout_seconds: float) -> bool:
    """Whether something listens there within the time. torch's own store says so with a traceback of C++."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        address = launch.master_addr, launch.master_port or 0
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=2.0):
            return True
        time.sleep(0.2)
    return False


def _local_address(host: str) -> str:
    """The address of this host from which a packet to `host` would leave; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _refuse_other_run(launch: LaunchEnvironment, reason: str) -> NoReturn:
    _give_up(
        f"rank {launch.rank} on {socket.gethostname()}: {launch.master_addr}:{launch.master_port} is not this run's "
        f"rank 0 ({reason}); pass a free port, as --master_port of the launcher or in MASTER_PORT"
    )


def _give_up(message: str, *, is_reporting_rank: bool = True) -> NoReturn:
    """End this process: ranks that have not met cannot agree on who reports the error."""
    error = TrainingError(message)
    raise SystemExit(report_error(error) if is_reporting_rank else error.exit_code) from None
