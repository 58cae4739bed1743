"""Which rank of how many this process is, from the variables that its launcher set; needs no torch."""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from trainer.config.errors import UserError

DEFAULT_PORT = 29500  # of torchrun and `deepspeed` too
#: SLURM jobs that share a host get different ports, by their number; from 32768 on Linux hands ports out by itself.
_JOB_PORTS = range(15000, 32000)


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """What `env://` needs to know."""

    rank: int
    world_size: int
    master_addr: str  #: the host of rank 0
    master_port: int | None  #: None: any free port, since there is one rank


class _Launcher(NamedTuple):
    """The names of a launcher's variables."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str = ""
    marker: str = ""  #: tells it from launchers that use the same names


#: In order of precedence. What runs inside something else comes first: torchrun in a step of SLURM, or mpirun, whose
#: helpers SLURM starts.
_LAUNCHERS = (
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    _Launcher("deepspeed", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_SIZE"),
    _Launcher("environment", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Launcher("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Launcher("MVAPICH2", *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Launcher("Hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    _Launcher("PMI", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    _Launcher("PALS", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Launcher("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    _Launcher("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
_SLURM_TASKS = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_JOB_NUM_NODES")  #: of an allocation
#: Without a launcher each of these says that there are other processes, unless it has this value.
_SIGNS_OF_OTHERS = {
    **{"RANK": "0", "WORLD_SIZE": "1", "PET_NNODES": "1", "SKYPILOT_NUM_NODES": "1"},
    **dict.fromkeys(("PMIX_RANK", "PALS_RANKID", "PMI_RANK", "MV2_COMM_WORLD_RANK", "FLUX_TASK_RANK")),
    **dict.fromkeys(_SLURM_TASKS, "1"),
}

#: Beginnings of variables that change what a run does: a run on another machine needs them too.
FORWARDED_PREFIXES = (
    *("WANDB_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "TRAINER_", "XDG_CACHE_HOME"),
    *("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "DS_", "CUDA_", "LD_LIBRARY_PATH", "OMP_", "MKL_", "GOMP_"),
    *("NCCL_", "GLOO_", "UCX_", "FI_"),
    *("SSL_CERT_", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
)
_LAUNCHER_PREFIXES = (
    *("TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "PALS_", "MV2_", "FLUX_", "SLURM_", "PET_", "SKYPILOT_"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "GROUP_RANK"),
    *("ROLE_RANK", "MASTER_ADDR", "MASTER_PORT"),
)


def set_library_environment() -> None:
    """Before torch and Arrow are imported, unless the user has said otherwise: let waiting threads give their core away
    soon (GNU's OpenMP spins for ever, and beside one busy process a step takes several times as long), and Arrow its
    memory back (a run of 1,000 evaluations grew by 28 MiB with its own pool and by 8 with the system's)."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # turns; launch/README.md has their price and their gain
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")


def read_launch_environment(environ: Mapping[str, str]) -> LaunchEnvironment:
    """The place of this process; UserError where the variables contradict one another or something is missing:
    processes that were started together are never several runs of one rank."""
    launcher = _find_launcher(environ)
    if launcher is None:
        for name, value_alone in _SIGNS_OF_OTHERS.items():
            is_ours = "SLURM_JOB_ID" in environ or not name.startswith("SLURM_")
            if is_ours and environ.get(name, value_alone) != value_alone:
                raise UserError(
                    f"{name}={environ[name]}: there are several processes, and this one cannot tell its rank; start "
                    "it as `torchrun launch/train.py ...`, in SLURM as `srun python launch/train.py ...`, or set RANK, "
                    "WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
                )
        port = _master_port(environ, world_size=1)
        return LaunchEnvironment(rank=0, world_size=1, master_addr="127.0.0.1", master_port=port)
    rank, world_size = _number(environ, launcher.rank), _number(environ, launcher.world_size)
    if rank >= world_size:
        raise UserError(
            f"{launcher.rank}={rank}: expected a rank from 0 to {launcher.world_size} - 1 = {world_size - 1}"
        )
    if launcher.name == "environment":  # a script may have given the tasks of a launcher RANK and WORLD_SIZE
        for outer in _LAUNCHERS[3:]:
            if {outer.rank, outer.world_size} <= set(environ):
                task, num_tasks = _number(environ, outer.rank), _number(environ, outer.world_size)
                if world_size < num_tasks or (world_size == num_tasks and rank != task):
                    raise UserError(
                        f"RANK={rank} of WORLD_SIZE={world_size}, but {outer.rank}={task} of {outer.world_size}="
                        f"{num_tasks}; unset RANK and WORLD_SIZE, or set them in each task"
                    )
        if "LOCAL_RANK" not in environ and (number := environ.get("PET_NPROC_PER_NODE", "1")) not in ("0", "1", "auto"):
            # PyTorchJob, whose WORLD_SIZE counts pods: GPUs of each would be idle.
            raise UserError(f"PET_NPROC_PER_NODE={number}, but one process a pod: start `torchrun launch/train.py`")
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        master_addr=_master_address(environ, launcher, world_size),
        master_port=_master_port(environ, world_size),
    )


def reporting_rank(environ: Mapping[str, str]) -> int:
    """The rank of this process for messages; 0 where the variables make no sense."""
    values = (environ.get(launcher.rank, "") for launcher in _LAUNCHERS)
    return next((int(value) for value in values if value.isdecimal()), 0)


def is_first_of_host(environ: Mapping[str, str]) -> bool:
    """Whether this process reports mistakes that are found before the ranks join: one on each host, or rank 0 where
    nothing tells the ranks of a host apart, and one that can be nobody's rank."""
    launcher, rank = _find_launcher(environ), reporting_rank(environ)
    world_size = environ[launcher.world_size] if launcher else "1"
    is_outside = not world_size.isdecimal() or rank >= int(world_size)
    return is_outside or environ.get(launcher.local_rank if launcher else "", str(rank)) == "0"


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that is not a rank: without the variables of launchers and schedulers."""
    return {name: value for name, value in environ.items() if not name.startswith(_LAUNCHER_PREFIXES)}


def expand_nodelist(nodelist: str) -> list[str]:
    """The hosts of a list as SLURM writes it: `gpu[003-004,9],login1` is gpu003, gpu004, gpu9, login1."""
    hosts = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", nodelist):
        pieces = [[text] for text in re.split(r"\[([^\]]*)\]", part)]  # between brackets every second one
        for ranges in pieces[1::2]:
            ends = [item.partition("-") for item in ranges.pop().split(",")]
            for first, _, last in ends:
                is_number = (first + last).isdecimal() and len(first + last) < 30
                numbers = range(int(first), int(last or first) + 1) if is_number else range(0)
                ranges += [f"{number:0{len(first)}d}" for number in numbers[:100_000]] or [first]
        hosts += ["".join(words) for words in itertools.product(*pieces)]
    return hosts


def hosts_of_ranks(environ: Mapping[str, str], world_size: int) -> list[str]:
    """The host on which each rank was to start; empty where the launcher does not say."""
    pairs = [item.rpartition(":") for item in environ.get("TRAINER_HOSTS", "").split(",") if item]
    hosts = [host for host, _, number in pairs for _ in range(int(number) if number.isdecimal() else 0)]
    nodes = expand_nodelist(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
    if not hosts and nodes and world_size % len(nodes) == 0:
        hosts = [node for node in nodes for _ in range(world_size // len(nodes))]
    return hosts if len(hosts) == world_size else []


def find_launch_warning(environ: Mapping[str, str]) -> str:
    """What is right as it stands and may not be meant: one process where an allocation has room for more."""
    launcher = _find_launcher(environ)
    if launcher is None or launcher.name != "SLURM" or environ[launcher.world_size] != "1":
        return ""
    num_tasks = next((environ[name] for name in _SLURM_TASKS if environ.get(name, "1") != "1"), "")
    return num_tasks and f"one rank in an allocation of {num_tasks}: `srun python launch/train.py` starts them all"


def _find_launcher(environ: Mapping[str, str]) -> _Launcher | None:
    names = set(environ)
    return next((other for other in _LAUNCHERS if {other.rank, other.world_size, other.marker} - {""} <= names), None)


def _master_address(environ: Mapping[str, str], launcher: _Launcher, world_size: int) -> str:
    if address := environ.get("MASTER_ADDR"):
        return address
    on_one_host = "1" in (environ.get("SLURM_STEP_NUM_NODES"), environ.get("FLUX_JOB_NNODES"))
    if world_size == 1 or on_one_host or environ.get(launcher.local_world_size) == str(world_size):
        return "127.0.0.1"
    if azure_address := environ.get("AZ_BATCH_MASTER_NODE"):  # AzureML's Open MPI: address and port of another service
        return azure_address.rpartition(":")[0] or azure_address
    nodelist = environ.get("SLURM_STEP_NODELIST") if launcher.name == "SLURM" else None
    if nodes := expand_nodelist(nodelist or environ.get("SLURM_JOB_NODELIST", "")):
        return nodes[0]
    raise UserError(
        f"{launcher.world_size}={world_size} without MASTER_ADDR: expected the host of rank 0 in MASTER_ADDR (and a "
        "free port in MASTER_PORT) on every rank; mpirun sends variables with -x"
    )


def _master_port(environ: Mapping[str, str], world_size: int) -> int | None:
    if "MASTER_PORT" in environ:
        if (port := _number(environ, "MASTER_PORT")) > 65535:
            raise UserError(f"MASTER_PORT={port}: expected a port from 0 to 65535")
        return port
    if world_size == 1:
        return None
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "")
    if not job.isdecimal():
        return DEFAULT_PORT
    return _JOB_PORTS[(int(job) + (int(step) if step.isdecimal() else 0)) % len(_JOB_PORTS)]


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].strip().isdecimal():
        raise UserError(f"{name}={environ[name]}: expected a whole number")
    return int(environ[name])
