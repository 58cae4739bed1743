"""The machine and what is installed on it: versions, GPUs, backends, builds, shared memory, ports, variables."""

import os
import platform
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trainer.distributed.launch_environment import FORWARDED_PREFIXES
from trainer.distributed.preflight import package_version
from trainer.distributed.process_group import find_free_port, forwarded_env_prefixes, supports_bf16
from trainer.tools.doctor.check_result import (
    ERROR,
    WARNING,
    CheckResult,
    format_bytes,
    join_names,
    make_result,
    ok_result,
)

DISTRIBUTION = "gpt2-full-vs-lora"
LAUNCHER_PORT = 29500  # of `deepspeed` and `torchrun`, where none is named
SHARED_MEMORY = Path("/dev/shm")
MIN_SHM_BYTES = 2**30  # bytes; NCCL's buffers between the GPUs of one machine, some 10 MB a pair
HOSTFILE = Path("/job/hostfile")  # DeepSpeed's default: where it is, `deepspeed` starts on several machines


def check_environment(world_size: int, environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Everything that can be said before data and model are looked at; `environ`: as the user set it.

    `world_size`: ranks of this machine.
    """
    yield from check_packages(_requirements())
    yield from check_devices(world_size)
    yield check_backends(world_size)
    yield from check_op_builds()
    yield check_shared_memory(world_size)
    yield from check_leftover_buffers(SHARED_MEMORY)
    yield check_port()
    yield from check_master_address(environ)
    yield check_threads(world_size)
    yield check_forwarded_variables(environ, HOSTFILE.exists())


def _requirements() -> tuple[str, list[str]] | None:
    """(range of Python, requirements) of this program as it was installed; None where it was not."""
    try:
        package_metadata = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    return str(package_metadata["Requires-Python"] or ""), metadata.requires(DISTRIBUTION) or []


def check_packages(requirements: tuple[str, list[str]] | None) -> Iterator[CheckResult]:
    """Whether each package is there, in the range that this program was installed with."""
    if requirements is None:
        message = f"{DISTRIBUTION} is not installed, so its ranges are not known"
        yield CheckResult(WARNING, "packages", message, "pip install -e . in its folder")
        return
    python_range, requirement_lines = requirements
    python_version = platform.python_version()
    if python_version not in SpecifierSet(python_range):
        message = f"{python_version}, supported is {python_range}"
        yield CheckResult(ERROR, "Python", message, "make a virtual environment with such a Python")
    satisfied_packages = [f"Python {python_version}"]
    for requirement in map(Requirement, requirement_lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, specifier = requirement.name, requirement.specifier
        version = package_version(name)
        if version is not None and specifier.contains(version, prereleases=True):
            satisfied_packages.append(f"{name} {version}")
        else:
            message = f"{version or 'missing'}, supported is {specifier or 'any'}"
            yield CheckResult(ERROR, name, message, f"pip install '{name}{specifier}'")
    yield ok_result("packages", f"{join_names(satisfied_packages, 20)}: in the supported ranges")


def check_devices(world_size: int) -> Iterator[CheckResult]:
    """GPUs, whether each rank has one and all are alike, and bf16."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        are_gpus_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        found = "torch sees none though a driver is there" if has_driver else "none"
        yield make_result(
            has_driver and not are_gpus_hidden,
            WARNING,
            "GPUs",
            f"{found}: runs on {len(os.sched_getaffinity(0))} processor cores",
            "install the CUDA build of torch that the driver takes (nvidia-smi names the newest)",
        )
        return
    gpus = [torch.cuda.get_device_properties(number) for number in range(num_gpus)]
    named = join_names(f"{gpu.name} {format_bytes(gpu.total_memory)}" for gpu in gpus)
    remedy = f"start at most {num_gpus}: deepspeed --num_gpus {num_gpus}"
    yield make_result(world_size > num_gpus, ERROR, "GPUs", f"{named} for {world_size} ranks", remedy)
    if len({(gpu.name, gpu.total_memory) for gpu in gpus[:world_size]}) > 1:
        message = "they are not alike: each step waits for the slowest"
        yield CheckResult(WARNING, "GPUs", message, "choose equal ones with CUDA_VISIBLE_DEVICES")
    has_bf16 = supports_bf16(torch.device("cuda", 0))
    message = f"{gpus[0].name} {'computes in it' if has_bf16 else 'does not: fp32, much slower'}"
    yield make_result(not has_bf16, WARNING, "bf16", message, "--precision fp16 --ds-config zero1, or a newer GPU")


def check_backends(world_size: int) -> CheckResult:
    """What the ranks would speak with one another."""
    has_gpu = torch.cuda.is_available()
    availability = {"nccl": dist.is_nccl_available() or not has_gpu, "gloo": dist.is_gloo_available()}
    missing = [name for name, is_available in availability.items() if not is_available]
    message = f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))} and gloo" if has_gpu and not missing else "gloo"
    return make_result(
        bool(missing),
        ERROR if world_size > 1 or "gloo" in missing else WARNING,
        "backends",
        f"this torch has no {', '.join(missing)}" if missing else message,
        "install a torch with it (the official wheels have it)",
    )


def check_op_builds() -> Iterator[CheckResult]:
    """Compiled operators: this program needs none, but a build that was killed can hold up others for ever."""
    yield ok_result("op builds", "none needed: the optimizer is torch's, also with offload")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    if locks := sorted(root.glob("**/lock")):
        message = f"{len(locks)} unfinished or running builds ({locks[0].parent})"
        remedy = f"if none runs, delete {join_names(map(str, locks), 2)}: whoever wants these ops waits for ever"
        yield CheckResult(WARNING, "op builds", message, remedy)
    if re.search(r"[A-Za-z]([ ;]|$)", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        message = "TORCH_CUDA_ARCH_LIST has a letter: DeepSpeed's builder refuses it"
        yield CheckResult(WARNING, "op builds", message, "write 9.0 for 9.0a, or unset it")


def check_shared_memory(world_size: int) -> CheckResult:
    """/dev/shm, through which NCCL's ranks of one machine talk."""
    if not SHARED_MEMORY.is_dir():
        return ok_result("/dev/shm", "not there")
    free_bytes = shutil.disk_usage(SHARED_MEMORY).free
    is_short = world_size > 1 and torch.cuda.is_available() and free_bytes < MIN_SHM_BYTES
    remedy = "docker run --shm-size=2g (or --ipc=host)"
    return make_result(is_short, WARNING, "/dev/shm", f"{format_bytes(free_bytes)} free", remedy)


def check_leftover_buffers(folder: Path) -> Iterator[CheckResult]:
    """Shared memory that earlier DeepSpeed runs left behind."""
    if buffers := sorted(folder.glob("deepspeed_allreduce_buffer_*")):
        size = format_bytes(sum(path.stat().st_size for path in buffers))
        message = f"{len(buffers)} buffers of earlier runs of other DeepSpeed programs, {size}"
        remedy = f"when none of them runs: rm {folder}/deepspeed_allreduce_buffer_*"
        yield CheckResult(WARNING, "/dev/shm", message, remedy)


def check_port(port: int = LAUNCHER_PORT) -> CheckResult:
    """Whether the port that the launchers take where none is named is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
            return ok_result("port", f"{port} is free")
        except OSError:
            remedy = f"deepspeed --master_port {find_free_port()} ... (MASTER_PORT in the environment is not looked at)"
    return CheckResult(WARNING, "port", f"{port}, the launchers' own, is in use", remedy)


def check_master_address(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Whether the host that the ranks would meet at has an address."""
    if host := environ.get("MASTER_ADDR"):
        try:
            socket.getaddrinfo(host, None)
            yield ok_result("MASTER_ADDR", f"{host} has an address")
        except OSError as error:
            message = f"{host}: {error.strerror or error}"
            yield CheckResult(ERROR, "MASTER_ADDR", message, "unset it, or name the first machine of the run")


def check_threads(world_size: int) -> CheckResult:
    """Threads of all ranks against the cores there are."""
    num_cores, omp_num_threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, num_cores // world_size)
    threads_per_rank = int(omp_num_threads) if omp_num_threads.isdigit() else share
    num_threads = threads_per_rank * world_size
    return make_result(
        num_threads > num_cores,
        WARNING,
        "threads",
        f"{threads_per_rank} a rank x {world_size} = {num_threads} on {num_cores} cores",
        f"OMP_NUM_THREADS={share}" if world_size <= num_cores else f"at most {num_cores} ranks on a processor",
    )


def check_forwarded_variables(environ: Mapping[str, str], is_multi_node: bool) -> CheckResult:
    """Variables set here that `deepspeed` would not hand to other machines; names only, their values may be secret."""
    in_files = {name for folder in (Path.home(), Path()) for name in _read_variable_names(folder / ".deepspeed_env")}
    forwarded = forwarded_env_prefixes()
    needed = sorted(name for name in environ if name.startswith(FORWARDED_PREFIXES))
    names = [name for name in needed if not name.startswith(forwarded) and name not in in_files]
    if not names:
        return ok_result("variables", "none is set that other machines would miss")
    message = f"not forwarded to other machines: {join_names(names)}"
    if not is_multi_node:
        return ok_result("variables", f"{message} (of no matter on one)")
    remedy = "start with what launch/cluster.py --hosts writes, or put such lines into ~/.deepspeed_env: "
    return CheckResult(WARNING, "variables", message, remedy + join_names((f"{name}=..." for name in names), 20))


def _read_variable_names(path: Path) -> list[str]:
    try:
        return [line.split("=", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]
    except OSError:
        return []
