"""The ranks of a run: how they join, what each computes on, what they tell one another."""

import contextlib
import ctypes
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.config.errors import RunFailed, UserError
from trainer.config.schema import HANG_TIMEOUT_MOST
from trainer.distributed.watchdog import Board

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(seconds=HANG_TIMEOUT_MOST)  # that of the groups which DeepSpeed makes for itself
PREPARE_TIMEOUT = timedelta(hours=24)  # one rank tokenises while the others wait


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run and what each computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    threads: int  #: of the processor, per rank
    host: Any  #: group for Python objects, patient; None where there is one rank
    board: Board  #: what the ranks know of one another while they wait

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def once(self, make: Callable[[], T], *, per_node: bool = False) -> T:
        """What `make` returns on rank 0 (on each node's first rank), for everybody; its errors are everybody's too."""
        leader = self.local_rank == 0 if per_node else self.rank == 0
        value, problem = None, None
        if leader:
            try:
                value = make()
            except (UserError, RunFailed) as error:
                problem = error
            except BaseException as error:
                self.gather((None, RunFailed(f"rank {self.rank}: {type(error).__name__}: {error}")))
                raise
        answers = self.gather((value, problem))
        for _, failed in answers:
            if failed is not None:
                raise failed
        return answers[self.rank - self.local_rank if per_node else 0][0]  # type: ignore[return-value]

    @property
    def is_one_processor(self) -> bool:
        """Whether several ranks share the processor of one machine, whose memory all of them can see."""
        here = self.device.type == "cpu" and self.local_size == self.size > 1
        return here and hasattr(os, "memfd_create")

    @property
    def nodes(self) -> int:
        """Machines taking part, each with the same number of ranks."""
        return self.size // self.local_size


def start_world(device: str | None = None) -> World:
    """Join the other ranks; `deepspeed`, `torchrun` and plain `python` all come through here.

    Without a launcher there is one rank. GPUs speak NCCL, processors gloo.
    """
    # The launchers set these; without one a run is its own world on a port that is free.
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    if on_gpu and local_size > torch.cuda.device_count():  # of all of them, so that every rank knows
        raise UserError(
            f"{local_size} ranks on a machine with {torch.cuda.device_count()} GPUs: start at most one rank a GPU"
        )
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = import_module("deepspeed")
    # The finalizer of DeepSpeed's engine imports these. The garbage collector may call it in the middle of another
    # import, which then fails with a KeyError (importlib, up to Python 3.12); what is there already is only looked up.
    with contextlib.suppress(ImportError):
        import_module("deepspeed.module_inject.auto_ep_comm")
        import_module("deepspeed.utils.pin_memory")
    if not on_gpu:
        # Collectives over shared memory are compiled at first use, need a compiler, leave files in /dev/shm when
        # killed, and ZeRO never calls them: an empty list of operators switches the attempt off.
        vars(import_module("deepspeed.ops"))["__compatible_ops__"] = {}
    threads = _threads(local_size)
    torch.set_num_threads(threads)
    if on_gpu:
        torch.cuda.set_device(local_rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            verbose=False,
            auto_mpi_discovery=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
    host = dist.new_group(backend="gloo", timeout=PREPARE_TIMEOUT) if size > 1 else None
    where = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    return World(
        rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=where, threads=threads, host=host,
        board=Board(rank, size, _store(rank, host) if size > 1 else None),
    )  # fmt: skip


_FREED_STAYS = {-4: 0, -1: -1}  # mallopt: M_MMAP_MAX, M_TRIM_THRESHOLD


def keep_freed_memory() -> None:
    """Let this process use freed memory again, instead of having the kernel clear new pages for each large tensor.

    glibc maps and unmaps every allocation of more than 32 MiB; here a fifth of a step went into page faults. What the
    process has needed at its peak stays its own until it ends. Other C libraries are left as they are.
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "gnu_get_libc_version"):
        for setting, value in _FREED_STAYS.items():
            allocator.mallopt(setting, value)


def planned_world(ranks: int, device: str | None = None) -> World:
    """The world that a run on `ranks` ranks of this machine would have, without joining anybody: for a plan only."""
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    where = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    return World(
        rank=0, size=ranks, local_rank=0, local_size=ranks, device=where, threads=_threads(ranks), host=None,
        board=Board(0, ranks, None),
    )  # fmt: skip


def forwarded_variables() -> tuple[str, ...]:
    """Beginnings of the environment variables that `deepspeed` hands on to other machines."""
    runner = import_module("deepspeed.launcher.runner")
    accelerator = import_module("deepspeed.accelerator").get_accelerator()
    return (*runner.EXPORT_ENVS, *accelerator.export_envs())


def _store(rank: int, host: Any) -> dist.TCPStore:
    """A key-value store on rank 0, apart from the launcher's: that one may go first."""
    address = os.environ["MASTER_ADDR"]
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = [store.port if store else 0]
    dist.broadcast_object_list(port, 0, group=host)
    return store or dist.TCPStore(address, port[0], is_master=False, wait_for_workers=False)


def lost_peer(problem: BaseException) -> bool:
    """Whether a collective failed because another rank is no longer there, as gloo and NCCL put it."""
    if isinstance(problem, dist.DistError):
        return True
    words = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
    return isinstance(problem, RuntimeError) and any(word in str(problem) for word in words)


def leave_world() -> None:
    """Leave the process group; without it a finished rank may abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _threads(local_size: int) -> int:
    """Threads for one rank: what the user set, else this rank's share of the cores it may use."""
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for a processor, where state is not what runs out."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def peak_memory(device: torch.device) -> int:
    """Bytes: the GPU allocator's peak, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux's own count: that of getrusage begins with the size of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 itself, not by emulation."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
