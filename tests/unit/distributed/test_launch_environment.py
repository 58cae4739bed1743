"""The place of a process among those started together, from the variables that each launcher's documents name; and
what libraries read from the environment."""

import os

import pytest

from trainer.config.errors import UserError
from trainer.distributed.launch_environment import (
    LaunchEnvironment,
    find_launch_warning,
    hosts_of_ranks,
    is_first_of_host,
    read_launch_environment,
    reporting_rank,
    set_library_environment,
    without_launcher,
)


def variables(text: str, *more: dict[str, str]) -> dict[str, str]:
    """NAME=VALUE, one after the other."""
    environ = dict(word.split("=", 1) for word in text.split())
    return {name: value for part in (environ, *more) for name, value in part.items()}


MASTER = variables("MASTER_ADDR=h1 MASTER_PORT=1234")
#: docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables"
TORCHRUN = variables(
    "TORCHELASTIC_RUN_ID=none RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 GROUP_RANK=1", MASTER
)
#: deepspeed/launcher/launch.py; the same under pdsh and --no_ssh. One host with one slot, one with two.
DEEPSPEED = variables("CROSS_RANK=1 CROSS_SIZE=2 RANK=2 WORLD_SIZE=3 LOCAL_RANK=0 LOCAL_SIZE=2", MASTER)
#: slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES"
SRUN = variables(
    "SLURM_JOB_ID=100 SLURM_STEP_ID=1 SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=8 "
    "SLURM_STEP_NUM_NODES=4 SLURM_STEP_NODELIST=gpu[003-005,9] SLURM_JOB_NODELIST=gpu[001-009] SLURM_JOB_NUM_NODES=9"
)
#: slurm.schedmd.com/sbatch.html, "OUTPUT ENVIRONMENT VARIABLES": the batch script is task 0 and no step
SBATCH = variables("SLURM_JOB_ID=100 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=8 SLURM_NODEID=0")
#: docs.open-mpi.org, "Environment variables set for MPI applications"
MPI = "{0}_RANK=1 {0}_SIZE=2 {0}_LOCAL_RANK={1} {0}_LOCAL_SIZE={2}"
OPENMPI = variables(MPI.format("OMPI_COMM_WORLD", 0, 1) + " PMIX_RANK=1")
#: github.com/pmodels/mpich, src/pm/hydra; Intel MPI has the same
HYDRA = variables("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2")
#: github.com/kubeflow/training-operator 1.7 to 1.9, pkg/controller.v1/pytorch/envvar.go
PYTORCHJOB = variables(
    "RANK=1 WORLD_SIZE=3 MASTER_ADDR=job-master-0 MASTER_PORT=23456 PET_NPROC_PER_NODE=auto PET_NODE_RANK=1 "
    "PET_NNODES=3 PET_MASTER_ADDR=job-master-0 PET_MASTER_PORT=23456"
)
#: mvapich.cse.ohio-state.edu, user guide, "MV2_COMM_WORLD_LOCAL_RANK"
MVAPICH2 = variables(MPI.format("MV2_COMM_WORLD", 1, 2))
#: flux-framework.readthedocs.io, flux-environment(7)
FLUX = variables("FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2 FLUX_TASK_LOCAL_ID=1 FLUX_JOB_NNODES=1")
#: learn.microsoft.com/azure/machine-learning/how-to-train-distributed-gpu: Open MPI, and the first node's address
AZUREML = {**OPENMPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6105", "AZUREML_RUN_ID": "r"}
#: the lines that clusters' own pages give for a batch script
SBATCH_LINES = variables("RANK=1 WORLD_SIZE=2 LOCAL_RANK=0", MASTER)


def place(rank: int, world_size: int, addr: str = "h1", port: int | None = 1234) -> LaunchEnvironment:
    return LaunchEnvironment(rank=rank, world_size=world_size, master_addr=addr, master_port=port)


PALS = {"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1"}
#: accelerate 1.11, utils/launch.py: prepare_multi_gpu_env hands the ranks to torchrun and adds its own names
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
ALONE = place(0, 1, "127.0.0.1", None)
CASES = {
    "torchrun": (TORCHRUN, place(3, 4)),
    "torchrun in a task of srun": ({**SRUN, **TORCHRUN}, place(3, 4)),
    "deepspeed": (DEEPSPEED, place(2, 3)),
    "deepspeed --launcher mpich": ({**HYDRA, **MASTER, "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, place(1, 2)),
    "mpiexec of PALS with Cray's PMI": ({**PALS, "PMI_LOCAL_SIZE": "2", **MASTER}, place(3, 4)),
    "mpiexec of PALS": ({"PALS_RANKID": "3", "PALS_LOCAL_RANKID": "1", "PMI_SIZE": "4", **MASTER}, place(3, 4)),
    "mpirun in an allocation": (
        {**SRUN, **OPENMPI, "SLURM_STEP_NUM_TASKS": "2"},  # srun has started its helpers, one a node
        place(1, 2, "gpu001", 15101),
    ),
    "mpirun of MVAPICH2 on one host": (MVAPICH2, place(1, 2, "127.0.0.1", 29500)),
    "Flux on one host": (FLUX, place(1, 2, "127.0.0.1", 29500)),
    "AzureML": (AZUREML, place(1, 2, "10.0.0.4", 29500)),
    "accelerate launch": (ACCELERATE, place(3, 4)),
    "srun": (SRUN, place(5, 8, "gpu003", 15101)),
    "srun on one node": ({**SRUN, "SLURM_STEP_NUM_NODES": "1"}, place(5, 8, "127.0.0.1", 15101)),
    "srun of one task": (
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "gpu004"},
        place(0, 1, "127.0.0.1", None),
    ),
    "PyTorchJob": (PYTORCHJOB, place(1, 3, "job-master-0", 23456)),
    "plain Python": ({"PATH": "/bin"}, ALONE),
}


@pytest.mark.parametrize("name", CASES)
def test_each_launcher_says_which_rank_this_is(name):
    environ, expected = CASES[name]
    assert read_launch_environment(environ) == expected
    assert reporting_rank(environ) == expected.rank


#: The variables, and what the one line says: which one is wrong, and with what.
REFUSED = {
    "an allocation without srun": (SBATCH, "SLURM_NTASKS=8: .*srun python launch/train.py"),
    "RANK exported for all tasks": ({**SRUN, **SBATCH_LINES, "WORLD_SIZE": "8"}, "RANK=1 .* SLURM_PROCID=5"),
    "a world of one exported for all tasks": (
        {**SRUN, "RANK": "0", "WORLD_SIZE": "1"},
        "WORLD_SIZE=1, .*SLURM_STEP_NUM_TASKS=8",
    ),
    "mpirun that says no address": (OPENMPI, "OMPI_COMM_WORLD_SIZE=2 without MASTER_ADDR.* mpirun .* -x"),
    "PMIx alone": ({"PMIX_RANK": "1"}, "PMIX_RANK=1: .*torchrun"),
    "Flux on two hosts": ({**FLUX, "FLUX_JOB_NNODES": "2"}, "FLUX_JOB_SIZE=2 without MASTER_ADDR"),
    "a rank outside the world": ({**SBATCH_LINES, "RANK": "2"}, "RANK=2: .* WORLD_SIZE - 1 = 1"),
    "a rank that is no number": ({**SBATCH_LINES, "RANK": "one"}, "RANK=one: .* whole number"),
    "a port that is none": ({**SBATCH_LINES, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: .* 65535"),
    "ranks without an address": ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR"),
    "PyTorchJob with several GPUs a pod": (
        {**PYTORCHJOB, "PET_NPROC_PER_NODE": "8"},
        "PET_NPROC_PER_NODE=8, .*torchrun",
    ),
    "SkyPilot without torchrun": (
        {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"},
        "SKYPILOT_NUM_NODES=2: .*torchrun",
    ),
    "Trainer v2 without torchrun": ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_NNODES=2: .*torchrun"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_processes_that_cannot_tell_their_place_are_refused_in_one_line(name):
    environ, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as refusal:
        read_launch_environment(environ)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        (TORCHRUN, False),
        ({**TORCHRUN, "LOCAL_RANK": "0"}, True),  # rank 2, of the second host: its mistake may be its own
        (SRUN, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1", "WORLD_SIZE": "x"}, True),
        ({"RANK": "3", "WORLD_SIZE": "2"}, True),  # which there cannot be: nobody else would say it
    ],
)
def test_a_mistake_is_said_once_on_each_host(environ, expected):
    assert is_first_of_host(environ) is expected


def test_jobs_on_one_host_meet_at_different_ports_below_those_that_linux_hands_out_itself():
    jobs = ("100", "102", "16998", "16999", "4000000")
    ports = [read_launch_environment({**SRUN, "SLURM_JOB_ID": job}).master_port for job in jobs]
    assert len(set(ports)) == len(jobs)
    assert all(15000 <= port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("environ", "world_size", "expected"),
    [
        (SRUN, 8, "gpu003 gpu003 gpu004 gpu004 gpu005 gpu005 gpu9 gpu9"),
        ({"SLURM_JOB_NODELIST": "rack[1-2]n[09-10],x"}, 5, "rack1n09 rack1n10 rack2n09 rack2n10 x"),
        ({"TRAINER_HOSTS": "a:1,b:2"}, 3, "a b b"),
        (SRUN, 6, ""),  # not so many on each
        ({"SLURM_JOB_NODELIST": "n[1-900000000000]"}, 1, ""),  # would fill the memory
    ],
)
def test_the_host_of_a_rank_that_did_not_come_is_known_where_the_launcher_names_it(environ, world_size, expected):
    assert hosts_of_ranks(environ, world_size) == expected.split()


def test_one_task_in_an_allocation_of_many_is_a_warning():
    one_task = {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find_launch_warning(one_task).startswith("one rank in an allocation of 8: `srun python")
    assert find_launch_warning({**one_task, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}) == ""


@pytest.mark.parametrize("name", CASES)
def test_a_program_that_a_rank_starts_is_nobodys_rank(name):
    environ, _ = CASES[name]
    rest = without_launcher({**environ, "PATH": "/bin", "WANDB_MODE": "offline"})
    assert read_launch_environment(rest) == ALONE
    assert {"PATH", "WANDB_MODE"} <= set(rest)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "2000 system"), ({"OMP_WAIT_POLICY": "passive", "ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}, "None mimalloc")],
)
def test_spin_and_arrows_pool_are_set_unless_the_user_set_them(variables, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(variables))
    set_library_environment()
    assert f"{os.environ.get('GOMP_SPINCOUNT')} {os.environ['ARROW_DEFAULT_MEMORY_POOL']}" == expected
