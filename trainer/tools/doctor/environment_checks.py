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

from trainer.distributed.process_group import forwarded_variables, free_port, has_bf16
from trainer.tools.doctor.check_result import ERROR, OK, WARNING, Check, fine, judged, listed, size

DISTRIBUTION = "gpt2-full-vs-lora"
LAUNCHER_PORT = 29500  # of `deepspeed` and `torchrun`, where none is named
LEAST_SHM = 2**30  # bytes; NCCL's buffers between the GPUs of one machine, some 10 MB a pair
HOSTFILE = Path("/job/hostfile")  # DeepSpeed's default: where it is, `deepspeed` starts on several machines
#: Variables that change what a run does, by their beginnings; `deepspeed` forwards only those that it lists.
MATTER = (
    "HF_", "HUGGING", "TRANSFORMERS_", "WANDB_", "TRAINER_", "CUDA_", "OMP_", "MKL_", "TORCH", "TOKENIZERS_", "GLOO_",
    "XDG_CACHE_HOME", "DS_", "LD_LIBRARY_PATH", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "no_proxy",
)  # fmt: skip


def check(ranks: int, environ: Mapping[str, str]) -> Iterator[Check]:
    """Everything that can be said before data and model are looked at; `environ`: as the user set it."""
    yield from packages(_requirements())
    yield from devices(ranks)
    yield backends(ranks)
    yield from builds()
    yield shared_memory(ranks)
    yield from leftovers(Path("/dev/shm"))
    yield port()
    yield from addresses(environ)
    yield threads(ranks)
    yield variables(environ, HOSTFILE.exists())


def _requirements() -> tuple[str, list[str]] | None:
    """(range of Python, requirements) of this program as it was installed; None where it was not."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    return str(about["Requires-Python"] or ""), metadata.requires(DISTRIBUTION) or []


def packages(required: tuple[str, list[str]] | None) -> Iterator[Check]:
    """Whether each package is there, in the range that this program was installed with."""
    if required is None:
        yield Check(
            level=WARNING, what="packages", found=f"{DISTRIBUTION} is not installed, so its ranges are not known",
            remedy="pip install -e . in its folder",
        )  # fmt: skip
        return
    python, needs = required
    if platform.python_version() not in SpecifierSet(python):
        yield Check(
            level=ERROR, what="Python", found=f"{platform.python_version()}, supported is {python}",
            remedy="make a virtual environment with such a Python",
        )  # fmt: skip
    good = [f"Python {platform.python_version()}"]
    for need in map(Requirement, needs):
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            version = "missing"
        if version != "missing" and need.specifier.contains(version, prereleases=True):
            good.append(f"{need.name} {version}")
        else:
            remedy = f"pip install '{need.name}{need.specifier}'"
            yield Check(
                level=ERROR, what=need.name, found=f"{version}, supported is {need.specifier or 'any'}", remedy=remedy
            )
    yield fine("packages", f"{listed(good, 20)}: in the supported ranges")


def devices(ranks: int) -> Iterator[Check]:
    """GPUs, whether each rank has one and all are alike, and bf16."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        yield judged(
            driver and not hidden, WARNING, "GPUs",
            f"{'torch sees none though a driver is there' if driver else 'none'}: "
            f"runs on {len(os.sched_getaffinity(0))} processor cores",
            "install the CUDA build of torch that the driver takes (nvidia-smi names the newest)",
        )  # fmt: skip
        return
    named = [torch.cuda.get_device_properties(number) for number in range(count)]
    found = listed(f"{gpu.name} {size(gpu.total_memory)}" for gpu in named)
    yield judged(
        ranks > count,
        ERROR,
        "GPUs",
        f"{found} for {ranks} ranks",
        f"start at most {count}: deepspeed --num_gpus {count}",
    )
    if len({(gpu.name, gpu.total_memory) for gpu in named[:ranks]}) > 1:
        yield Check(
            level=WARNING, what="GPUs", found="they are not alike: each step waits for the slowest",
            remedy="choose equal ones with CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    bf16 = has_bf16(torch.device("cuda", 0))
    yield judged(
        not bf16, WARNING, "bf16", f"{named[0].name} {'computes in it' if bf16 else 'does not: fp32, much slower'}",
        "--precision fp16 --ds-config zero1, or a newer GPU",
    )  # fmt: skip


def backends(ranks: int) -> Check:
    """What the ranks would speak with one another."""
    gpu = torch.cuda.is_available()
    there = {"nccl": dist.is_nccl_available() or not gpu, "gloo": dist.is_gloo_available()}
    missing = [name for name, is_there in there.items() if not is_there]
    found = f"nccl {'.'.join(map(str, torch.cuda.nccl.version()))} and gloo" if gpu and not missing else "gloo"
    return judged(
        bool(missing), ERROR if ranks > 1 or "gloo" in missing else WARNING, "backends",
        f"this torch has no {', '.join(missing)}" if missing else found,
        "install a torch with it (the official wheels have it)",
    )  # fmt: skip


def builds() -> Iterator[Check]:
    """Compiled operators: this program needs none, but a build that was killed can hold up others for ever."""
    yield fine("op builds", "none needed: the optimizer is torch's, also with offload")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = sorted(root.glob("**/lock")) if root.is_dir() else []
    if locks:
        yield Check(
            level=WARNING, what="op builds", found=f"{len(locks)} unfinished or running builds ({locks[0].parent})",
            remedy=f"if none runs, delete {listed(map(str, locks), 2)}: whoever wants these ops waits for ever",
        )  # fmt: skip
    if any(
        part.strip()[-1:].isalpha() for part in os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    ):
        yield Check(
            level=WARNING, what="op builds", found="TORCH_CUDA_ARCH_LIST has a letter: DeepSpeed's builder refuses it",
            remedy="write 9.0 for 9.0a, or unset it",
        )  # fmt: skip


def shared_memory(ranks: int, folder: Path = Path("/dev/shm")) -> Check:
    """/dev/shm, through which NCCL's ranks of one machine talk."""
    if not folder.is_dir():
        return fine("/dev/shm", "not there")
    free = shutil.disk_usage(folder).free
    many = ranks > 1 and torch.cuda.is_available()
    return judged(
        many and free < LEAST_SHM, WARNING, "/dev/shm", f"{size(free)} free", "docker run --shm-size=2g (or --ipc=host)"
    )


def leftovers(folder: Path) -> Iterator[Check]:
    """Shared memory that earlier DeepSpeed runs left behind."""
    left = sorted(folder.glob("deepspeed_allreduce_buffer_*")) if folder.is_dir() else []
    if left:
        yield Check(
            level=WARNING, what="/dev/shm", found=f"{len(left)} buffers of earlier runs of other DeepSpeed programs, "
            f"{size(sum(path.stat().st_size for path in left))}",
            remedy=f"when none of them runs: rm {folder}/deepspeed_allreduce_buffer_*",
        )  # fmt: skip


def port(number: int = LAUNCHER_PORT) -> Check:
    """Whether the port that the launchers take where none is named is free."""
    with socket.socket() as probe:
        try:
            probe.bind(("", number))
            return fine("port", f"{number} is free")
        except OSError:
            free = free_port()
    return Check(
        level=WARNING, what="port", found=f"{number}, the launchers' own, is in use",
        remedy=f"deepspeed --master_port {free} ... (MASTER_PORT in the environment is not looked at)",
    )  # fmt: skip


def addresses(environ: Mapping[str, str]) -> Iterator[Check]:
    """Whether the host that the ranks would meet at has an address."""
    host = environ.get("MASTER_ADDR")
    if host:
        try:
            socket.getaddrinfo(host, None)
            yield fine("MASTER_ADDR", f"{host} has an address")
        except OSError as problem:
            yield Check(
                level=ERROR, what="MASTER_ADDR", found=f"{host}: {problem.strerror or problem}",
                remedy="unset it, or name the first machine of the run",
            )  # fmt: skip


def threads(ranks: int) -> Check:
    """Threads of all ranks against the cores there are."""
    cores, told = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS", "")
    each = int(told) if told.isdigit() else max(1, cores // ranks)
    return judged(
        each * ranks > cores, WARNING, "threads", f"{each} a rank x {ranks} = {each * ranks} on {cores} cores",
        f"OMP_NUM_THREADS={max(1, cores // ranks)}" if ranks <= cores else f"at most {cores} ranks on a processor",
    )  # fmt: skip


def variables(environ: Mapping[str, str], several_machines: bool) -> Check:
    """Variables set here that `deepspeed` would not hand to other machines; names only, their values may be secret."""
    forwarded = forwarded_variables()
    written = set(_written(Path.home() / ".deepspeed_env")) | set(_written(Path(".deepspeed_env")))
    lost = [
        name for name in sorted(environ)
        if name.startswith(MATTER) and not name.startswith(tuple(forwarded)) and name not in written
    ]  # fmt: skip
    if not lost:
        return fine("variables", "none is set that other machines would miss")
    return Check(
        level=WARNING if several_machines else OK,
        what="variables", found=f"not forwarded to other machines: {listed(lost)}"
        + ("" if several_machines else " (of no matter on one)"),
        remedy="write NAME=value lines into ~/.deepspeed_env" if several_machines else "",
    )  # fmt: skip


def _written(path: Path) -> Iterable[str]:
    try:
        return [line.split("=", 1)[0].strip() for line in path.read_text().splitlines() if "=" in line]
    except OSError:
        return []
