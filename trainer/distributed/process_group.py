"""The ranks of a run: what each computes on, what they tell one another, and what must be the same on all of them."""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.config.choices import MAX_HANG_TIMEOUT_SECONDS
from trainer.config.errors import TrainingError, UserError, permission_denied
from trainer.config.files import open_plain_file
from trainer.config.text import list_some
from trainer.distributed import deepspeed_internals, machine
from trainer.distributed.joining import (
    MAX_HOSTS_SHOWN,
    MAX_RANKS_SHOWN,
    give_up,
    meet,
    name_hosts,
    refuse_unequal_hosts,
)
from trainer.distributed.launch_environment import read_launch_environment
from trainer.distributed.watch import Watchdog

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(seconds=MAX_HANG_TIMEOUT_SECONDS)  # that of the groups which DeepSpeed makes for itself
PREPARE_TIMEOUT = timedelta(hours=24)  # one rank tokenises or exports, and moves, while the others wait
LEAVE_SECONDS = 2.0  # that rank 0 stays for the others, with the store from which they read what it has read

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "numpy", "safetensors", "tokenizers")
MAX_DIFFERENCES_SHOWN = 5
_NAMES_IN_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


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
        """Of all ranks' devices, a CPU rank's share of its host's; None for one CPU rank, where it does not decide."""
        if self.device.type != "cuda" and self.world_size == 1:
            return None
        shares = [1 if self.device.type == "cuda" else self.hosts.count(host) for host in self.hosts]
        return min(int(device["memory"]) // share for device, share in zip(self.devices, shares, strict=True))

    def free_host_bytes(self) -> float:
        """Bytes of the host's memory that are free now, for each rank on it."""
        return machine.host_memory_bytes()[1] / self.local_world_size

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
            except PermissionError as error:
                own_error = permission_denied(error)
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
            self.watchdog.heartbeat()
            for ranks, group in groups:
                if self.rank in ranks:
                    dist.broadcast(tensor, ranks[0], group=group)

        return receive

    def describe_hosts(self) -> str:
        """The hosts, the ranks of each, and what they talk over, for people."""
        ranks: dict[str, list[str]] = {}
        for rank, host in enumerate(self.hosts):
            ranks.setdefault(host, []).append(str(rank))
        texts = [f"{host}: rank{'s' * (len(own) > 1)} {list_some(own, MAX_RANKS_SHOWN)}" for host, own in ranks.items()]
        more = [f"{len(texts) - MAX_HOSTS_SHOWN} more hosts"] if len(texts) > MAX_HOSTS_SHOWN else []
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        return "; ".join([*texts[:MAX_HOSTS_SHOWN], *more, backend + f" over {self.network}" * bool(self.network)])


def init_distributed(*, join_timeout_seconds: float = 600.0) -> DistContext:
    """Join the other ranks; without a launcher there is one. GPUs use NCCL, processors gloo. Ranks that cannot train
    together end here, one of them with the line that says why."""
    launch = read_launch_environment(os.environ)
    on_gpu, problem = torch.cuda.is_available(), machine.find_gpu_problem(os.environ)
    needs_shm = machine.SHARED_MEMORY.is_dir() and os.environ.get("NCCL_SHM_DISABLE") != "1"
    here = {
        "problem": problem or machine.find_host_problem(os.environ, on_gpu=on_gpu, world_size=launch.world_size),
        "kind": "cuda" if on_gpu else "cpu",
        "devices": [] if problem else machine.list_devices(on_gpu=on_gpu),
        "shm_mib": shutil.disk_usage(machine.SHARED_MEMORY).free / 2**20 if needs_shm else math.inf,
    }
    store, board, ranks, network = meet(launch, here, join_timeout_seconds)
    hosts = name_hosts(ranks)
    try:
        refuse_unequal_hosts(hosts, ranks)
        indices = machine.assign_devices(hosts, [rank["devices"] for rank in ranks]) if on_gpu else [0] * len(ranks)
    except UserError as error:
        time.sleep(LEAVE_SECONDS if launch.rank == 0 and launch.world_size > 1 else 0)
        give_up(error, is_reporting_rank=launch.rank == 0)
    watchdog = Watchdog(launch.rank, hosts, board)
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
    cpu_group = None
    try:
        with watchdog.watch_work(join_timeout_seconds), warnings.catch_warnings():
            deepspeed = import_module("deepspeed")
            # The finalizer of DeepSpeed's engine imports these: where the garbage collector calls it in the middle of
            # another import, that one fails with a KeyError (importlib, up to Python 3.12).
            with contextlib.suppress(ImportError):
                import_module("deepspeed.module_inject.auto_ep_comm")
                import_module("deepspeed.utils.pin_memory")
            if not on_gpu:
                deepspeed_internals.skip_compiled_collectives()
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
            if launch.world_size > 1:
                cpu_group = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT)
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        is_reporting_rank = watchdog.claim_error_report()
        message = watchdog.describe_lost_peer(error) if is_reporting_rank else ""
        watchdog.close(has_failed=True)
        give_up(TrainingError(message), is_reporting_rank=is_reporting_rank)
    return DistContext(
        rank=launch.rank,
        world_size=launch.world_size,
        hosts=hosts,
        device=rank_device,
        devices=tuple(devices),
        num_threads=num_threads,
        cpu_group=cpu_group,
        watchdog=watchdog,
        network=network,
    )


def simulated_context(world_size: int, *, gpu_memory_bytes: int | None = None) -> DistContext:
    """The context that a run on so many ranks of this host would have, without joining anybody: for a plan only.
    `gpu_memory_bytes`: of the GPUs that are planned for, also where there is none."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device, hosts = machine.list_devices(on_gpu=on_gpu)[0], (socket.gethostname(),) * world_size
    if gpu_memory_bytes is not None:
        device = {"name": f"GPU of {gpu_memory_bytes / 2**30:g} GiB", "memory": gpu_memory_bytes, "bf16": True}
    return DistContext(
        rank=0,
        world_size=world_size,
        hosts=hosts,
        device=torch.device("cuda", 0) if on_gpu or gpu_memory_bytes is not None else torch.device("cpu"),
        devices=(device,) * world_size,
        num_threads=machine.threads_per_rank(world_size),
        cpu_group=None,
        watchdog=Watchdog(0, hosts, None),
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


# --- before the first step: whatever must be the same on all ranks ---


def refuse_differences(context: DistContext, facts: Mapping[str, Any]) -> None:
    """UserError on every rank, naming both values and where they are, for facts that differ; None is that of a rank
    that need not know it. All ranks must call."""
    facts_of_ranks = context.all_gather_object(dict(facts))
    differences = []
    for name in dict.fromkeys(name for other in facts_of_ranks for name in other):
        known = [(rank, other[name]) for rank, other in enumerate(facts_of_ranks) if other.get(name) is not None]
        if other := next(((rank, value) for rank, value in known if value != known[0][1]), None):
            values = (f"{value} on {context.name_of(rank)}" for rank, value in (known[0], other))
            differences.append(f"{name} is {' and '.join(values)}")
    if differences:
        shown = differences[:MAX_DIFFERENCES_SHOWN]
        if num_more := len(differences) - len(shown):
            shown.append(f"and {num_more} more")
        raise UserError(f"{'; '.join(shown)}: all ranks must have the same")


def program_facts(context: DistContext, settings: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything is read: the program's own files, what is installed, every setting, what was asked
    for beside them (`request`, by flag), and the content of the files that settings name. All ranks must call."""
    facts = {name: package_version(name) or "missing" for name in PACKAGES} | {"Python": platform.python_version()}
    facts["this program"] = context.on_rank_zero(_source_version, per_node=True)
    for group, fields in settings.items():
        if isinstance(fields, Mapping):
            facts |= {f"the setting {group}.{name}": repr(value) for name, value in fields.items()}
        elif isinstance(fields, str):
            facts[f"the setting {group}"] = fields
    facts |= {f"the flag {flag}": repr(value) for flag, value in request.items()}
    named = {"--ds-config": settings.get("engine", {}).get("ds_config")}
    named["--chat-template"] = settings.get("data", {}).get("chat_template")
    for flag, name in named.items():
        with contextlib.suppress(OSError):  # who reads it says why it cannot be read
            if name:
                with open_plain_file(Path(name)) as file:
                    facts[f"the content of {flag} {name}"] = short_digest(file.read())
    return facts


def _source_version() -> str:
    """Of the program's files: a checkout may have been changed since its commit."""
    package_dir = Path(__file__).parents[1]
    files = sorted(package_dir.rglob("*.py"))
    content = b"".join(str(path.relative_to(package_dir)).encode() + path.read_bytes() for path in files)
    return f"version {short_digest(content)}"


def config_digest(config: Any) -> str:
    """Of a model's configuration, as transformers has it: what changes its numbers, not where it lies, nor what every
    configuration has by default, where a later version of transformers has more."""
    content = {key: value for key, value in config.to_diff_dict().items() if key not in _NAMES_IN_CONFIG}
    return short_digest(json.dumps(content, sort_keys=True, default=str).encode())


def short_digest(content: bytes) -> str:
    """Enough of a hash to tell two contents apart."""
    return hashlib.sha256(content).hexdigest()[:12]


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
