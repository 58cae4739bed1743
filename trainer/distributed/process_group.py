"""The ranks of a run: how they join, what each computes on, what they tell one another.

torch's own `env://` waits for late ranks without naming them, and for ever where something else listens at the port.
"""

import contextlib
import ipaddress
import json
import os
import re
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist

from trainer.config.choices import MAX_HANG_TIMEOUT_SECONDS
from trainer.config.errors import TrainingError, UserError, report_error
from trainer.config.text import list_some
from trainer.distributed import deepspeed_internals, machine
from trainer.distributed.launch_environment import (
    LaunchEnvironment,
    hosts_of_ranks,
    read_launch_environment,
    speaks_for_late_ranks,
)
from trainer.distributed.watch import Watchdog, call_with_timeout

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(seconds=MAX_HANG_TIMEOUT_SECONDS)  # that of the groups which DeepSpeed makes for itself
PREPARE_TIMEOUT = timedelta(hours=24)  # one rank tokenises while the others wait
ANSWER_SECONDS = 15.0  # within which a store that listens answers
NAME_SECONDS = 60.0  # within which a name is known that ever will be, as that of a pod which has just started
LEAVE_SECONDS = 2.0  # that rank 0 stays for the others, with the store from which they read what it has read
MAX_HOSTS_SHOWN = 4
PORT_HINT = "pass a free one, as --master_port of the launcher or in MASTER_PORT"


@dataclass(frozen=True, kw_only=True)
class DistContext:
    """The processes of a run and what each computes on."""

    rank: int
    world_size: int
    hosts: tuple[str, ...]  #: the name of each rank's host
    device: torch.device
    num_threads: int  #: of the processor, per rank
    cpu_group: Any  #: group for Python objects, patient; None where nobody else has joined
    watchdog: Watchdog  #: what the ranks know of one another while they wait
    network: str = ""  #: the interface and address over which this rank talks to other hosts
    devices: tuple[Mapping[str, Any], ...]  #: what each rank computes on: `name`, `memory` in bytes, `bf16`
    planned_gpu_bytes: int | None = None  #: memory of the GPU that is planned for, where none is here

    @property
    def num_nodes(self) -> int:
        return len(set(self.hosts))

    @property
    def local_rank(self) -> int:
        return self.hosts[: self.rank].count(self.hosts[self.rank])

    @property
    def local_world_size(self) -> int:
        return self.hosts.count(self.hosts[self.rank])

    def name_of(self, rank: int) -> str:
        return f"{self.hosts[rank]} (rank {rank})" if self.num_nodes > 1 else f"rank {rank}"

    def least_memory_bytes(self) -> int | None:
        """Of the devices of all ranks; None for one rank on a CPU, where memory is not what decides.

        A CPU rank has its share of its host's.
        """
        if self.planned_gpu_bytes or (self.device.type != "cuda" and self.world_size == 1):
            return self.planned_gpu_bytes
        shares = [1 if self.device.type == "cuda" else self.hosts.count(host) for host in self.hosts]
        return min(int(device["memory"]) // share for device, share in zip(self.devices, shares, strict=True))

    def free_host_bytes(self) -> float:
        """Bytes of the host's memory that are free now, for each rank on it."""
        return float(psutil.virtual_memory().available / self.local_world_size)

    def available_bytes(self) -> float:
        """Bytes that one rank may use: its GPU's, or its share of the memory that is free now."""
        if self.planned_gpu_bytes is None and self.device.type != "cuda":
            return self.free_host_bytes()
        return float(self.least_memory_bytes() or 0)

    def supports_bf16(self) -> bool:
        """Whether the devices of all ranks compute in bf16 themselves; a GPU that is only planned for is taken to."""
        return self.planned_gpu_bytes is not None or all(device["bf16"] for device in self.devices)

    def all_gather_object(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on every rank."""
        if self.cpu_group is None:  # one rank, or a plan for several
            return [value] * self.world_size
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def on_rank_zero(self, fn: Callable[[], T], *, per_node: bool = False) -> T:
        """What `fn` returns on rank 0 (on each node's first rank), for everybody; its errors are everybody's too."""
        leader = self.hosts.index(self.hosts[self.rank]) if per_node else 0
        value, own_error = None, None
        if self.rank == leader:
            try:
                value = fn()
            except (UserError, TrainingError) as error:
                own_error = error
            except BaseException as error:
                self.all_gather_object((None, TrainingError(f"rank {self.rank}: {type(error).__name__}: {error}")))
                raise
        results = self.all_gather_object((value, own_error))
        failures = {rank: failure for rank, (_, failure) in enumerate(results) if failure is not None}
        for rank, failure in failures.items():
            if per_node and len(failures) < self.num_nodes:  # the others would not say the same
                raise type(failure)(f"on {self.name_of(rank)}: {failure}")
            raise failure
        return results[leader][0]  # type: ignore[return-value]

    def open_streams(self, has_values: bool) -> Callable[[torch.Tensor], None]:
        """A function that puts rank 0's values into a tensor on the CPU of each rank without `has_values`: over the
        network once a host, then within it. All ranks must call both, with tensors of the same shapes."""
        ranks_of_host: dict[str, list[int]] = {}
        for rank, rank_has_values in enumerate(self.all_gather_object(has_values or self.rank == 0)):
            if not rank_has_values:
                ranks_of_host.setdefault(self.hosts[rank], []).append(rank)
        streams = [[0, *(ranks[0] for ranks in ranks_of_host.values())], *ranks_of_host.values()]
        groups = [  # every rank must make every group
            (ranks, dist.new_group(ranks, backend="gloo", timeout=PREPARE_TIMEOUT)) for ranks in streams if ranks[1:]
        ]

        def receive(tensor: torch.Tensor) -> None:
            for ranks, group in groups:
                if self.rank in ranks:
                    dist.broadcast(tensor, ranks[0], group=group)

        return receive

    def describe_hosts(self) -> str:
        """The hosts, the ranks of each, and what they talk over, for people."""
        ranks: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            ranks.setdefault(host, []).append(rank)
        texts = [f"{host}: rank{'s' * (len(ranks[host]) > 1)} {describe_ranks(ranks[host])}" for host in ranks]
        if (num_more := len(texts) - MAX_HOSTS_SHOWN) > 0:
            texts[MAX_HOSTS_SHOWN - 1 : -1] = [f"{num_more} more hosts"]
        hosts_text = "; ".join(texts)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        return f"{hosts_text}; {backend}" + f" over {self.network}" * bool(self.network)


def init_distributed(device: str | None = None, *, join_timeout_seconds: float = 600.0) -> DistContext:
    """Join the other ranks; whatever starts a run comes through here (`launch_environment`).

    Without a launcher there is one rank. GPUs use NCCL, processors gloo. Ranks that cannot train together end here, one
    of them with the line that says why.
    """
    launch = read_launch_environment(os.environ)
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    gpu_problem = machine.find_gpu_problem(os.environ) if device is None else None
    problem = "; ".join(gpu_problem or ())
    here = {
        "problem": problem or machine.find_host_problem(os.environ, on_gpu=on_gpu, world_size=launch.world_size),
        "kind": "cuda" if on_gpu else "cpu",
        "devices": [] if problem else machine.list_devices(on_gpu=on_gpu),
        "shared_memory": machine.free_shared_memory(os.environ),
    }
    store, board, ranks, network = meet(launch, here, join_timeout_seconds)
    hosts = name_hosts(ranks)
    try:
        refuse_unequal_hosts(hosts, ranks)
        indices = machine.assign_devices(hosts, [rank["devices"] for rank in ranks]) if on_gpu else [0] * len(ranks)
    except UserError as error:
        time.sleep(LEAVE_SECONDS if launch.rank == 0 and launch.world_size > 1 else 0)
        _give_up(error, is_reporting_rank=launch.rank == 0)
    devices = [rank["devices"][index] for rank, index in zip(ranks, indices, strict=True)]
    rank_device = torch.device("cuda", indices[launch.rank]) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(rank_device)
    num_threads = machine.threads_per_rank(hosts.count(hosts[launch.rank]))
    torch.set_num_threads(num_threads)
    # torchrun's variables, which DeepSpeed reads; it takes LOCAL_RANK for the number of the GPU.
    local_rank = str(rank_device.index if on_gpu else hosts[: launch.rank].count(hosts[launch.rank]))
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=local_rank)
    os.environ.update(MASTER_ADDR=launch.master_addr, MASTER_PORT=str(launch.master_port or machine.find_free_port()))
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed asserts that the two agree
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = local_rank
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = import_module("deepspeed")
    # The finalizer of DeepSpeed's engine imports these. The garbage collector may call it in the middle of another
    # import, which then fails with a KeyError (importlib, up to Python 3.12); what is there already is only looked up.
    with contextlib.suppress(ImportError):
        import_module("deepspeed.module_inject.auto_ep_comm")
        import_module("deepspeed.utils.pin_memory")
    if not on_gpu:
        deepspeed_internals.skip_compiled_collectives()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=rank_device if on_gpu and launch.world_size > 1 else None,
        )
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False, timeout=COLLECTIVE_TIMEOUT)
    return DistContext(
        rank=launch.rank,
        world_size=launch.world_size,
        hosts=hosts,
        device=rank_device,
        devices=tuple(devices),
        num_threads=num_threads,
        cpu_group=dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT) if launch.world_size > 1 else None,
        watchdog=Watchdog(launch.rank, hosts, board),
        network=network,
    )


def meet(
    launch: LaunchEnvironment, here: dict[str, Any], timeout_seconds: float
) -> tuple[Any, Any, list[dict[str, Any]], str]:
    """(the store in which all ranks have met, one of their own for the watchdog, what each rank says of itself, the
    network interface of this one). Ranks that do not meet end here, with one line. `here`: what this rank says.

    A rank asks the store at most four times, whatever the number of ranks.
    """
    host = socket.gethostname()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    here = {**here, "host": host, "identity": f"{host}/{boot_id}", "board": 0}
    if launch.world_size == 1:
        return dist.HashStore(), None, [{**here, "address": "127.0.0.1"}], ""
    rank, within = launch.rank, f"within {timeout_seconds:g} s (--hang-timeout)"
    place = f"{launch.master_addr}:{launch.master_port}"
    store = _open_store(launch, timeout_seconds)
    own_address, board = _local_address(launch.master_addr), None
    if rank == 0:  # torchrun's store may go before the ranks do
        board = dist.TCPStore(own_address, 0, is_master=True, wait_for_workers=False)
        here["board"] = board.port
    has_both = socket.has_dualstack_ipv6()
    listener = socket.create_server(
        ("", 0), family=socket.AF_INET6 if has_both else socket.AF_INET, dualstack_ipv6=has_both
    )
    here |= {"address": own_address, "port": listener.getsockname()[1], "process": uuid.uuid4().hex}
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
        missing_ranks = [other for other in range(launch.world_size) if other not in present]
        missing = describe_ranks(missing_ranks, hosts_of_ranks(os.environ, launch.world_size))
        message = f"of {launch.world_size} ranks these did not join {place} {within}: {missing}"
        _give_up(TrainingError(message), is_reporting_rank=rank == min(present))

    # Gloo and NCCL connect over ports that the system chooses, without a limit of time: first try one to the next rank.
    addresses = [launch.master_addr if _is_loopback(other["address"]) else other["address"] for other in ranks]
    if has_several_hosts := len({other["identity"] for other in ranks}) > 1:
        after = (rank + 1) % launch.world_size
        target = addresses[after], int(ranks[after]["port"])
        if ranks[after]["identity"] != here["identity"] and not _can_connect(target, timeout_seconds):
            first = call_with_timeout(ANSWER_SECONDS, lambda: store.compare_set("unreachable", "", str(rank)))
            message = (
                f"rank {rank} on {host} cannot connect to rank {after} on {ranks[after]['host']} at {target[0]}:"
                f"{target[1]} {within}: open all TCP ports between the hosts (NCCL and gloo take any), or choose "
                "another network with GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            )
            _give_up(TrainingError(message), is_reporting_rank=first == str(rank).encode())
        try:
            store.set(f"connected/{rank}", "")
            all_keys = [f"connected/{other}" for other in range(launch.world_size)]
            store.wait(all_keys, timedelta(seconds=timeout_seconds + ANSWER_SECONDS))
        except dist.DistError:
            _give_up(TrainingError(""), is_reporting_rank=False)
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


def _open_store(launch: LaunchEnvironment, timeout_seconds: float) -> Any:
    """The store of this run: on rank 0, or torchrun's where it keeps one."""
    host, address = socket.gethostname(), (launch.master_addr, launch.master_port or 0)
    place, start_time = f"{address[0]}:{address[1]}", time.monotonic()
    is_speaker = speaks_for_late_ranks(os.environ, launch.rank, launch.world_size)
    while problem := _name_problem(launch.master_addr):
        if time.monotonic() > start_time + min(timeout_seconds, NAME_SECONDS):
            message = f"rank {launch.rank} on {host}: MASTER_ADDR={launch.master_addr}: {problem}; check it"
            _give_up(TrainingError(message), is_reporting_rank=launch.rank == 0 or is_speaker)
        time.sleep(0.5)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds), "wait_for_workers": False}
    if launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        try:
            store: Any = dist.TCPStore(*address, is_master=True, **options)
        except dist.DistError as error:
            is_busy = "EADDRINUSE" in str(error) or "ddress already in use" in str(error)
            if is_busy or _is_own_address(launch.master_addr):
                reason = str(error).splitlines()[0][:200]
                message = f"rank 0 cannot listen at port {address[1]} of {host} ({reason}); {PORT_HINT}"
            else:
                message = f"MASTER_ADDR={launch.master_addr} is no address of {host}, on which rank 0 runs; check both"
            raise UserError(message) from None
    else:
        while not _can_connect(address, 0.0):  # torch's own store says so with a traceback of C++
            if time.monotonic() > start_time + timeout_seconds:
                message = (
                    f"rank {launch.rank} on {host} cannot reach rank 0 at {place} within {timeout_seconds:g} s "
                    "(--hang-timeout): has it started? Check MASTER_ADDR and the port"
                )
                _give_up(TrainingError(message), is_reporting_rank=is_speaker)
            time.sleep(0.2)
        # In a thread: torch waits for ever for the answer of another program that listens there.
        store = call_with_timeout(ANSWER_SECONDS, lambda: dist.TCPStore(*address, is_master=False, **options))
        if store is None:
            _refuse_other_run(launch, "what listens there does not answer", is_reporting_rank=is_speaker)
    return dist.PrefixStore(f"trainer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def refuse_unequal_hosts(hosts: Sequence[str], ranks: Sequence[Mapping[str, Any]]) -> None:
    """UserError, the same on every rank, where a host cannot take part or has no GPU beside those that have."""
    where = [f"{host} (rank {rank})" if len(set(hosts)) > 1 else f"rank {rank}" for rank, host in enumerate(hosts)]
    for place, said in zip(where, ranks, strict=True):
        if said["problem"]:
            raise UserError(f"on {place}: {said['problem']}" if len(ranks) > 1 else said["problem"])
    kinds = [said["kind"] for said in ranks]
    if len(set(kinds)) > 1:
        with_gpu, without = where[kinds.index("cuda")], where[kinds.index("cpu")]
        raise UserError(f"there is a GPU on {with_gpu} and none on {without}: all ranks must have one, or none")
    for place, host, said in zip(where, hosts, ranks, strict=True):
        needed, free = machine.SHM_BYTES_PER_RANK * hosts.count(host), said["shared_memory"]
        if kinds[0] == "cuda" and hosts.count(host) > 1 and free is not None and free < needed:
            raise UserError(
                f"{machine.SHARED_MEMORY} of {place} has {free / 2**20:.0f} MiB free, and NCCL takes "
                f"{needed / 2**20:.0f} for {hosts.count(host)} GPUs; {machine.SHM_REMEDY}"
            )


def describe_ranks(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """`1, 4-7`, and the hosts of these ranks where `hosts` has one for each rank of the run."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    texts = [f"{part[0]}-{part[-1]}" if len(part) > 2 else ", ".join(map(str, part)) for part in parts]
    names = list(dict.fromkeys(hosts[rank] for rank in ranks if rank < len(hosts)))
    return list_some(texts, MAX_HOSTS_SHOWN) + (f" (on {list_some(names, MAX_HOSTS_SHOWN)})" if names else "")


def _name_problem(host: str) -> str:
    try:
        socket.getaddrinfo(host, 1)
    except OSError as error:
        return f"this name is not known here ({error.strerror})"
    return ""


def _is_own_address(host: str) -> bool:
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, 1)}
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return any(address in own or _is_loopback(address) for address in addresses)


def _can_connect(address: tuple[str, int], timeout_seconds: float) -> bool:
    """Whether somebody listens there; asked at least once, and until so many seconds are over."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection(address, timeout=2.0).close()
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
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
    message = f"rank {launch.rank} on {socket.gethostname()}: {launch.master_addr}:{launch.master_port} is not this "
    error = TrainingError(f"{message}run's rank 0 ({reason}); {PORT_HINT}")
    _give_up(error, is_reporting_rank=is_reporting_rank)


def _give_up(error: UserError | TrainingError, *, is_reporting_rank: bool = True) -> NoReturn:
    """End this process: ranks that have not met cannot agree on who reports the error."""
    raise SystemExit(report_error(error) if is_reporting_rank else error.exit_code) from None


def name_hosts(ranks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The name of each rank's host, with its address where two hosts have one name."""
    first_ranks = {rank["identity"]: rank for rank in reversed(ranks)}
    names = {identity: rank["host"] for identity, rank in first_ranks.items()}
    if len(set(names.values())) < len(names):
        names = {identity: f"{rank['host']} ({rank['address']})" for identity, rank in first_ranks.items()}
    return tuple(names[rank["identity"]] for rank in ranks)


def simulated_context(
    world_size: int, device: str | None = None, *, gpu_memory_bytes: int | None = None
) -> DistContext:
    """The context that a run on so many ranks of this host would have, without joining anybody: for a plan only.

    `gpu_memory_bytes`: plan for GPUs with so much memory, also where there is none.
    """
    on_gpu = gpu_memory_bytes is not None or (torch.cuda.is_available() if device is None else device == "cuda")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    hosts = (socket.gethostname(),) * world_size
    return DistContext(
        rank=0,
        world_size=world_size,
        hosts=hosts,
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        devices=tuple(machine.list_devices(on_gpu=torch.cuda.is_available() and on_gpu)[:1]) * world_size,
        num_threads=machine.threads_per_rank(world_size),
        cpu_group=None,
        watchdog=Watchdog(0, hosts, None),
        planned_gpu_bytes=gpu_memory_bytes,
    )


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective failed because another rank is no longer there, as gloo and NCCL put it."""
    messages = "gloo/transport|Connection closed by peer|Connection reset by peer|Broken pipe|Socket closed"
    is_gloo_error = isinstance(error, RuntimeError) and re.search(messages, str(error)) is not None
    return isinstance(error, dist.DistError) or is_gloo_error


def destroy_process_group() -> None:
    """Leave the process group; without it a finished rank may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
