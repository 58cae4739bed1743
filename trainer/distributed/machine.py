"""This host: its devices, what torch cannot use of them, and what a process may take."""

import contextlib
import ctypes
import os
import re
import resource
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.config.errors import UserError

#: One of these sets is there where a GPU was given to this host or container; the second under WSL2.
GPU_FILES = (("/dev/nvidiactl",), ("/dev/dxg", "/usr/lib/wsl/lib/libcuda.so.1"))
CGROUPS = Path("/sys/fs/cgroup")  # where a container finds its own limits
SHARED_MEMORY = Path("/dev/shm")  # through which NCCL's ranks of one host talk
SHM_MIB_PER_RANK = 40  # of it; a container has 64 unless it is asked for more


def find_gpu_problem(environ: Mapping[str, str]) -> str:
    """What keeps torch from using a GPU of this host, with the remedy; empty where nothing does, where there is none,
    or where CUDA_VISIBLE_DEVICES= (empty) asks for the CPU."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return ""
    on_cpu = "set CUDA_VISIBLE_DEVICES= to train on the CPU"
    if not torch.cuda.is_available():
        if not any(all(Path(name).exists() for name in names) for names in GPU_FILES):
            return ""
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        shown = f" (CUDA_VISIBLE_DEVICES={visible})" if visible else ""
        return (
            f"torch {torch.__version__}, {built}, cannot use the GPU of this host{shown}; update the driver or "
            f"install the torch build that it takes (nvidia-smi names its CUDA), or {on_cpu}"
        )
    kernels = [] if torch.version.hip else torch.cuda.get_arch_list()  # AMD's have names of another form
    for number in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(number)
        if kernels and not any(_runs(kernel, capability) for kernel in kernels):
            name = f"{torch.cuda.get_device_name(number)} (sm_{capability[0]}{capability[1]})"
            return (
                f"torch {torch.__version__} has no kernels for GPU {number}, {name}, only {' '.join(kernels)}; install "
                f"an older or newer torch build that has, or {on_cpu}"
            )
    return ""


def _runs(kernel: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs what was compiled for `sm_80`, or translates `compute_80`."""
    kind, _, digits = kernel.rstrip("af").partition("_")
    major, minor = divmod(int(digits), 10)
    return (major == capability[0] and minor <= capability[1]) or (kind == "compute" and (major, minor) <= capability)


def find_host_problem(environ: Mapping[str, str], *, on_gpu: bool, world_size: int) -> str:
    """Why this host cannot take part, in one line with the remedy, or "". Raises the limit on open files."""
    names = psutil.net_if_addrs()
    for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if world_size > 1 or not on_gpu else ():
        if name and name not in names:
            return f"GLOO_SOCKET_IFNAME={name}: no such network interface; expected one of {', '.join(sorted(names))}"
    needed = 1024 + 4 * world_size  # rank 0 keeps three files a rank, beside those of libraries
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            return f"at most {hard} files may be open here, and {world_size} ranks need {needed}; raise ulimit -Hn"
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return ""


def list_devices(*, on_gpu: bool) -> list[dict[str, Any]]:
    """What there is to compute on: `id`, `name`, `memory` in bytes, and whether it computes in bf16 itself."""
    if not on_gpu:
        return [{"id": "", "name": "CPU", "memory": host_memory_bytes()[0], "bf16": False}]
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    has_bf16 = [bool(torch.version.hip) or gpu.major >= 8 for gpu in gpus]  # what `is_bf16_supported` asks of one
    return [
        {"id": str(gpu.uuid), "name": gpu.name, "memory": gpu.total_memory, "bf16": bf16}
        for gpu, bf16 in zip(gpus, has_bf16, strict=True)
    ]


def host_memory_bytes() -> tuple[int, int]:
    """(Bytes of this host's memory, how many of them are free), within the limits of this process's control groups."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    with contextlib.suppress(OSError):
        own_path = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
        for folder in (CGROUPS / own_path, *(CGROUPS / own_path).parents):
            with contextlib.suppress(OSError, ValueError, IndexError):  # no such file, or no limit: "max"
                limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
                stat = (folder / "memory.stat").read_text(encoding="utf-8")
                used -= int(stat.partition("inactive_file ")[2].split()[0])  # which the system gives back
                total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def assign_devices(hosts: Sequence[str], visible: Sequence[Sequence[Mapping[str, Any]]]) -> list[int]:
    """The GPU of each rank, in its own numbering: the first that no lower rank of its host has. `visible`: what each
    rank sees, which a scheduler may choose. UserError where there are too few."""
    taken: set[tuple[str, str]] = set()
    indices = []
    for host, gpus in zip(hosts, visible, strict=True):
        index = next((n for n, gpu in enumerate(gpus) if (host, gpu["id"]) not in taken), None)
        if index is None:
            num_gpus = sum(other == host for other, _ in taken)
            raise UserError(f"{hosts.count(host)} ranks on {host} with {num_gpus} GPUs: start at most one rank a GPU")
        taken.add((host, gpus[index]["id"]))
        indices.append(index)
    return indices


def threads_per_rank(local_world_size: int) -> int:
    """Threads for one rank: what the user set, else this rank's share of the cores it may use."""
    if match := re.fullmatch(r"([1-9][0-9]{0,3})(,.*)?", os.environ.get("OMP_NUM_THREADS", "").strip()):
        return int(match[1])  # OpenMP has a number for each level of nesting; it ignores what is none, and so do we
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def tune_malloc() -> None:
    """Let glibc keep freed memory for this process: it maps and unmaps every allocation of more than 32 MiB, and a
    fifth of a step went into page faults."""
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


def find_free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def refuse_full_disk(folder: Path, checkpoint_bytes: float) -> None:
    """UserError where the disk of the run folder cannot take a checkpoint."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < checkpoint_bytes:
        raise UserError(
            f"{folder}: {free_bytes / 2**20:,.0f} MiB are free and a checkpoint takes {checkpoint_bytes / 2**20:,.0f}; "
            "name another folder with --output-dir"
        )
