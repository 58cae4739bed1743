"""The machine and what is installed on it: versions, GPUs, backends, builds, shared memory, ports, variables."""

import os
import platform
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trainer.distributed.launch_environment import FORWARDED_PREFIXES
from trainer.distributed.process_group import find_free_port, forwarded_env_prefixes, supports_bf16
from trainer.tools.doctor.check_result import (
    ERROR,
    OK,
    WARNING,
    CheckResult,
    format_bytes,
    join_names,
    make_result,
    ok_result,
)

DISTRIBUTION = "gpt2-full-vs-lora"
LAUNCHER_PORT = 29500  # of `deepspeed` and `torchrun`, where none is named
MIN_SHM_BYTES = 2**30  # bytes; NCCL's buffers between the GPUs of one machine, some 10 MB a pair
HOSTFILE = Path("/job/hostfile")  # DeepSpeed's default: where it is, `deepspeed` starts on several machines


def check_environment(world_size: int, environ: Mapping[str, str], *, is_multi_node: bool) -> Iterator[CheckResult]:
    """Everything that can be said before data and model are looked at; `environ`: as the user set it.

    `world_size`: ranks of this machine.
    """
    yield from check_packages(_requirements())
    yield from check_devices(world_size)
    yield check_backends(world_size)
    yield from check_op_builds()
    yield check_shared_memory(world_size)
    yield from check_leftover_buffers(Path("/dev/shm"))
    yield check_port()
    yield from check_master_address(environ)
    yield check_threads(world_size)
    yield check_forwarded_variables(environ, is_multi_node or HOSTFILE.exists())


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
        yield CheckResult(
            level=WARNING, name="packages", message=f"{DISTRIBUTION} is not installed, so its ranges are not known",
            remedy="pip install -e . in its folder",
        )  # fmt: skip
        return
    python_range, requirement_lines = requirements
    if platform.python_version() not in SpecifierSet(python_range):
        yield CheckResult(
            level=ERROR, name="Python", message=f"{platform.python_version()}, supported is {python_range}",
            remedy="make a virtual environment with such a Python",
        )  # fmt: skip
    satisfied_packages = [f"Python {platform.python_version()}"]
    for requirement in map(Requirement, requirement_lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = "missing"
        if version != "missing" and requirement.specifier.contains(version, prereleases=True):
            satisfied_packages.append(f"{requirement.name} {version}")
        else:
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield CheckResult(
                level=ERROR,
                name=requirement.name,
                message=f"{version}, supported is {requirement.specifier or 'any'}",
                remedy=remedy,
            )
    yield ok_result("packages", f"{join_names(satisfied_packages, 20)}: in the supported ranges")


def check_devices(world_size: int) -> Iterator[CheckResult]:
    """GPUs, whether each rank has one and all are alike, and bf16."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not num_gpus:
        has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        are_gpus_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        yield make_result(
            has_driver and not are_gpus_hidden, WARNING, "GPUs",
            f"{'torch sees none though a driver is there' if has_driver else 'none'}: "
            f"runs on {len(os.sched_getaffinity(0))} processor cores",
            "install the CUDA build of torch that the driver takes (nvidia-smi names the newest)",
        )  # fmt: skip
        return
    gpus = [torch.cuda.get_device_properties(number) for number in range(num_gpus)]
    message = join_names(f"{gpu.name} {format_bytes(gpu.total_memory)}" for gpu in gpus)
    yield make_result(
        world_size > num_gpus,
        ERROR,
        "GPUs",
        f"{message} for {world_size} ranks",
        f"start at most {num_gpus}: deepspeed --num_gpus {num_gpus}",
    )
    if len({(gpu.name, gpu.total_memory) for gpu in gpus[:world_size]}) > 1:
        yield CheckResult(
            level=WARNING, name="GPUs", message="they are not alike: each step waits for the slowest",
            remedy="choose equal ones with CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    is_bf16_supported = supports_bf16(torch.device("cuda", 0))
    yield make_result(
        not is_bf16_supported, WARNING, "bf16", f"{gpus[0].name} "
            f"{'computes in it' if is_bf16_supported else 'does not: fp32, much slower'}",
        "--precision fp16 --ds-config zero1, or a newer GPU",
    )  # fmt: skip


def check_backends(world_size: int) -> CheckResult:
    """What the ranks would speak with one another."""
    has_gpu = torch.cuda.is_available()
    availability = {"nccl": dist.is_nccl_available() or not has_gpu, "gloo": dist.is_gloo_available()}
    missing = [name for name, is_available in availability.items() if not is_available]
    message = f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))} and gloo" if has_gpu and not missing else "gloo"
    return make_result(
        bool(missing), ERROR if world_size > 1 or "gloo" in missing else WARNING, "backends",
        f"this torch has no {', '.join(missing)}" if missing else message,
        "install a torch with it (the official wheels have it)",
    )  # fmt: skip


def check_op_builds() -> Iterator[CheckResult]:
    """Compiled operators: this program needs none, but a build that was killed can hold up others for ever."""
    yield ok_result("op builds", "none needed: the optimizer is torch's, also with offload")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = sorted(root.glob("**/lock")) if root.is_dir() else []
    if locks:
        yield CheckResult(
            level=WARNING, name="op builds", message=f"{len(locks)} unfinished or running builds ({locks[0].parent})",
            remedy=f"if none runs, delete {join_names(map(str, locks), 2)}: whoever wants these ops waits for ever",
        )  # fmt: skip
    if any(
        part.strip()[-1:].isalpha() for part in os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    ):
        yield CheckResult(
            level=WARNING, name="op builds", message="TORCH_CUDA_ARCH_LIST has a letter: DeepSpeed's builder refuses "
                "it",
            remedy="write 9.0 for 9.0a, or unset it",
        )  # fmt: skip


def check_shared_memory(world_size: int, folder: Path = Path("/dev/shm")) -> CheckResult:
    """/dev/shm, through which NCCL's ranks of one machine talk."""
    if not folder.is_dir():
        return ok_result("/dev/shm", "not there")
    free_bytes = shutil.disk_usage(folder).free
    is_multi_gpu = world_size > 1 and torch.cuda.is_available()
    return make_result(
        is_multi_gpu and free_bytes < MIN_SHM_BYTES,
        WARNING,
        "/dev/shm",
        f"{format_bytes(free_bytes)} free",
        "docker run --shm-size=2g (or --ipc=host)",
    )


def check_leftover_buffers(folder: Path) -> Iterator[CheckResult]:
    """Shared memory that earlier DeepSpeed runs left behind."""
    buffers = sorted(folder.glob("deepspeed_allreduce_buffer_*")) if folder.is_dir() else []
    if buffers:
        yield CheckResult(
            level=WARNING, name="/dev/shm", message=f"{len(buffers)} buffers of earlier runs of other DeepSpeed "
                "programs, "
            f"{format_bytes(sum(path.stat().st_size for path in buffers))}",
            remedy=f"when none of them runs: rm {folder}/deepspeed_allreduce_buffer_*",
        )  # fmt: skip


def check_port(port: int = LAUNCHER_PORT) -> CheckResult:
    """Whether the port that the launchers take where none is named is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
            return ok_result("port", f"{port} is free")
        except OSError:
            suggested_port = find_free_port()
    return CheckResult(
        level=WARNING, name="port", message=f"{port}, the launchers' own, is in use",
        remedy=f"deepspeed --master_port {suggested_port} ... (MASTER_PORT in the environment is not looked at)",
    )  # fmt: skip


def check_master_address(environ: Mapping[str, str]) -> Iterator[CheckResult]:
    """Whether the host that the ranks would meet at has an address."""
    host = environ.get("MASTER_ADDR")
    if host:
        try:
            socket.getaddrinfo(host, None)
            yield ok_result("MASTER_ADDR", f"{host} has an address")
        except OSError as error:
            yield CheckResult(
                level=ERROR, name="MASTER_ADDR", message=f"{host}: {error.strerror or error}",
                remedy="unset it, or name the first machine of the run",
            )  # fmt: skip


def check_threads(world_size: int) -> CheckResult:
    """Threads of all ranks against the cores there are."""
    num_cores, omp_num_threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    threads_per_rank = int(omp_num_threads) if omp_num_threads.isdigit() else max(1, num_cores // world_size)
    return make_result(
        threads_per_rank * world_size > num_cores, WARNING, "threads", f"{threads_per_rank} a rank x {world_size} = "
            f"{threads_per_rank * world_size} on {num_cores} cores",
        f"OMP_NUM_THREADS={max(1, num_cores // world_size)}" if world_size <= num_cores else f"at most {num_cores} "
                                                                                             "ranks on a processor",
    )  # fmt: skip


def check_forwarded_variables(environ: Mapping[str, str], is_multi_node: bool) -> CheckResult:
    """Variables set here that `deepspeed` would not hand to other machines; names only, their values may be secret."""
    forwarded_prefixes = forwarded_env_prefixes()
    file_variables = set(_read_variable_names(Path.home() / ".deepspeed_env")) | set(
        _read_variable_names(Path(".deepspeed_env"))
    )
    unforwarded_names = [
        name for name in sorted(environ)
        if name.startswith(FORWARDED_PREFIXES)
        and not name.startswith(tuple(forwarded_prefixes)) and name not in file_variables
    ]  # fmt: skip
    if not unforwarded_names:
        return ok_result("variables", "none is set that other machines would miss")
    return CheckResult(
        level=WARNING if is_multi_node else OK,
        name="variables", message=f"not forwarded to other machines: {join_names(unforwarded_names)}"
        + ("" if is_multi_node else " (of no matter on one)"),
        remedy="start with what launch/cluster.py --hosts writes, or put such lines into ~/.deepspeed_env: "
        + join_names((f"{name}=..." for name in unforwarded_names), 20)
        if is_multi_node
        else "",
    )  # fmt: skip


def _read_variable_names(path: Path) -> Iterable[str]:
    try:
        return [line.split("=", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines() if "=" in line]
    except OSError:
        return []
