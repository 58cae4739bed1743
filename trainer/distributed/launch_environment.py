"""Which rank of how many this process is, read from the variables of whatever started it; needs no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.config.errors import UserError

DEFAULT_PORT = 29500  # of torchrun and `deepspeed` too
_JOB_PORTS = range(15000, 35000)  # a job's own port is one of these, by its number: two jobs may share a host


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """A process's place among those that were started together, as its launcher says it."""

    rank: int
    world_size: int
    local_rank: int | None  #: None where the launcher does not say: the ranks compare their hosts when they join
    local_world_size: int | None
    master_addr: str  #: the host of rank 0
    master_port: int | None  #: None: whichever is free, since nobody else has to know


@dataclass(frozen=True)
class _Variables:
    """The names under which a launcher says what; `marker` tells it from those that use the same names."""

    launcher: str
    rank: str
    world_size: str
    local_rank: tuple[str, ...] = ()
    local_world_size: tuple[str, ...] = ()
    marker: str | None = None

    def is_set(self, environ: Mapping[str, str]) -> bool:
        return self.rank in environ and self.world_size in environ and (self.marker or self.rank) in environ


#: In order of precedence: what runs inside something else comes first (torchrun in a step of SLURM, mpirun whose
#: helpers SLURM has started).
_LAUNCHERS = (
    _Variables("torchrun", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",), marker="TORCHELASTIC_RUN_ID"),
    _Variables("deepspeed", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_SIZE",), marker="CROSS_SIZE"),
    _Variables("environment", "RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    _Variables(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Variables(
        "PMI", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
    ),
    _Variables("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
    _Variables("Kubeflow Trainer", "PET_NODE_RANK", "PET_NNODES"),
    _Variables("SkyPilot", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
)
#: Variables that change what a run does, by their beginnings: a run on another machine needs them too.
FORWARDED_PREFIXES = (
    "WANDB_",
    "HF_",
    "HUGGINGFACE_",
    "HUGGING_FACE_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "TRAINER_",
    "XDG_CACHE_HOME",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "TORCHINDUCTOR_",
    "OMP_",
    "MKL_",
    "GOMP_",
    "CUDA_",
    "DS_",
    "LD_LIBRARY_PATH",
    "UCX_",
    "FI_",
    "SSL_CERT_",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
)
_LAUNCHER_PREFIXES = (
    "TORCHELASTIC_",
    "OMPI_",
    "PMI_",
    "PMIX_",
    "MPI_LOCAL",
    "PALS_",
    "MV2_",
    "FLUX_",
    "SLURM_",
    "PET_",
    "SKYPILOT_",
)
_LAUNCHER_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "CROSS_RANK",
    "CROSS_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def read_launch_environment(environ: Mapping[str, str]) -> LaunchEnvironment:
    """The place of this process; UserError where the variables contradict one another or leave out what is needed.

    Processes that were started together are ranks of one run or are refused: never so many runs of one rank.
    """
    variables = _find_launcher(environ)
    if variables is None:
        _refuse_unclear(environ)
        return LaunchEnvironment(
            rank=0,
            world_size=1,
            local_rank=0,
            local_world_size=1,
            master_addr="127.0.0.1",
            master_port=_master_port(environ, 1),
        )
    rank, world_size = _number(environ, variables.rank), _number(environ, variables.world_size)
    if not 0 <= rank < world_size:
        raise UserError(
            f"{variables.rank}={rank}: expected a whole number from 0 to {variables.world_size} - 1 = {world_size - 1}"
        )
    if variables.launcher == "environment":
        _refuse_contradiction(environ, rank, world_size)
    if variables.launcher in ("environment", "Kubeflow Trainer", "SkyPilot") and world_size > 1:
        _refuse_several_per_node(environ, variables)
    local_rank = _first_number(environ, variables.local_rank)
    local_world_size = _first_number(environ, variables.local_world_size)
    if world_size == 1:
        local_rank, local_world_size = 0, 1
    is_one_host = local_world_size == world_size or environ.get("SLURM_STEP_NUM_NODES") == "1"
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=_master_address(environ, variables, is_one_host=is_one_host),
        master_port=_master_port(environ, world_size),
    )


def reporting_rank(environ: Mapping[str, str]) -> int:
    """The rank by which a process decides whether it is the one to speak, also where its environment is refused."""
    values = (environ.get(names.rank, "") for names in _LAUNCHERS)
    return next((int(value) for value in values if value.isdecimal()), 0)


def is_first_of_host(environ: Mapping[str, str]) -> bool:
    """Whether no other rank of this host says what is wrong before the ranks know one another: one line a host.

    Where nothing tells the ranks of a host apart, rank 0 alone speaks.
    """
    launcher = _find_launcher(environ)
    if launcher is not None and not launcher.local_rank:  # a process a node
        return True
    local_ranks = (environ[name] for name in (launcher.local_rank if launcher else ()) if name in environ)
    return next(local_ranks, str(reporting_rank(environ))) == "0"


def _find_launcher(environ: Mapping[str, str]) -> _Variables | None:
    return next((names for names in _LAUNCHERS if names.is_set(environ)), None)


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that is nobody's rank: without what a launcher or a scheduler has set."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _LAUNCHER_NAMES and not name.startswith(_LAUNCHER_PREFIXES)
    }


def first_host(nodelist: str) -> str:
    """The first host of a list as SLURM writes it: `gpu[003-005,9],login1` begins with gpu003."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def _refuse_unclear(environ: Mapping[str, str]) -> None:
    """UserError for one of several processes that cannot tell which one it is."""
    for name, missing, alone in (("RANK", "WORLD_SIZE", "0"), ("WORLD_SIZE", "RANK", "1")):
        if missing not in environ and environ.get(name, alone) != alone:
            raise UserError(f"{name}={environ[name]} without {missing}: expected both, as torchrun sets them")
    for name in ("PMIX_RANK", "PALS_RANKID", "PMI_RANK", "MV2_COMM_WORLD_RANK", "FLUX_TASK_RANK"):
        if name in environ:
            raise UserError(
                f"{name}={environ[name]}: how many ranks there are is not known here; pass RANK, WORLD_SIZE, "
                "MASTER_ADDR and MASTER_PORT too, or start with torchrun"
            )
    if environ.get("PET_NNODES", "1") != "1":
        raise UserError(f"PET_NNODES={environ['PET_NNODES']}: start it as `torchrun launch/train.py ...`")
    for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_JOB_NUM_NODES"):
        if "SLURM_JOB_ID" in environ and environ.get(name, "1") != "1":
            raise UserError(
                f"{name}={environ[name]}: this process is none of the tasks of its SLURM allocation; start it as "
                "`srun python launch/train.py ...`, or with torchrun in one task a node"
            )


def _refuse_contradiction(environ: Mapping[str, str], rank: int, world_size: int) -> None:
    """UserError where RANK and WORLD_SIZE are not this process's own: exported for all tasks of a step alike."""
    for names in _LAUNCHERS[3:6]:
        if not names.is_set(environ):
            continue
        task, num_tasks = _number(environ, names.rank), _number(environ, names.world_size)
        if world_size < num_tasks or (world_size == num_tasks and rank != task):
            raise UserError(
                f"RANK={rank} of WORLD_SIZE={world_size}, but {names.rank}={task} of {names.world_size}={num_tasks}; "
                "unset RANK and WORLD_SIZE, or set them in each task"
            )


def _refuse_several_per_node(environ: Mapping[str, str], variables: _Variables) -> None:
    """UserError where one process a node was started and more were meant: the others would be waited for."""
    name = "SKYPILOT_NUM_GPUS_PER_NODE" if variables.launcher == "SkyPilot" else "PET_NPROC_PER_NODE"
    num_processes = environ.get(name, "1")
    # PyTorchJob's default is auto: WORLD_SIZE then counts pods, and a process a pod is what was meant.
    is_one = num_processes in ("", "0", "1") or (num_processes == "auto" and variables.launcher == "environment")
    if not is_one and "LOCAL_RANK" not in environ:
        raise UserError(
            f"{name}={num_processes}, and this is one process for its node; start it as `torchrun launch/train.py ...`"
            + (" with the variables of the node" if variables.launcher == "SkyPilot" else "")
        )


def _master_address(environ: Mapping[str, str], variables: _Variables, *, is_one_host: bool) -> str:
    """The host of rank 0; UserError where nothing says it."""
    name = "PET_MASTER_ADDR" if variables.launcher == "Kubeflow Trainer" else "MASTER_ADDR"
    if address := environ.get(name):
        return address
    if is_one_host:
        return "127.0.0.1"
    if variables.launcher == "SkyPilot" and environ.get("SKYPILOT_NODE_IPS"):
        return environ["SKYPILOT_NODE_IPS"].split()[0]
    nodelist = environ.get("SLURM_STEP_NODELIST") if variables.launcher == "SLURM" else None
    if nodelist := nodelist or environ.get("SLURM_JOB_NODELIST"):
        return first_host(nodelist)
    raise UserError(
        f"{variables.world_size}={environ[variables.world_size]} without {name}: expected the host of rank 0 in {name} "
        "(and a free port in MASTER_PORT), on every rank" + (" (mpirun -x)" if variables.launcher == "Open MPI" else "")
    )


def _master_port(environ: Mapping[str, str], world_size: int) -> int | None:
    name = "MASTER_PORT" if "MASTER_PORT" in environ else "PET_MASTER_PORT"
    if name in environ:
        port = _number(environ, name)
        if port > 65535:
            raise UserError(f"{name}={port}: expected a port from 0 to 65535")
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


def _first_number(environ: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((_number(environ, name) for name in names if name in environ), None)
