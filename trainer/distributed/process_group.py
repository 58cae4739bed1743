"""The ranks of a run: how they join, what each computes on, what they tell one another.

torch's own `env://` waits for late ranks without naming them, and for ever where something else listens at the port.
"""

import contextlib
import ctypes
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
from trainer.distributed import deepspeed_internals
from trainer.distributed.launch_environment import LaunchEnvironment, read_launch_environment
from trainer.distributed.watch import Watchdog, call_with_timeout

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(seconds=MAX_HANG_TIMEOUT_SECONDS)  # that of the groups which DeepSpeed makes for itself
PREPARE_TIMEOUT = timedelta(hours=24)  # one rank tokenises while the others wait
ANSWER_SECONDS = 15.0  # within which a store that listens answers
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

    def device_memory_bytes(self) -> int | None:
        """Bytes of the GPU's memory; None for a CPU, where state is not what runs out."""
        if self.planned_gpu_bytes or self.device.type != "cuda":
            return self.planned_gpu_bytes
        return torch.cuda.get_device_properties(self.device).total_memory

    def free_host_bytes(self) -> float:
        """Bytes of the host's memory that are free now, for each rank on it."""
        return float(psutil.virtual_memory().available / self.local_world_size)

    def available_bytes(self) -> float:
        """Bytes that one rank may use: its GPU's, or its share of the memory that is free now."""
        device_bytes = self.device_memory_bytes()
        return self.free_host_bytes() if device_bytes is None else float(device_bytes)

    def supports_bf16(self) -> bool:
        """Whether the device computes in bf16 itself; a GPU that is only planned for is taken to."""
        has_bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return self.planned_gpu_bytes is not None or has_bf16

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
        ranks = {host: [str(rank) for rank, other in enumerate(self.hosts) if other == host] for host in self.hosts}
        hosts_text = "; ".join(f"{host}: rank{'s' * (len(ranks[host]) > 1)} {', '.join(ranks[host])}" for host in ranks)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        return f"{hosts_text}; {backend}" + f" over {self.network}" * bool(self.network)


def init_distributed(device: str | None = None, *, join_timeout_seconds: float = 600.0) -> DistContext:
    """Join the other ranks; whatever starts a run comes through here (`launch_environment`).

    Without a launcher there is one rank. GPUs use NCCL, processors gloo. UserError for what the user can mend.
    """
    launch = read_launch_environment(os.environ)
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    gpus = [str(torch.cuda.get_device_properties(n).uuid) for n in range(torch.cuda.device_count())] if on_gpu else []
    store, board, ranks, network = meet(launch, gpus, join_timeout_seconds)
    hosts = name_hosts(ranks)
    rank_device = torch.device("cpu")
    if on_gpu:
        rank_device = torch.device("cuda", assign_gpus(hosts, [rank["gpus"] for rank in ranks])[launch.rank])
        torch.cuda.set_device(rank_device)
    num_threads = _threads_per_rank(hosts.count(hosts[launch.rank]))
    torch.set_num_threads(num_threads)
    # torchrun's variables, which DeepSpeed reads; it takes LOCAL_RANK for the number of the GPU.
    local_rank = str(rank_device.index if on_gpu else hosts[: launch.rank].count(hosts[launch.rank]))
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=local_rank)
    os.environ.update(MASTER_ADDR=launch.master_addr, MASTER_PORT=str(launch.master_port or find_free_port()))
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
        num_threads=num_threads,
        cpu_group=dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT) if launch.world_size > 1 else None,
        watchdog=Watchdog(launch.rank, hosts, board),
        network=network,
    )


def meet(launch: LaunchEnvironment, gpus: Sequence[str], timeout_seconds: float) -> tuple[Any, Any, list[Any], str]:
    """(the store in which all ranks have met, one of their own for the watchdog, what each rank says of itself, the
    network interface of this one). UserError where rank 0 cannot listen at its port; otherwise ranks that do not meet
    end here, with one line.
    """
    host, own_address = socket.gethostname(), _local_address(launch.master_addr)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    here = {"host": host, "identity": f"{host}/{boot_id}", "address": own_address, "gpus": list(gpus), "board": 0}
    if launch.world_size == 1:
        return dist.HashStore(), None, [here], ""
    rank, address = launch.rank, (launch.master_addr, launch.master_port or 0)
    place, within = f"{address[0]}:{address[1]}", f"within {timeout_seconds:g} s (--hang-timeout)"

    # The store of this run: on rank 0, or torchrun's where it keeps one.
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout_seconds), "wait_for_workers": False}
    if is_server:
        try:
            store: Any = dist.TCPStore(*address, is_master=True, **options)
        except dist.DistError as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(f"rank 0 cannot listen at port {address[1]} of {host} ({reason}); {PORT_HINT}") from None
    else:
        deadline = time.monotonic() + timeout_seconds
        while not _is_listening(address):  # torch's own store says so with a traceback of C++
            if time.monotonic() > deadline:
                _give_up(
                    f"rank {rank} on {host} cannot reach rank 0 at {place} {within}: has it started? Check MASTER_ADDR "
                    "and the port"
                )
            time.sleep(0.2)
        # In a thread: torch waits for ever for the answer of another program that listens there.
        store = call_with_timeout(ANSWER_SECONDS, lambda: dist.TCPStore(*address, is_master=False, **options))
    problem = "" if store is not None else "what listens there does not answer"
    keys = [f"rank/{other}" for other in range(launch.world_size)]
    board = None
    if store is not None:
        store = dist.PrefixStore(f"trainer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        if rank == 0:  # torchrun's store may go before the ranks do
            board = dist.TCPStore(own_address, 0, is_master=True, wait_for_workers=False)
            here["board"] = board.port
        own_value = json.dumps({**here, "process": uuid.uuid4().hex})
        if store.compare_set(keys[rank], "", own_value) != own_value.encode():
            problem = f"it already has a rank {rank}"
    if problem:
        _give_up(f"rank {rank} on {host}: {place} is not this run's rank 0 ({problem}); {PORT_HINT}")

    # What each rank says of itself. Where ranks are missing after the time, all end and the first names the missing.
    try:
        ranks = [json.loads(value) for value in store.multi_get(keys)]
    except dist.DistError:
        try:
            present = [other for other, key in enumerate(keys) if store.check([key])]
        except dist.DistError:  # rank 0 has left, with its own line
            present = [0]
        missing = ", ".join(str(other) for other in range(launch.world_size) if other not in present)
        message = f"of {launch.world_size} ranks these did not join {place} {within}: {missing}"
        _give_up(message, is_reporting_rank=rank == min(present))

    # The network: this rank's own name may lead to a loopback (127.0.1.1 in /etc/hosts, as Debian writes it).
    others = [other["address"] for other in ranks if other["identity"] != here["identity"]]
    reachable = [other for other in others if not _is_loopback(other)]
    if _is_loopback(own_address) and reachable:
        own_address = _local_address(reachable[0])
    if board is None:
        first = ranks[0]["address"]
        board_host = launch.master_addr if _is_loopback(first) else first
        board = dist.TCPStore(board_host, ranks[0]["board"], is_master=False, wait_for_workers=False)
    names = (name for name, entries in psutil.net_if_addrs().items() if own_address in [e.address for e in entries])
    interface = next(names, "")
    if interface:  # gloo would look its own name up instead
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return store, board, ranks, f"{interface} ({own_address})" if interface else ""


def _is_listening(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True


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


def _give_up(message: str, *, is_reporting_rank: bool = True) -> NoReturn:
    """End this process: ranks that have not met cannot agree on who reports the error."""
    error = TrainingError(message)
    raise SystemExit(report_error(error) if is_reporting_rank else error.exit_code) from None


def name_hosts(ranks: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
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
        num_threads=_threads_per_rank(world_size),
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


# --- this process and its host ---


def forwarded_env_prefixes() -> tuple[str, ...]:
    """Beginnings of the environment variables that `deepspeed` hands on to other machines."""
    runner = import_module("deepspeed.launcher.runner")
    accelerator = import_module("deepspeed.accelerator").get_accelerator()
    return (*runner.EXPORT_ENVS, *accelerator.export_envs())


def find_free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _threads_per_rank(local_world_size: int) -> int:
    """Threads for one rank: what the user set, else this rank's share of the cores it may use."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def tune_malloc() -> None:
    """Let this process use freed memory again, instead of having the kernel clear new pages for each large tensor.

    glibc maps and unmaps every allocation of more than 32 MiB; here a fifth of a step went into page faults. What the
    process has needed at its peak stays its own until it ends. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes: the GPU allocator's peak, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux's own count: that of getrusage begins with the size of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
